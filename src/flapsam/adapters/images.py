"""Which images are to be segmented: files, folders, DICOM trees, lists."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from flapsam.adapters.store import read_card
from flapsam.adapters.trained import Trained
from flapsam.base.errors import FlapsamError
from flapsam.run.config import Split
from flapsam.sites import find_dataset, read_sites
from flapsam.volumes import Series, Source, case_name, find_series, is_dicom, is_image, source_at

LIST = ".txt"
NUMBERED = re.compile(r"_\d{4}$")
"""nnU-Net's number of a modality, at the end of a file's name."""
TRUTH = "labels"
"""Beginning of the names of folders that hold label maps: this layout's, nnU-Net's and the Decathlon's."""
LABEL_MAP = re.compile(r"(^|[_.-])(seg|segmentation|labels?|mask)$", re.IGNORECASE)
"""End of the names of files that are label maps: those of KiTS, IXI, the prostate sites, 3D Slicer."""


@dataclass(frozen=True)
class Job:
    """One image, and its label map's place relative to the output folder, without suffix."""

    image: Source
    stem: Path
    others: tuple[Path, ...] = ()
    """Files of further modalities."""
    site: str = ""
    fault: str = ""
    """Why it cannot be segmented, where that is known already."""


def find_images(
    paths: Sequence[Path], trained: Trained, *, series: str | None = None, output: Path | None = None
) -> list[Job]:
    """Images to segment.

    Args:
        paths: image files; folders, which are searched to the bottom for all but what is called a label map, each folder of
            DICOM files being a series; or lists (``.txt``) of such paths, one a line, relative to the list's folder.
        trained: says how many modalities a case has.
        series: of folders with several DICOM series, those whose description, number or UID fit this pattern.
        output: a folder that is not searched.

    Raises:
        FlapsamError: a path does not exist, or there is no image.
    """
    modalities = read_card(trained.folder).samples.modalities
    jobs: list[Job] = []
    for path in paths:
        if not path.exists():
            raise FlapsamError(f"{path}: no such file or folder")
        jobs += _listed(path, modalities, series, output) if path.suffix == LIST else _at(path, modalities, series, output)
    if not jobs:
        raise FlapsamError(f"{', '.join(map(str, paths))}: no NIfTI, NRRD, MetaImage or DICOM image there")
    return _apart(jobs)


def images_of_split(folder: Path, trained: Trained, split: Split) -> list[Job]:
    """The cases of a split, in a folder of sites.

    Args:
        folder: as for training.
        trained: says how the run split its data, where they have no table.
        split: which cases.

    Raises:
        FlapsamError: it has no split, or no case of this one.
    """
    if trained.run:
        data = trained.run.data.model_copy(update={"path": folder})
        cases = [case for site in read_sites(data, trained.run.seed) for case in site.cases]
    else:
        cases = find_dataset(folder).read(folder).cases
        if any(case.split is None for case in cases):
            raise FlapsamError(
                f"{folder}: its cases have no split; give the run's folder, which knows it, or leave out --split"
            )
    jobs = [
        Job(case.image, Path(case.site) / case.name, case.other_images, case.site) for case in cases if case.split == split
    ]
    if not jobs:
        raise FlapsamError(f"{folder}: no case has the split '{split}'")
    return jobs


def _listed(path: Path, modalities: int, series: str | None, output: Path | None) -> Iterator[Job]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FlapsamError(f"{path}: not a list of paths, one a line") from error
    for line in filter(None, (line.strip() for line in lines)):
        listed = path.parent / line
        if listed.exists():
            yield from _at(listed, modalities, series, output)
        else:
            yield Job(listed, Path(case_name(listed)), fault=f"{listed}: no such file or folder; {path.name} lists it")


def _at(path: Path, modalities: int, series: str | None, output: Path | None) -> Iterator[Job]:
    if path.is_dir():
        yield from _inside(path, modalities, series, output)
        return
    try:
        # What is no image at all is told so when it is read.
        yield Job(source_at(path), Path(case_name(path)))
    except FlapsamError as error:
        yield Job(path, Path(case_name(path)), fault=str(error))


def _inside(root: Path, modalities: int, series: str | None, output: Path | None) -> Iterator[Job]:
    """The images in a folder and below it; folders ``images`` leave no trace in the label maps' places."""
    # Links are followed, but to no folder twice.
    seen = {root.resolve()} | ({output.resolve()} if output else set())
    for here, folders, files in os.walk(root, followlinks=True):
        folder = Path(here)
        there = {name: (folder / name).resolve() for name in sorted(folders) if not name.startswith((".", TRUTH))}
        folders[:] = [name for name, path in there.items() if path not in seen]
        seen.update(there.values())
        place = Path(*(part for part in folder.relative_to(root).parts if part != "images"))
        paths = [folder / name for name in sorted(files)]
        images = [path for path in paths if is_image(path)]
        yield from _by_case([path for path in images if not _is_label_map(path)], place, modalities)
        found = find_series(folder, [path for path in paths if not is_image(path) and is_dicom(path)])
        yield from _by_series(folder, found, place, series)


def _is_label_map(path: Path) -> bool:
    return path.name.endswith(".seg.nrrd") or bool(LABEL_MAP.search(case_name(path)))


def _by_case(images: list[Path], place: Path, modalities: int) -> list[Job]:
    """A job an image; where an adapter wants several modalities, files ``CASE_0000``, ``CASE_0001``, … are one case."""
    cases: dict[str, list[Path]] = {}
    for image in images:
        name = case_name(image)
        cases.setdefault(NUMBERED.sub("", name) if modalities > 1 else name, []).append(image)
    if modalities > 1:
        return [Job(files[0], place / name, tuple(files[1:])) for name, files in cases.items()]
    return [Job(file, place / name) for name, files in cases.items() for file in files]


def _by_series(folder: Path, found: Sequence[Series], place: Path, pattern: str | None) -> Iterator[Job]:
    """A job a series; of several in a folder only those that are asked for, since one rarely wants all."""
    yield from (Job(one, place / one.files[0].stem) for one in found if one.whole_file)
    several = [one for one in found if not one.whole_file]
    named = place if place.parts else Path(folder.resolve().name)
    if len(several) > 1 and pattern is None:
        titles = ", ".join(one.title for one in several)
        fault = f"{folder}: {len(several)} series in one folder: {titles}; choose with --series, or '*' for each"
        yield Job(several[0], named, fault=fault)
        return
    for one in several:
        if _fits(one, pattern or "*"):
            title = re.sub(r"\W+", "_", f"{one.number}_{one.description}").strip("_")
            yield Job(one, named if len(several) == 1 else named / title)


def _fits(series: Series, pattern: str) -> bool:
    return any(fnmatchcase(text.lower(), pattern.lower()) for text in (series.description, series.number, series.uid))


def _apart(jobs: list[Job]) -> list[Job]:
    """The same jobs, but of two with one place for their label maps only the first is done."""
    first: dict[Path, Job] = {}
    result = []
    for job in jobs:
        other = first.setdefault(job.stem, job)
        if other is not job and not job.fault:
            job = replace(job, fault=f"{job.image}: its label map would lie where that of {other.image} does; rename one")
        result.append(job)
    return result
