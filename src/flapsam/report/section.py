"""Parts of a page: sections with charts, and a table for each chart."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class CaseName:
    """A cell with the name of a case, which links to the case where volumes can be opened."""

    site: str
    case: str

    def __str__(self) -> str:
        return self.case


Cell = str | CaseName


@dataclass(frozen=True)
class Table:
    """A table with a head and rows."""

    name: str
    """The table's id in the page."""
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    """Number of columns from the left that hold text. The others hold numbers."""
    opened: bool = False
    """Whether the table is visible without a click."""


@dataclass(frozen=True)
class Chart:
    """A chart as SVG."""

    svg: Markup
    """The drawing, with a title and a description for screen readers."""
    width: int
    """Width in pixels at which the text is easy to read."""


@dataclass(frozen=True)
class Strip:
    """A case as a row of slices."""

    site: str
    case: str
    rank: str
    """``best``, ``median`` or ``worst``."""
    about: str
    """Scores of the case, by class."""
    svg: Markup


@dataclass(frozen=True)
class Block:
    """Preformatted text, such as a file or a command."""

    title: str
    text: str
    opened: bool = False
    """Whether the text is visible without a click."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    name: str
    """The section's id in the page."""
    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    strips: Sequence[Strip] = ()
    blocks: Sequence[Block] = ()
