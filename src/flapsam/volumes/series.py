"""DICOM series, as a command knows them before their slices are read."""

from dataclasses import dataclass
from pathlib import Path

from flapsam.volumes.dicom_file import begins_as_dicom

SUFFIXES = (".dcm", ".dicom", ".ima")


@dataclass(frozen=True)
class Series:
    """A DICOM series: files that hold a slice each, or one file with all slices."""

    folder: Path
    """The folder that holds all files, perhaps in folders below it."""
    files: tuple[Path, ...]
    uid: str = ""
    number: str = ""
    description: str = ""
    whole_file: bool = False
    """Whether the series is one file with all slices, or one that cannot be read, rather than a file per slice."""

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.folder)

    @property
    def title(self) -> str:
        """Number, description and number of files of the series, for people."""
        parts = (self.number, f"'{self.description}'" if self.description else "", f"({len(self.files)} files)")
        return " ".join(part for part in parts if part)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by the end of its name or its first bytes. Hidden files and DICOMDIR do not count."""
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return False
    if path.name.lower().endswith(SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            return begins_as_dicom(file.read(140))
    except OSError:
        return False
