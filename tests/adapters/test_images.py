"""The names of the label maps that ``predict`` writes, for images that are named as in nnU-Net."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from flapsam.adapters import images
from flapsam.adapters.images import find_images
from flapsam.adapters.trained import Trained

NAMES: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    # files, what predict is given, image → name of its label map
    "a test folder of nnU-Net": (
        ["imagesTs/a_0_0000.nii.gz", "imagesTs/a_1_0000.nii.gz", "labelsTs/a_0.nii.gz"],
        ["imagesTs"],
        {"imagesTs/a_0_0000.nii.gz": "a_0", "imagesTs/a_1_0000.nii.gz": "a_1"},
    ),
    "a single file of it": (
        ["imagesTs/a_0000.nrrd", "imagesTs/b_0000.nrrd"],
        ["imagesTs/a_0000.nrrd"],
        {"imagesTs/a_0000.nrrd": "a"},
    ),
    "cases numbered from 0": (
        ["x/scan_0000.mha", "x/scan_0001.mha"],
        ["x"],
        {"x/scan_0000.mha": "scan_0000", "x/scan_0001.mha": "scan_0001"},
    ),
    "one file of cases numbered from 0": (
        ["x/scan_0000.nii.gz", "x/scan_0001.nii.gz"],
        ["x/scan_0000.nii.gz"],
        {"x/scan_0000.nii.gz": "scan_0000"},
    ),
    "beside the same name without a number": (
        ["x/a.nii.gz", "x/a_0000.nii.gz"],
        ["x"],
        {"x/a.nii.gz": "a", "x/a_0000.nii.gz": "a_0000"},
    ),
    "two folders with one name": (
        ["x/a.nii.gz", "y/a_0000.nii.gz"],
        ["x", "y"],
        {"x/a.nii.gz": "a", "y/a_0000.nii.gz": "a_0000"},
    ),
    "names that differ only in case": (
        ["x/A.nii.gz", "y/a_0000.nii.gz"],
        ["x", "y"],
        {"x/A.nii.gz": "A", "y/a_0000.nii.gz": "a_0000"},
    ),
    "sites whose label maps have no number": (
        ["s/images/a_0000.nii.gz", "s/labels/a.nii.gz"],
        ["."],
        {"s/images/a_0000.nii.gz": "s/a"},
    ),
    "sites whose label maps have the number": (
        ["s/images/a_0000.nii.gz", "s/labels/a_0000.nii.gz"],
        ["."],
        {"s/images/a_0000.nii.gz": "s/a_0000"},
    ),
    "a test folder whose label maps have the number": (
        ["imagesTs/a_0000.nii.gz", "labelsTs/a_0000.nii.gz"],
        ["imagesTs"],
        {"imagesTs/a_0000.nii.gz": "a_0000"},
    ),
    "other numbers": (
        ["x/a_0001.nii.gz", "x/b_00000.nii.gz"],
        ["x"],
        {"x/a_0001.nii.gz": "a_0001", "x/b_00000.nii.gz": "b_00000"},
    ),
    "nothing but the number": (["x/_0000.nii.gz"], ["x"], {"x/_0000.nii.gz": "_0000"}),
}


@pytest.mark.parametrize(("files", "given", "expected"), NAMES.values(), ids=NAMES)
def test_the_label_map_of_case_0000_is_called_case(
    files: list[str], given: list[str], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _card(monkeypatch, modalities=1)
    _create(tmp_path, files)
    jobs, _ = find_images([tmp_path / path for path in given], Trained(tmp_path, None))
    found = {Path(str(job.image)).relative_to(tmp_path).as_posix(): job.stem.as_posix() for job in jobs}
    assert found == expected
    assert not any(job.fault for job in jobs)


def test_numbers_of_several_modalities_are_left_out_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _card(monkeypatch, modalities=2)
    _create(tmp_path, ["x/scan_0000.nii.gz", "x/scan_0001.nii.gz"])
    (job,), _ = find_images([tmp_path / "x"], Trained(tmp_path, None))
    assert (job.stem.as_posix(), len(job.others)) == ("scan", 1)


def _card(monkeypatch: pytest.MonkeyPatch, modalities: int) -> None:
    card = SimpleNamespace(samples=SimpleNamespace(modalities=modalities))
    monkeypatch.setattr(images, "read_card", lambda folder: card)


def _create(root: Path, files: list[str]) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
