"""Write a run's configuration for a folder of data, making every choice that the files themselves can settle."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml

from flapsam.base.device import set_up_torch
from flapsam.base.environment import default_threads
from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.experiments.settings import SETTINGS, read_settings
from flapsam.federation.traffic import predict_traffic
from flapsam.learning.memory import windows_that_fit
from flapsam.learning.training import Learner, loss_of
from flapsam.run.config import ClassValues, Data, RunConfig
from flapsam.run.observer import Observer
from flapsam.run.reading import read_config, validated
from flapsam.sam import Sam, assemble_run
from flapsam.sites import Case, Site, find_dataset, read_sites
from flapsam.sites.differences import label_notes, modality_problems, name_notes, unknown_values
from flapsam.sites.pairs import read_files
from flapsam.volumes import CANONICAL_AXES, Volume

AIR = -500
"""Intensity, in Hounsfield units, below which only CT has values."""
STEPS = 25
"""Minimum number of steps that a round should have at a site. In fewer steps, a model learns little."""
SMALL, LARGE = 128, 224
"""Sides of the network's input."""


@dataclass(frozen=True)
class Look:
    """What the files of a data set show."""

    sites: list[Site]
    layout: str
    labels: dict[str, ClassValues]
    spacing: tuple[float, ...]
    """Median over the cases, in mm, along the canonical axes."""
    shape: tuple[float, ...]
    """Median over the cases, in voxels, along the canonical axes."""
    ct: bool
    foreground: tuple[float, float] | None
    """The 0.5th and 99.5th percentiles of the intensities inside the classes."""
    occupied: float
    """Fraction of the slices along the axis of the largest spacing that hold a class."""
    notes: list[str]
    """What a run would refuse or do without a word unless the configuration is edited, one sentence each."""

    @property
    def axis(self) -> str:
        """Orientation of the slices: across the axis of largest spacing, or axial if the spacing is nearly isotropic."""
        names = list(CANONICAL_AXES)
        anisotropic = max(self.spacing) >= 1.2 * min(self.spacing)
        return names[int(np.argmax(self.spacing))] if anisotropic else "axial"

    @property
    def plane(self) -> tuple[float, float]:
        """Median shape of a slice."""
        first, second = (length for name, length in zip(CANONICAL_AXES, self.shape, strict=True) if name != self.axis)
        return first, second

    @property
    def slices(self) -> float:
        """Median number of slices of a case."""
        return self.shape[CANONICAL_AXES[self.axis]]

    @property
    def cases(self) -> int:
        """Number of cases at all sites together."""
        return sum(len(site.cases) for site in self.sites)


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a run on this machine."""

    seconds: float
    """Seconds of all fits, one after another."""
    bytes_a_site: float
    """Bytes that a site sends and receives over all rounds, compressed by the run's codec."""
    windows: int
    """Number of a batch's windows that fit into memory at once."""


def initialise(path: Path, target: Path, observer: Observer) -> tuple[Look, Estimate]:
    """Inspect a data set and write a configuration for it.

    Args:
        path: the data's folder.
        target: the configuration's file.
        observer: follows the cases.

    Returns:
        What the files show, and the estimated cost of the run.

    Raises:
        FlapsamError: the data are wrong, or the file already exists.
    """
    if target.exists():
        raise FlapsamError(f"{target}: already exists; remove it, or name another file with --output")
    seen = look(path, observer)
    tree = settings_for(seen)
    place = (
        os.path.relpath(path, target.parent) if path.resolve().is_relative_to(target.parent.resolve()) else path.resolve()
    )
    tree["data"] = {"path": str(place), **tree["data"]}
    # The file is read as `flapsam simulate` reads it, so that a configuration that does not work is never left behind.
    write_text(target, yaml.safe_dump(tree, sort_keys=False))
    try:
        config = read_config(target)
        estimate = estimate_of(config, seen)
        tree["training"] |= {"micro_batch": estimate.windows} if estimate.windows < config.training.batch_size else {}
        write_text(target, commented(tree, seen, estimate))
    except BaseException:
        target.unlink()
        raise
    return seen, estimate


