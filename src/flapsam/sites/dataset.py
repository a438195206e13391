"""Description of a data set: how flapsam reads it, and what its users need to know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flapsam.run.config import ClassValues
from flapsam.sites.case import CaseList


@dataclass(frozen=True)
class Download:
    """An archive that anyone may download."""

    url: str
    folder: str
    """Folder that the archive unpacks to."""
    md5: str = ""
    """Checksum that the publisher states; empty if there is none."""


@dataclass(frozen=True)
class Dataset:
    """A particular data set, or a folder layout for any data."""

    name: str
    read: Callable[[Path], CaseList]
    """Function from the data's folder to its cases."""
    recognises: Callable[[Path], bool]
    """Whether a folder looks like this data set or layout."""
    layout: str
    """Paths of images and label maps, shown to users."""
    labels: Callable[[Path], Mapping[str, ClassValues]] = lambda path: {}
    """Class → label value or values, where the data or their publisher define them; empty otherwise."""
    title: str = "any data"
    modality: str = "any"
    sites: str = "as in the data"
    shapes: str = "any"
    size: str = "any"
    source: str = "yours"
    licence: str = "yours"
    citation: str = "–"
    how: str = "This is a layout for your own data."
    """How to obtain data that flapsam cannot download."""
    download: Download | None = None

    @property
    def named(self) -> bool:
        """Whether this is a particular data set and not a layout."""
        return self.title != "any data"
