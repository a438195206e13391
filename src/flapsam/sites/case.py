"""Who holds which cases."""

from dataclasses import dataclass
from pathlib import Path

from flapsam.run.config import Split


@dataclass(frozen=True)
class Case:
    """One image with its label map."""

    name: str
    site: str
    subject: str
    """Cases of one subject are never divided between splits."""
    image: Path
    label: Path
    split: Split | None = None
    """None until ``split.draw_test`` has drawn one."""
    other_images: tuple[Path, ...] = ()
    """Of further modalities, a file each."""

    @property
    def images(self) -> tuple[Path, ...]:
        """All files of the image."""
        return (self.image, *self.other_images)


@dataclass(frozen=True)
class Site:
    """One hospital: a name and its cases, ordered by name."""

    name: str
    cases: tuple[Case, ...]

    def of(self, *splits: str) -> list[Case]:
        """The cases of these splits."""
        return [case for case in self.cases if case.split in splits]


@dataclass(frozen=True)
class CaseList:
    """What was found in a data set's folder."""

    cases: list[Case]
    """In the order of site and name."""
    problems: list[str]
    """A sentence each: what keeps further cases from being used."""
