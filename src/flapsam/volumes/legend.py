"""What the values of a label map stand for."""

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
"""Okabe and Ito's, which people with any colour vision tell apart; after the last they begin again."""


@dataclass(frozen=True)
class Segment:
    """A class in a label map."""

    value: int
    name: str
    colour: str
    """As ``#rrggbb``."""

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255."""
        red, green, blue = bytes.fromhex(self.colour.removeprefix("#"))
        return red, green, blue


Legend = tuple[Segment, ...]


def legend_of(classes: Sequence[str]) -> Legend:
    """Values 1, 2, … in the order of the classes."""
    return tuple(Segment(value, name, COLOURS[(value - 1) % len(COLOURS)]) for value, name in enumerate(classes, start=1))


def itk_snap(legend: Legend) -> str:
    """A file of label descriptions as ITK-SNAP reads it: value, red, green, blue, opacity, shown, in the mesh, name."""
    lines = ['0 0 0 0 0 0 0 "background"']
    for segment in legend:
        red, green, blue = segment.rgb
        name = segment.name.replace('"', "'")
        lines.append(f'{segment.value} {red} {green} {blue} 1 1 1 "{name}"')
    return "\n".join(lines) + "\n"
