"""The Python API: a volume in the form of any library, the label map in the same form and place."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.io.array import LoadImage

import flapsam
from flapsam.base.errors import FlapsamError
from flapsam.learning.inference import PredictionOptions
from flapsam.volumes import volume_of
from tests.adapters.test_predict import anatomy, oblique
from tests.helpers.adapters import saved_lively
from tests.helpers.command import flapsam as command
from tests.helpers.dicom import save_series
from tests.helpers.docs import DOCS, PAGES, blocks
from tests.helpers.sites import AFFINE, load, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> flapsam.Model:
    return flapsam.load(saved_lively(tmp_path_factory.mktemp("adapter")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(anatomy(oblique()).array, tmp_path / "image.nii.gz", oblique())


@pytest.fixture
def expected(model: flapsam.Model, path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> np.ndarray:
    """What the command line says, which another test compares with how the volume is stored."""
    adapter = saved_lively(tmp_path / "adapter")
    assert command(capfd, "predict", adapter, path, "-o", tmp_path / "out", "--threads", "2").code == 0
    labels = np.asanyarray(load(tmp_path / "out" / path.name).dataobj)
    assert set(np.unique(labels)) == {0, 1, 2}
    return labels


def test_a_path_and_an_array(model: flapsam.Model, path: Path, expected: np.ndarray):
    image = load(path)
    for labels in (model.predict(path), model.predict(str(path)), model.predict(image.get_fdata(), image.affine)):
        assert isinstance(labels, np.ndarray)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected)


def test_a_folder_of_dicom_files(model: flapsam.Model, tmp_path: Path):
    image = anatomy(oblique() @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    save_series(tmp_path / "ct", image.array, image.affine)
    expected = model.predict(image.array, image.affine)
    np.testing.assert_array_equal(model.predict(tmp_path / "ct"), expected)
    save_series(tmp_path / "ct", image.array, image.affine, series="other")
    with pytest.raises(FlapsamError, match=r"there is 2 DICOM series: 3 .* one series is needed"):
        model.predict(tmp_path / "ct")
    with pytest.raises(FlapsamError, match="there is no DICOM image"):
        model.predict(tmp_path)


def test_nibabel(model: flapsam.Model, path: Path, expected: np.ndarray, tmp_path: Path):
    image = load(path)
    labels = model.predict(image)
    nibabel.save(labels, tmp_path / "labels.nii.gz")
    again = load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(again.dataobj), expected)
    np.testing.assert_array_equal(again.affine, image.affine)
    assert again.get_data_dtype() == np.uint8
    voxels: Any = image.get_fdata(dtype=np.float32)
    assert isinstance(model.predict(nibabel.MGHImage(voxels, image.affine)), nibabel.Nifti1Image)


def test_simpleitk(model: flapsam.Model, path: Path, expected: np.ndarray):
    image = sitk.ReadImage(str(path))
    labels = model.predict(image)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(labels).transpose(), expected)
    assert (labels.GetOrigin(), labels.GetSpacing()) == (image.GetOrigin(), image.GetSpacing())
    assert labels.GetDirection() == image.GetDirection()


@pytest.mark.parametrize("channel_first", [False, True])
def test_metatensor(channel_first: bool, model: flapsam.Model, path: Path, expected: np.ndarray):
    image = LoadImage(ensure_channel_first=channel_first)(path)
    labels = model.predict(image)
    assert isinstance(image, MetaTensor)
    assert isinstance(labels, MetaTensor)
    assert labels.shape == image.shape
    assert torch.equal(labels.affine, image.affine)
    np.testing.assert_array_equal(labels.numpy().squeeze(), expected)


def test_a_metatensor_in_dicoms_world(path: Path):
    image = LoadImage()(path)
    assert isinstance(image, MetaTensor)
    flipped = torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=image.affine.dtype)) @ image.affine
    turned = MetaTensor(image.as_tensor(), meta={"space": "LPS", "affine": flipped})
    np.testing.assert_allclose(volume_of(turned).affine, volume_of(image).affine)


def test_several_modalities_in_every_form():
    array = np.random.default_rng(0).normal(size=(5, 4, 3, 2)).astype(np.float32)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0, 3), isVector=True)
    for volume in (
        volume_of(array, AFFINE),
        volume_of(nibabel.Nifti1Image(array, AFFINE)),
        volume_of(MetaTensor(torch.from_numpy(array.transpose(3, 0, 1, 2)), affine=torch.from_numpy(AFFINE))),
        volume_of(image),
    ):
        assert volume.modalities == 2
        np.testing.assert_array_equal(volume.array, array)


WRONG = {
    "no affine": ((np.zeros((4, 4, 4)),), "give its affine"),
    "half an affine": ((np.zeros((4, 4, 4)), np.eye(3)), r"of shape \(4, 4\), this one is \(3, 3\)"),
    "singular": ((np.zeros((4, 4, 4)), np.zeros((4, 4))), "the affine is singular"),
    "flat": ((np.zeros((4, 4)), np.eye(4)), "a 3-D volume of up to three modalities is needed"),
    "not a number": ((np.full((4, 4, 4), np.nan), np.eye(4)), "64 voxels are NaN or infinite"),
    "complex": ((np.zeros((4, 4, 4), complex), np.eye(4)), "one plain number a voxel"),
    "a list": (([[[1]]],), "a list is no volume: give a path"),
    "a tensor": ((torch.zeros(4, 4, 4),), "a Tensor is no volume"),
    "two modalities": ((np.zeros((4, 4, 4, 2)), np.eye(4)), "it has 2 modalities, the adapter was trained on 1"),
    "no such file": (("nowhere.nii.gz",), "no such file"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_volume(arguments: tuple, message: str, model: flapsam.Model):
    with pytest.raises(FlapsamError, match=message):
        model.predict(*arguments)


def test_options(model: flapsam.Model, path: Path):
    plain, turned = model.predict(path), model.predict(path, flips="x")
    assert not np.array_equal(plain, turned)
    found = model.segment(volume_of(load(path)), PredictionOptions(probabilities=True))
    assert found.probabilities is not None
    np.testing.assert_array_equal(found.labels, plain)
    assert [(segment.value, segment.name) for segment in model.legend] == [(1, "kidney"), (2, "tumour")]


def test_precision_is_full_on_a_cpu_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = saved_lively(tmp_path)
    monkeypatch.setattr("flapsam.adapters.model.fastest_precision", lambda network: "bf16")
    assert flapsam.load(adapter).precision == "fp32"
    assert flapsam.load(adapter, precision="auto").precision == "bf16"
    assert flapsam.load(adapter, precision="fp16").precision == "fp16"


def test_an_adapter_that_is_none(tmp_path: Path):
    with pytest.raises(FlapsamError, match="neither an adapter nor a finished run"):
        flapsam.load(tmp_path)


def test_the_readmes_and_the_pages_lines_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (short,) = blocks(PAGES[0], "python")
    (long,) = blocks(DOCS / "volumes.md", "python")
    assert short.section == long.section == "In Python"
    assert len([line for line in short.text.splitlines() if line]) == 5
    saved_lively(tmp_path / "runs" / "run")
    path.rename(tmp_path / "ct.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "ct.nii.gz")), str(tmp_path / "ct.nrrd"))
    monkeypatch.chdir(tmp_path)
    exec(short.text, {})
    assert set(np.unique(np.asanyarray(load(tmp_path / "labels.nii.gz").dataobj))) == {0, 1, 2}
    known: dict[str, Any] = {}
    for line in long.text.splitlines():
        exec(line, known)
        if line.startswith("labels"):
            assert type(known["labels"]).__name__ == line.rpartition("# ")[2].rpartition(".")[2]


def test_import_is_quick():
    code = "import time; t = time.perf_counter(); import flapsam; print(time.perf_counter() - t)"
    assert float(subprocess.check_output([sys.executable, "-c", code])) < 0.3
