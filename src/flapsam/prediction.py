"""Folders of images → label maps, with a trained adapter."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flapsam.adapter import CARD, load_adapter, read_card
from flapsam.config import RunConfig, Weights, read_config
from flapsam.device import default_threads, find_device, set_up_torch
from flapsam.errors import FlapsamError
from flapsam.files import check_writable
from flapsam.inference import predict_volume
from flapsam.sites import Split, find_dataset, read_sites
from flapsam.volumes import case_name, is_nifti, read_image, write_label_like

NUMBERED = re.compile(r"_\d{4}$")
"""nnU-Net's number of a modality, at the end of a file's name."""


@dataclass(frozen=True)
class Trained:
    """An adapter's folder, and the configuration of the run that it lies in, if it does."""

    folder: Path
    run: RunConfig | None


def find_trained(path: Path) -> Trained:
    """The adapter at ``path``, which is an adapter's folder or a run's.

    Raises:
        FlapsamError: it is neither.
    """
    for folder in (path, path / "adapter"):
        if (folder / CARD).exists():
            run = next((p / "run.yaml" for p in (path, path.parent, path.parent.parent) if (p / "run.yaml").exists()), None)
            return Trained(folder, read_config(run) if run else None)
    raise FlapsamError(f"{path}: neither an adapter nor a finished run; an adapter's folder holds {CARD}")


def backbone_of(trained: Trained) -> Weights | None:
    """The checkpoint that the adapter's run used, if it is known."""
    return trained.run.backbone.weights if trained.run else None


@dataclass(frozen=True)
class Job:
    """One image, and its label map's place relative to the output folder."""

    image: Path
    target: Path
    others: tuple[Path, ...] = ()
    """Files of further modalities."""
    site: str = ""


def find_images(path: Path, trained: Trained, split: Split | None = None) -> list[Job]:
    """Images to predict.

    Args:
        path: a NIfTI file; a folder of them; or a folder of sites, whose label maps go to ``SITE/CASE.nii.gz``.
        trained: says how the run split its data, where the data have no table.
        split: only these cases of a folder of sites.

    Raises:
        FlapsamError: there is no image.
    """
    if path.is_file():
        return [Job(path, Path(f"{case_name(path)}.nii.gz"))]
    if not path.is_dir():
        raise FlapsamError(f"{path}: no such file or folder")
    images = [image for image in sorted(path.iterdir()) if is_nifti(image)]
    if images:
        return _by_case(images, read_card(trained.folder).samples.modalities)
    if split is None:
        images = [image for image in sorted(path.glob("*/images/*")) if is_nifti(image)]
        if not images:
            raise FlapsamError(f"{path}: no NIfTI image there, neither directly nor as SITE/images/CASE.nii.gz")
        return [Job(image, Path(image.parent.parent.name) / f"{case_name(image)}.nii.gz") for image in images]
    if trained.run:
        data = trained.run.data.model_copy(update={"path": path})
        cases = [case for site in read_sites(data, trained.run.seed) for case in site.cases]
    else:
        cases = find_dataset(path).read(path).cases
        if any(case.split is None for case in cases):
            raise FlapsamError(
                f"{path}: its cases have no split; give the run's folder, which knows it, or leave out --split"
            )
    jobs = [
        Job(case.image, Path(case.site) / f"{case.name}.nii.gz", case.other_images, case.site)
        for case in cases
        if case.split == split
    ]
    if not jobs:
        raise FlapsamError(f"{path}: no case has the split '{split}'")
    return jobs


def _by_case(images: list[Path], modalities: int) -> list[Job]:
    """A job an image; where an adapter wants several modalities, files ``CASE_0000``, ``CASE_0001``, … are one case."""
    cases: dict[str, list[Path]] = {}
    for image in images:
        name = case_name(image)
        cases.setdefault(NUMBERED.sub("", name) if modalities > 1 else name, []).append(image)
    return [Job(files[0], Path(f"{name}.nii.gz"), tuple(files[1:])) for name, files in cases.items()]


def predict_images(
    trained: Trained,
    jobs: list[Job],
    output: Path,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    batch: int = 16,
    on_case: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Write a label map for each image, in the image's own grid and header geometry.

    Yields:
        The label maps' paths, each when it is written.

    Raises:
        FlapsamError: the adapter, an image or the output folder is wrong.
    """
    check_writable(output)
    set_up_torch(threads or default_threads(), deterministic=True)
    network, card = load_adapter(trained.folder, weights or backbone_of(trained))
    network.to(find_device(device))
    for job in jobs:
        volume = read_image(job.image, *job.others)
        if volume.modalities != card.samples.modalities:
            raise FlapsamError(
                f"{job.image}: it has {volume.modalities} modalities, the adapter was trained on {card.samples.modalities}"
            )
        labels = predict_volume(network, volume, card.samples, batch=batch, site=job.site)
        target = output / job.target
        write_label_like(labels, job.image, target)
        on_case()
        yield target
