"""Numbers, bytes and durations in readable form."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flapsam.experiments.paired import Difference
    from flapsam.learning.metrics import Mean

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits, or a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def over(text: str, count: int, cases: int) -> str:
    """The text of a mean, with the number of cases that it is over if that is not the number of all cases."""
    return text if count in (0, cases) else f"{text} n={count}"


def with_interval(mean: "Mean | None", digits: int = 3, cases: int = 0) -> str:
    """A mean with its 95 % interval, and with its number of cases if that is not ``cases``."""
    if mean is None:
        return NONE
    ends = between(mean, digits)
    text = number(mean.value, digits) + (f" ({ends})" if ends else "")
    return over(text, mean.cases, cases or mean.cases)


def between(mean: "Mean | None", digits: int = 3) -> str:
    """The ends of a mean's 95 % interval; empty if it has none."""
    if mean is None or mean.low is None or mean.high is None:
        return ""
    return f"{mean.low:.{digits}f} to {mean.high:.{digits}f}"


def p_value(value: float | None) -> str:
    """A p-value, of which no more than three digits count."""
    return "<0.001" if value is not None and value < 0.001 else number(value)


def size(count: float) -> str:
    """A number of bytes in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def interval(difference: "Difference | None") -> str:
    """A difference with its 95 % interval."""
    if difference is None:
        return NONE
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def duration(seconds: float) -> str:
    """A duration in at most two units."""
    whole = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length} {unit} {rest} {smaller}" if rest else f"{whole // length} {unit}"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def rate(speed: float, unit: str = "") -> str:
    """A speed as work per second or, if that is below 1, as seconds per piece of work."""
    return f"{speed:.1f}{unit}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