def look(path: Path, observer: Observer) -> Look:
    """Read every case once and collect what its files show.

    Args:
        path: the data's folder.
        observer: follows the cases.

    Raises:
        FlapsamError: a case cannot be read, which ``flapsam data check`` lists, or the cases differ in their modalities.
    """
    dataset = find_dataset(path)
    labels: dict[str, ClassValues] = dict(dataset.labels(path))
    data = validated({"path": path, "labels": labels or {"any": 1}}, Data, str(path))
    sites = read_sites(data, 0)
    cases = [case for site in sites for case in site.cases]
    spacings, shapes, lows, inside, occupied = [], [], [], [], []
    values: dict[str, set[int]] = {site.name: set() for site in sites}
    modalities: dict[Case, int] = {}
    rng = np.random.default_rng(0)
    observer.begin("cases", len(cases))
    for case in cases:
        image, label = read_files(case)
        canonical, truth = image.to_canonical(), Volume(label.array, label.affine).to_canonical().array
        spacings.append(canonical.spacing)
        shapes.append(canonical.array.shape[:3])
        lows.append(float(canonical.array.min()))
        values[case.site] |= set(np.unique(truth).tolist()) - {0}
        modalities[case] = image.modalities
        voxels = canonical.array[truth > 0]
        if len(voxels):
            inside.append(rng.choice(voxels.ravel(), 1000))
        across = tuple(axis for axis in range(3) if axis != int(np.argmax(canonical.spacing)))
        occupied.append(float((truth > 0).any(axis=across).mean()))
        observer.step()
    observer.end()
    notes = [
        *name_notes(cases),
        *(unknown_values(values, data) if labels else []),
        *label_notes(values, data if labels else None),
    ]
    if problems := modality_problems(modalities):
        raise FlapsamError("; ".join([*problems, *notes]))
    percentiles = np.percentile(np.concatenate(inside), [0.5, 99.5]) if inside else None
    return Look(
        sites=sites,
        layout=dataset.name,
        labels=labels or {f"label_{value}": value for value in sorted(set().union(*values.values()))},
        spacing=tuple(median(column) for column in zip(*spacings, strict=True)),
        shape=tuple(median(column) for column in zip(*shapes, strict=True)),
        ct=median(lows) < AIR,
        foreground=None if percentiles is None else (float(percentiles[0]), float(percentiles[1])),
        occupied=sum(occupied) / len(occupied),
        notes=notes,
    )


