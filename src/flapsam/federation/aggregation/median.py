"""The median of every number."""

from flapsam.federation.aggregation.trimmed_mean import TrimmedMean


class Median(TrimmedMean):
    """Of every number, factors too, the median; of an even number of clients the mean of the middle two
    (coordinate-wise median, Yin et al. 2018, arXiv 1803.01498).

    Clients of a weight above 0 count equally. As long as they are fewer than half, clients that send anything move no number
    beyond what the others sent. Not the mean of the products B·A. Traffic as with ``fedavg``.
    """

    def dropped(self, count: int) -> int:
        """All but the middle one, or two."""
        return (count - 1) // 2
