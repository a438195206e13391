"""The median of every number."""

from flapsam.federation.aggregation.trimmed_mean import TrimmedMean


class Median(TrimmedMean):
    """Takes the median of every number, factors included. With an even number of clients, it is the mean of the middle two
    (coordinate-wise median, Yin et al. 2018, arXiv 1803.01498).

    All clients with a weight above 0 count equally. As long as clients that send arbitrary values are fewer than half, they
    move no number beyond the range of what the others sent. Not the mean of the products B·A. Traffic as with ``fedavg``.
    """

    def dropped(self, count: int) -> int:
        """Number of clients dropped at either end, which leaves the middle one or two."""
        return (count - 1) // 2
