"""Find the images to segment: files, folders, DICOM trees and lists of paths."""

import os
import re
from collections.abc import Iterator, Sequence
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
from flapsam.volumes import Series, Source, case_name, find_series, is_dicom, is_image, source_at

LIST = ".txt"
TRUTH = "labels"
"""Beginning of the names of folders with label maps, in flapsam's layout, nnU-Net's and the Decathlon's."""
LABEL_MAP = re.compile(r"(^|[_.-])(seg|segmentation|labels?|mask)$", re.IGNORECASE)
"""End of the names of label map files, as in KiTS, IXI, the prostate sites and 3D Slicer."""


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
) -> list[Job]:
    """Find the images to segment.

    Args:
        paths: image files, folders, or lists (``.txt``) of such paths. Folders are searched at any depth for everything that
            is not named like a label map. The DICOM files of a folder form a series. A list has one path per line,
            relative to the list's folder.
        trained: the adapter, which knows the number of modalities of a case.
        series: pattern for the description, number or UID of a series, which selects from folders with several DICOM series.
        output: the output folder, which is not searched.

    Raises:
        FlapsamError: a path does not exist, or no image is found.
    """
    modalities = read_card(trained.folder).samples.modalities
    jobs: list[Job] = []
    for path in paths:
        if not path.exists():
            raise FlapsamError(f"{path}: no such file or folder")
        jobs += (
            _listed(path, modalities, series, output)
            if path.suffix.lower() == LIST
            else _at(path, modalities, series, output)
        )
    if not jobs:
        raise FlapsamError(f"{', '.join(map(str, paths))}: no NIfTI, NRRD, MetaImage or DICOM image found")
    if modalities == 1:
        stems = without_numbers([(job.image, job.stem) for job in jobs])
        jobs = [replace(job, stem=stem) for job, stem in zip(jobs, stems, strict=True)]
    return _apart([_named(job) for job in jobs])


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


def _listed(path: Path, modalities: int, series: str | None, output: Path | None) -> Iterator[Job]:
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
            yield from _at(listed, modalities, series, output)
        else:
            fault = f"{listed}: no such file or folder; correct {path.name}, line {number}"
            yield Job(listed, Path(case_name(listed)), fault=fault)


def _at(path: Path, modalities: int, series: str | None, output: Path | None) -> Iterator[Job]:
    if path.is_dir():
        yield from _inside(path, modalities, series, output)
        return
    try:
        # A file that is not an image fails later, with the error of its reader.
        yield Job(source_at(path), Path(case_name(path)))
    except FlapsamError as error:
        yield Job(path, Path(case_name(path)), fault=str(error))


def _inside(root: Path, modalities: int, series: str | None, output: Path | None) -> Iterator[Job]:
    """The images in a folder and below it. Folders ``images`` are left out of the paths of label maps."""
    # Links are followed, but no folder is searched twice.
    seen = {root.resolve()} | ({output.resolve()} if output else set())
    for directory, folders, files in os.walk(root, followlinks=True):
        folder = Path(directory)
        subfolders = {name: (folder / name).resolve() for name in sorted(folders) if not name.startswith((".", TRUTH))}
        folders[:] = [name for name, path in subfolders.items() if path not in seen]
        seen.update(subfolders.values())
        target = Path(*(part for part in folder.relative_to(root).parts if part != "images"))
        paths = [folder / name for name in sorted(files)]
        images = [path for path in paths if is_image(path)]
        yield from _by_case([path for path in images if not _is_label_map(path)], target, modalities)
        all_series = find_series(folder, [path for path in paths if not is_image(path) and is_dicom(path)])
        yield from _by_series(folder, all_series, target, series)


def _is_label_map(path: Path) -> bool:
    return path.name.endswith(".seg.nrrd") or bool(LABEL_MAP.search(case_name(path)))


def _by_case(images: list[Path], target: Path, modalities: int) -> list[Job]:
    """One job per image. With several modalities, the files ``CASE_0000``, ``CASE_0001``, … are one case."""
    cases: dict[str, list[Path]] = {}
    for image in images:
        name = case_name(image)
        cases.setdefault(NUMBERED.sub("", name) if modalities > 1 else name, []).append(image)
    if modalities > 1:
        return [Job(files[0], target / name, tuple(files[1:])) for name, files in cases.items()]
    return [Job(file, target / name) for name, files in cases.items() for file in files]


def _by_series(folder: Path, all_series: Sequence[Series], target: Path, pattern: str | None) -> Iterator[Job]:
    """One job per series. Of several series in a folder, only those that match the pattern, since users rarely need all."""
    yield from (Job(series, target / series.files[0].stem) for series in all_series if series.whole_file)
    sliced = [series for series in all_series if not series.whole_file]
    stem = target if target.parts else Path(folder.resolve().name)
    if len(sliced) > 1 and pattern is None:
        titles = ", ".join(series.title for series in sliced)
        fault = f"{folder}: {len(sliced)} series in one folder: {titles}; choose with --series, or '*' for all"
        yield Job(sliced[0], stem, fault=fault)
        return
    for series in sliced:
        if _fits(series, pattern or "*"):
            title = re.sub(r"\W+", "_", f"{series.number}_{series.description}").strip("_")
            yield Job(series, stem if len(sliced) == 1 else stem / title)


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
