"""Small sites for tests, with bright balls on a dark, noisy background."""

from pathlib import Path

import nibabel
import numpy as np
import yaml

SHAPE = (20, 16, 6)
AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])


def ball(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A label map with a ball at a random position as class 1, and its core as class 2."""
    centre = [rng.uniform(0.35, 0.65) * size for size in shape]
    grid = np.meshgrid(*[np.arange(size) for size in shape], indexing="ij")
    offsets = [(axis - middle) / (0.3 * size) for axis, middle, size in zip(grid, centre, shape, strict=True)]
    distance = np.square(offsets).sum(axis=0)
    return (distance < 1).astype(np.uint8) + (distance < 0.3).astype(np.uint8)


def load(path: Path) -> nibabel.Nifti1Image:
    image = nibabel.load(path)
    assert isinstance(image, nibabel.Nifti1Image)
    return image


def save(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def small_pair(site: Path, case: str, *, values: tuple[int, ...] = (1,), modalities: int = 1, image: str = "") -> None:
    """Create a case of a few voxels with these label values. Its image may have another name, and a fourth axis."""
    label = np.zeros((6, 5, 4), np.uint8)
    label[: len(values), 0, 0] = values
    voxels = np.random.default_rng([ord(letter) for letter in site.name + case + image]).normal(size=(6, 5, 4, modalities))
    stored = voxels if modalities > 1 else voxels[..., 0]
    save(stored.astype(np.float32), site / "images" / f"{image or case}.nii.gz")
    save(label, site / "labels" / f"{case}.nii.gz")


def make_site(folder: Path, cases: int, *, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Path:
    """Create the folder of one site. Its cases are named after it."""
    rng = np.random.default_rng(seed)
    for index in range(cases):
        label = ball(shape, rng)
        image = (100 * label + rng.normal(0, 10, shape)).astype(np.float32)
        save(image, folder / "images" / f"{folder.name}_{index}.nii.gz")
        save(label, folder / "labels" / f"{folder.name}_{index}.nii.gz")
    return folder


def make_sites(root: Path, sites: int = 2, cases: int = 4) -> Path:
    for number in range(sites):
        make_site(root / f"site_{number}", cases, seed=number)
    return root


def write_run(path: Path, data: Path, **fields: object) -> Path:
    """Write the configuration of a run that takes seconds."""
    tree = {
        "data": {"path": str(data), "labels": {"ball": 1, "core": 2}},
        "samples": {"size": 32},
        "backbone": {"name": "sam-tiny-1", "weights": "random"},
        "lora": {"rank": 2},
        "training": {"window": 1, "batch_size": 8, "warmup_steps": 2},
        "rounds": {"count": 2},
        "threads": 1,
        "output": "run",
        **fields,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path