def settings_for(seen: Look) -> dict[str, Any]:
    """The fields of a run on these data, except the data's path.

    Raises:
        FlapsamError: no label map holds any class.
    """
    if not seen.labels:
        raise FlapsamError("no label map holds a value above 0, so there is nothing to learn")
    data: dict[str, Any] = {"labels": seen.labels}
    subjects = len({case.subject for site in seen.sites for case in site.cases})
    if len(seen.sites) == 1 and subjects >= 8:
        data["simulated_sites"] = min(subjects // 4, 3)
    longer, shorter = max(seen.plane), min(seen.plane)
    samples: dict[str, Any] = {"size": SMALL if longer <= 1.25 * SMALL else LARGE, "axis": seen.axis}
    if seen.layout in SETTINGS:
        known = read_settings(seen.layout, Path())
        samples |= known.samples.model_dump(
            mode="json", exclude_defaults=True, include={"clip", "site_clip", "clip_percentile"}
        )
        data["layout"] = seen.layout
    elif seen.ct and seen.foreground:
        low, high = seen.foreground
        samples["clip"] = [int(np.floor(low)), int(np.ceil(max(high, low + 1)))]
    if longer > 1.5 * shorter:
        samples["resize"] = "pad"
    shown = _shown(seen, data.get("simulated_sites", len(seen.sites)))
    return {
        "preset": "fast",
        "data": data,
        "samples": samples,
        "backbone": {"name": "sam-tiny"},
        "training": {"batch_size": int(np.clip(round(shown / STEPS), 4, 12))},
        "rounds": {"count": 20},
        "modes": ["federated"],
    }


def estimate_of(config: RunConfig, seen: Look) -> Estimate:
    """Estimate a run's time from one measured step of its network, and its traffic from the size of its packets."""
    set_up_torch(config.threads or default_threads(), deterministic=config.deterministic, precision=config.precision)
    network = assemble_run(config).network
    windows = windows_that_fit(network, config.training)
    sites = config.data.simulated_sites or len(seen.sites)
    steps = sites * max(_shown(seen, sites) / config.training.batch_size, 1) * config.rounds.count * config.training.epochs
    traffic = predict_traffic(config)[0]
    seconds = steps * _seconds_a_step(network, config, min(windows, config.training.batch_size))
    return Estimate(seconds, traffic.up + traffic.down, windows)


def commented(tree: Mapping[str, Any], seen: Look, estimate: Estimate) -> str:
    """The configuration as YAML, with the reason for each choice as a comment beside it."""
    sites = tree["data"].get("simulated_sites", len(seen.sites))
    spacing = " × ".join(f"{value:.3g}" for value in seen.spacing)
    why = {
        "preset": "trains fastest; `paper` has the paper's values",
        "simulated_sites": "the data come from one site, so subjects are split at random; data.table can name real sites",
        "labels": "class: its value or values in the label maps" + ("; give them names" if "label_1" in seen.labels else ""),
        "size": f"side of the network's input; a slice has about {seen.plane[0]:g} × {seen.plane[1]:g} voxels",
        "axis": f"the slices lie in this plane; the median spacing is {spacing} mm (left-right, front-back, head-foot)",
        "clip": "CT, so from the 0.5th to the 99.5th percentile of the intensities inside the classes"
        if seen.layout not in SETTINGS
        else "as in the paper",
        "resize": "keeps proportions, because slices are much longer than they are wide",
        "name": "ships with flapsam; published ones are lite-medsam, with size 112, and sam-vit-b, with 224 (first run "
        "`flapsam backbone get NAME`)",
        "batch_size": f"slices per step, 4 to 12; aims at {STEPS} or more steps in a round at a site",
        "micro_batch": "slices of a batch that fit into memory at once",
        "count": "rounds of one local epoch each",
        "modes": "add local (each site alone) and centralised (pooled data) to compare with",
    }
    lines = [
        f"# {seen.cases} cases at {sites} sites. Estimate: about {minutes(estimate.seconds)} of training on this machine,",
        f"# and {estimate.bytes_a_site / 2**20:.1f} MiB of traffic per site in all. `flapsam data check` checks the data.",
        *(f"# Note: {note}." for note in seen.notes),
    ]
    for key, value in tree.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [_line(name, part, why, "  ") for name, part in value.items()]
        else:
            lines.append(_line(key, value, why, ""))
    return "\n".join(lines) + "\n"


def minutes(seconds: float) -> str:
    """A duration in words, in minutes or hours."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} hours"
    count = max(round(seconds / 60), 1)
    return f"{count} minute{'s' if count > 1 else ''}"


def _line(key: str, value: Any, why: Mapping[str, str], indent: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()
    return f"{indent}{key}: {text}" + (f"  # {why[key]}" if key in why else "")


def _shown(seen: Look, sites: int) -> float:
    """Estimated number of slices that a site trains on per epoch."""
    training = seen.cases * 0.8 * 0.85 / sites
    return training * seen.slices * (seen.occupied + 0.25 * (1 - seen.occupied))


def _seconds_a_step(network: Sam, config: RunConfig, slices: int) -> float:
    """Seconds per step of a whole batch, measured on ``slices`` slices. The first of two steps only warms up."""
    learner = Learner(network, config.training)
    images = torch.rand(slices, 3, network.image_size, network.image_size)
    labels = torch.zeros(slices, network.image_size, network.image_size, dtype=torch.int64)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        loss_of(network, (images, labels), network.pixel_mean.device, config.training, config.precision).total.backward()
        learner.optimizer.step()
        seconds = time.perf_counter() - began
    return seconds * config.training.batch_size / slices
