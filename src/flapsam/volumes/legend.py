"""Names and colours of the values in a label map."""

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
"""Okabe and Ito's colours, which people with any colour vision can distinguish. Classes beyond the last reuse them."""


@dataclass(frozen=True)
class Segment:
    """A class in a label map."""

    value: int
    name: str
    colour: str
    """Colour as ``#rrggbb``."""

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Red, green and blue, from 0 to 255."""
        red, green, blue = bytes.fromhex(self.colour.removeprefix("#"))
        return red, green, blue


Legend = tuple[Segment, ...]


def legend_of(classes: Sequence[str]) -> Legend:
    """The legend of a label map whose values 1, 2, … are the classes in their order."""
    return tuple(Segment(value, name, COLOURS[(value - 1) % len(COLOURS)]) for value, name in enumerate(classes, start=1))


def itk_snap(legend: Legend) -> str:
    """The content of a label description file for ITK-SNAP.

    A line has the value, red, green, blue, opacity, visibility, mesh visibility and name of a label.
    """
    lines = ['0 0 0 0 0 0 0 "background"']
    for segment in legend:
        red, green, blue = segment.rgb
        name = segment.name.replace('"', "'")
        lines.append(f'{segment.value} {red} {green} {blue} 1 1 1 "{name}"')
    return "\n".join(lines) + "\n"
