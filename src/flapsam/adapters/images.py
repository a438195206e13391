"""Find the images to segment: files, folders, DICOM trees and lists of paths."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from flapsam.adapters.case_names import NUMBERED, without_numbers
from flapsam.adapters.store import read_card
from flapsam.adapters.trained import Trained
from flapsam.base.errors import FlapsamError
from flapsam.base.files import exists
from flapsam.base.names import NameRefused, as_name, folded
from flapsam.base.text import read_document
from flapsam.run.config import Split
from flapsam.sites import list_cases, read_sites
from flapsam.volumes import (
    LeftOut,
    Series,
    Source,
    case_name,
    is_dicom,
    is_hidden,
    is_image,
    reason_of,
    sentences,
    sort_files,
    source_at,
)

LIST = ".txt"
REASONS = 3
"""Number of sentences on files that are left out which the error has that no image was found."""
LIKE_LABELS = "named like a label map"
TRUTH = "labels"
"""Beginning of the names of folders with label maps, in flapsam's layout, nnU-Net's and the Decathlon's."""
LABEL_MAP = re.compile(r"(^|[_.-])(seg|segmentation|labels?|mask)$", re.IGNORECASE)
"""End of the names of label map files, as in KiTS, IXI, the prostate sites and 3D Slicer."""

