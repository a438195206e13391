"""Cases, the sites that hold them, and the list of cases found in a folder."""

from dataclasses import dataclass
from pathlib import Path

from flapsam.run.config import Split


@dataclass(frozen=True)
class Case:
    """One image and its label map."""

    name: str
    site: str
    subject: str
    """Identifier of the person imaged. Splits are drawn by subject, so that training and test share none."""
    image: Path
    label: Path
    split: Split | None = None
    """None until ``split.draw_test`` assigns one."""
    other_images: tuple[Path, ...] = ()
    """Files of the further modalities, one each."""

    @property
    def images(self) -> tuple[Path, ...]:
        """All image files of the case."""
        return (self.image, *self.other_images)


@dataclass(frozen=True)
class Site:
    """One hospital: its name and its cases, sorted by name."""

    name: str
    cases: tuple[Case, ...]

    def of(self, *splits: str) -> list[Case]:
        """The cases in any of these splits."""
        return [case for case in self.cases if case.split in splits]


@dataclass(frozen=True)
class CaseList:
    """The cases found in a data set's folder, and what is wrong with others."""

    cases: list[Case]
    """Usable cases, sorted by site and name."""
    problems: list[str]
    """One sentence for each problem that keeps a case from being used."""
