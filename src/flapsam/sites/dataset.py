"""What every data set is: how it is read, and what its users ought to know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flapsam.run.config import ClassValues
from flapsam.sites.case import CaseList


@dataclass(frozen=True)
class Download:
    """A file that anyone may fetch."""

    url: str
    folder: str
    """What is in the archive."""
    md5: str = ""
    """As its makers give it, if they do."""


@dataclass(frozen=True)
class Dataset:
    """A data set, or a layout in which any data may lie."""

    name: str
    read: Callable[[Path], CaseList]
    """From the data's folder to its cases."""
    recognises: Callable[[Path], bool]
    """Whether a folder looks like it."""
    layout: str
    """Where images and label maps lie."""
    labels: Callable[[Path], Mapping[str, ClassValues]] = lambda path: {}
    """Class → value or values, where the data themselves or their makers say; else nothing."""
    title: str = "any data"
    modality: str = "any"
    sites: str = "as they are"
    shapes: str = "any"
    size: str = "any"
    source: str = "yours"
    licence: str = "yours"
    citation: str = "–"
    how: str = "They are yours already."
    """How to get it, where it cannot be downloaded."""
    download: Download | None = None

    @property
    def named(self) -> bool:
        """Whether this is one data set, and not a layout."""
        return self.title != "any data"