DATA_FILE = re.compile(r"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
"""The line of a MetaImage or NRRD header that names the file with the voxels."""


@dataclass(frozen=True)
class Job:
    """One image to segment."""

    image: Source
    stem: Path
    """Path of its label map, relative to the output folder and without suffix."""
    others: tuple[Path, ...] = ()
    """Files of further modalities."""
    site: str = ""
    """Name of the image's site, where sites are known."""
    fault: str = ""
    """Reason why the image cannot be segmented, if that is known beforehand."""


def find_images(
    paths: Sequence[Path], trained: Trained, *, series: str | None = None, output: Path | None = None
) -> tuple[list[Job], list[LeftOut]]:
    """Find the images to segment.

    Args:
        paths: image files, folders, or lists (``.txt``) of such paths. Folders are searched at any depth for everything that
            is not named like a label map. DICOM files are recognised by content, and form series by their UIDs, also over
            several folders. A list has one path per line, relative to the list's folder.
        trained: the adapter, which knows the number of modalities of a case.
        series: pattern for the description, number or UID of a series, which selects from folders with several DICOM series.
        output: the output folder, which is not searched.

    Returns:
        The images, and the files of the folders that are left out.

    Raises:
        FlapsamError: a path does not exist, or no image is found.
    """
    modalities = read_card(trained.folder).samples.modalities
    search = _Search(modalities, series, output)
    for path in paths:
        if not path.exists():
            raise FlapsamError(f"{path}: no such file or folder")
        if path.suffix.lower() == LIST and not is_dicom(path):
            search.listed(path)
        else:
            search.at(path)
    if not search.jobs:
        reasons = "".join(f"; {sentence}" for sentence in sentences(search.left_out)[:REASONS])
        raise FlapsamError(f"{', '.join(map(str, paths))}: no NIfTI, NRRD, MetaImage or DICOM image found{reasons}")
    jobs = search.jobs
    if modalities == 1:
        stems = without_numbers([(job.image, job.stem) for job in jobs])
        jobs = [replace(job, stem=stem) for job, stem in zip(jobs, stems, strict=True)]
    return _apart([_named(job) for job in jobs]), search.left_out


def images_of_split(folder: Path, trained: Trained, split: Split) -> list[Job]:
    """The cases of a split in a folder of sites.

    Args:
        folder: the folder of sites, as for training.
        trained: the adapter. Its run records how data without a table were split.
        split: the split of the cases to segment.

    Raises:
        FlapsamError: the data have no split, or no case is in this split.
    """
    if trained.run:
        data = trained.run.data.model_copy(update={"path": folder})
        cases = [case for site in read_sites(data, trained.run.seed) for case in site.cases]
    else:
        cases = list_cases(folder).cases
        if any(case.split is None for case in cases):
            raise FlapsamError(
                f"{folder}: its cases have no split; give the run's folder instead of the adapter's, or leave out --split"
            )
    jobs = [
        Job(case.image, Path(case.site) / case.name, case.other_images, case.site) for case in cases if case.split == split
    ]
    if not jobs:
        raise FlapsamError(f"{folder}: no case is in the split '{split}'")
    return jobs


class _Search:
    """A search for images, which collects them and what is left out."""

    def __init__(self, modalities: int, series: str | None, output: Path | None) -> None:
        self.modalities, self.series, self.output = modalities, series, output
        self.jobs: list[Job] = []
        self.left_out: list[LeftOut] = []

    def listed(self, path: Path) -> None:
        """Take the images that a list names."""
        try:
            lines = read_document(path).split("\n")
        except OSError as error:
            raise FlapsamError(f"{path}: cannot read this list; write one path per line") from error
        for number, line in enumerate(lines, start=1):
            # As Windows and spreadsheets write a path, if there is no file with exactly this name.
            plain = line.strip("\"',; \t")
            if not plain:
                continue
            spellings = [path.parent / text for text in (line.strip(), plain, plain.replace("\\", "/"))]
            listed = next((spelling for spelling in spellings if exists(spelling)), spellings[0])
            if exists(listed):
                self.at(listed)
            else:
                fault = f"{listed}: no such file or folder; correct {path.name}, line {number}"
                self.jobs.append(Job(listed, Path(case_name(listed)), fault=fault))

    def at(self, path: Path) -> None:
        """Take the image of a file, or those of a folder."""
        if path.is_dir():
            self._inside(path)
            return
        try:
            # A file that is not an image fails later, with the error of its reader.
            self.jobs.append(Job(source_at(path), Path(case_name(path))))
        except FlapsamError as error:
            self.jobs.append(Job(path, Path(case_name(path)), fault=str(error)))

    def _inside(self, root: Path) -> None:
        """Take the images in a folder and below it. Folders ``images`` are left out of the paths of label maps."""
        # Links are followed, but no folder is searched twice.
        seen = {root.resolve()} | ({self.output.resolve()} if self.output else set())
        dicom: list[Path] = []
        for directory, folders, files in os.walk(root, followlinks=True):
            folder = Path(directory)
            self.left_out += [LeftOut(folder / name, LIKE_LABELS) for name in sorted(folders) if name.startswith(TRUTH)]
            subfolders = {name: (folder / name).resolve() for name in sorted(folders) if not name.startswith((".", TRUTH))}
            folders[:] = [name for name, path in subfolders.items() if path not in seen]
            seen.update(subfolders.values())
            paths = [path for path in (folder / name for name in sorted(files)) if not is_hidden(path)]
            images = [path for path in paths if is_image(path)]
            self.jobs += _by_case(
                [path for path in images if not _is_label_map(path)], _target(root, folder), self.modalities
            )
            self.left_out += [LeftOut(path, LIKE_LABELS) for path in images if _is_label_map(path)]
            voxels = _detached(images)
            for path in paths:
                if is_image(path) or path.name in voxels:
                    continue
                if is_dicom(path):
                    dicom.append(path)
                else:
                    self.left_out.append(LeftOut(path, reason_of(path)))
        found = sort_files(dicom)
        self.left_out += found.left_out
        for folder in sorted({series.folder for series in found.series}):
            in_folder = [series for series in found.series if series.folder == folder]
            self._by_series(folder, in_folder, _target(root, folder))

    def _by_series(self, folder: Path, all_series: Sequence[Series], target: Path) -> None:
        """One job per series. Of several in a folder, only those that match the pattern, since users rarely need all."""
        self.jobs += [Job(series, target / series.files[0].stem) for series in all_series if series.whole_file]
        sliced = [series for series in all_series if not series.whole_file]
        stem = target if target.parts else Path(folder.resolve().name)
        if len(sliced) > 1 and self.series is None:
            titles = ", ".join(_titles(sliced))
            fault = f"{folder}: {len(sliced)} series in one folder: {titles}; choose with --series, or '*' for all"
            self.jobs.append(Job(sliced[0], stem, fault=fault))
            return
        names = [re.sub(r"\W+", "_", f"{series.number}_{series.description}").strip("_") for series in sliced]
        for series, name in zip(sliced, names, strict=True):
            if not _fits(series, self.series or "*"):
                self.left_out.append(LeftOut(series.files[0], f"series {series.title}, which --series does not choose"))
                continue
            title = name if names.count(name) == 1 else f"{name}_{series.uid}"
            self.jobs.append(Job(series, stem if len(sliced) == 1 else stem / title))


def _target(root: Path, folder: Path) -> Path:
    return Path(*(part for part in folder.relative_to(root).parts if part != "images"))


def _detached(images: Sequence[Path]) -> set[str]:
    """Names of files that hold the voxels of the headers among the images."""
    headers = [path for path in images if path.name.lower().endswith((".mhd", ".nhdr"))]
    names: set[str] = set()
    for path in headers:
        with suppress(OSError), path.open("rb") as file:
            names.update(
                re.findall(r"(?i)(?:elementdatafile\s*=|data ?file:)\s*(.+?)\s*$", file.read(2**16).decode("latin-1"), re.M)
            )
    return names


def _titles(all_series: Sequence[Series]) -> list[str]:
    """Titles of series, with the UIDs of those that would else have the same."""
    titles = [series.title for series in all_series]
    return [
        title if titles.count(title) == 1 else f"{title} {series.uid}"
        for title, series in zip(titles, all_series, strict=True)
    ]


def _is_label_map(path: Path) -> bool:
    return path.name.lower().endswith(".seg.nrrd") or bool(LABEL_MAP.search(case_name(path)))


def _by_case(images: list[Path], target: Path, modalities: int) -> list[Job]:
    """One job per image. With several modalities, the files ``CASE_0000``, ``CASE_0001``, … are one case."""
    cases: dict[str, list[Path]] = {}
    for image in images:
        name = case_name(image)
        cases.setdefault(NUMBERED.sub("", name) if modalities > 1 else name, []).append(image)
    if modalities > 1:
        return [Job(files[0], target / name, tuple(files[1:])) for name, files in cases.items()]
    return [Job(file, target / name) for name, files in cases.items() for file in files]


def _fits(series: Series, pattern: str) -> bool:
    return any(fnmatchcase(text.lower(), pattern.lower()) for text in (series.description, series.number, series.uid))


def _named(job: Job) -> Job:
    """The same job, with a fault if the path of its label map contains something that is not a name."""
    try:
        return replace(job, stem=Path(*(as_name(part, str(job.image)) for part in job.stem.parts)))
    except NameRefused as refusal:
        return replace(job, fault=job.fault or str(refusal))


def _apart(jobs: list[Job]) -> list[Job]:
    """The same jobs, with a fault in every job whose label map would overwrite that of an earlier job."""
    first: dict[str, Job] = {}
    result = []
    for job in jobs:
        earlier = first.setdefault(folded(str(job.stem)), job)
        if earlier is not job and not job.fault:
            job = replace(job, fault=f"{job.image}: its label map would overwrite that of {earlier.image}; rename one image")
        result.append(job)
    return result
