"""Numbers, bytes and times as people read them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flapsam.experiments.paired import Difference

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


def size(count: float) -> str:
    """Bytes for people: powers of 1024."""
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
    """A time for people, in at most two units."""
    whole = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length} {unit} {rest} {smaller}" if rest else f"{whole // length} {unit}"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def rate(speed: float, unit: str = "") -> str:
    """How fast work is done: so much a second, or so many seconds each."""
    return f"{speed:.1f}{unit}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
