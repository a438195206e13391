"""What a page is made of: sections with charts, and a table behind each."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class CaseName:
    """A cell that names a case; where volumes can be opened, a link to it."""

    site: str
    case: str

    def __str__(self) -> str:
        return self.case


Cell = str | CaseName


@dataclass(frozen=True)
class Table:
    """Rows under a head."""

    name: str
    """Its id in the page."""
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    """So many columns from the left hold text, the others numbers."""
    opened: bool = False
    """Whether it is seen without a click."""


@dataclass(frozen=True)
class Chart:
    """A picture."""

    svg: Markup
    """With a title and a description of its own for those who do not see it."""
    width: int
    """At which its text is easily read, in pixels."""


@dataclass(frozen=True)
class Strip:
    """A case in slices."""

    site: str
    case: str
    rank: str
    """``best``, ``median`` or ``worst``."""
    about: str
    svg: Markup


@dataclass(frozen=True)
class Block:
    """Text as it stands in a file or on a command line."""

    title: str
    text: str
    opened: bool = False
    """Whether it is seen without a click."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    name: str
    """Its id in the page."""
    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    strips: Sequence[Strip] = ()
    blocks: Sequence[Block] = ()
