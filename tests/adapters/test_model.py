"""The Python API: it takes the volumes of several libraries, and returns label maps of the same type and geometry."""

import json
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
from tests.helpers.adapters import saved, saved_lively
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
    """The label map from the command line. Other tests check it for every stored orientation."""
    adapter = saved_lively(tmp_path / "adapter")
    assert command(capfd, "predict", adapter, path, "-o", tmp_path / "out", "--threads", "2").code == 0
    labels = np.asanyarray(load(tmp_path / "out" / path.name).dataobj)
    assert set(np.unique(labels)) == {0, 1, 2}
    return labels


def test_a_path_and_an_array_have_the_same_label_map(model: flapsam.Model, path: Path, expected: np.ndarray):
    image = load(path)
    for labels in (model.predict(path), model.predict(str(path)), model.predict(image.get_fdata(), image.affine)):
        assert isinstance(labels, np.ndarray)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected)


def test_a_folder_of_dicom_files_must_hold_one_series(model: flapsam.Model, tmp_path: Path):
    image = anatomy(oblique() @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    save_series(tmp_path / "ct", image.array, image.affine)
    expected = model.predict(image.array, image.affine)
    np.testing.assert_array_equal(model.predict(tmp_path / "ct"), expected)
    save_series(tmp_path / "ct", image.array, image.affine, series="other")
    with pytest.raises(FlapsamError, match=r"holds 2 DICOM series \(3 .* exactly one series is needed"):
        model.predict(tmp_path / "ct")
    with pytest.raises(FlapsamError, match=r"holds 2 DICOM series"):
        model.predict(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlapsamError, match="holds no DICOM image"):
        model.predict(tmp_path / "empty")


def test_a_nibabel_image_has_a_nibabel_label_map(model: flapsam.Model, path: Path, expected: np.ndarray, tmp_path: Path):
    image = load(path)
    labels = model.predict(image)
    nibabel.save(labels, tmp_path / "labels.nii.gz")
    reread = load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(reread.dataobj), expected)
    np.testing.assert_array_equal(reread.affine, image.affine)
    assert reread.get_data_dtype() == np.uint8
    voxels: Any = image.get_fdata(dtype=np.float32)
    assert isinstance(model.predict(nibabel.MGHImage(voxels, image.affine)), nibabel.Nifti1Image)


def test_a_simpleitk_image_has_a_simpleitk_label_map(model: flapsam.Model, path: Path, expected: np.ndarray):
    image = sitk.ReadImage(str(path))
    labels = model.predict(image)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(labels).transpose(), expected)
    assert (labels.GetOrigin(), labels.GetSpacing()) == (image.GetOrigin(), image.GetSpacing())
    assert labels.GetDirection() == image.GetDirection()


@pytest.mark.parametrize("channel_first", [False, True])
def test_a_metatensor_has_a_metatensor_label_map(
    channel_first: bool, model: flapsam.Model, path: Path, expected: np.ndarray
):
    image = LoadImage(ensure_channel_first=channel_first)(path)
    labels = model.predict(image)
    assert isinstance(image, MetaTensor)
    assert isinstance(labels, MetaTensor)
    assert labels.shape == image.shape
    assert torch.equal(labels.affine, image.affine)
    np.testing.assert_array_equal(labels.numpy().squeeze(), expected)


def test_a_metatensor_may_be_in_lps_space(path: Path):
    image = LoadImage()(path)
    assert isinstance(image, MetaTensor)
    flipped = torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=image.affine.dtype)) @ image.affine
    in_lps = MetaTensor(image.as_tensor(), meta={"space": "LPS", "affine": flipped})
    np.testing.assert_allclose(volume_of(in_lps).affine, volume_of(image).affine)


def test_every_type_may_hold_several_modalities():
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
    "half an affine": ((np.zeros((4, 4, 4)), np.eye(3)), r"the affine has shape \(3, 3\); an affine of shape \(4, 4\)"),
    "singular": ((np.zeros((4, 4, 4)), np.zeros((4, 4))), "the affine is singular"),
    "flat": ((np.zeros((4, 4)), np.eye(4)), "a 3-D volume with up to three modalities is needed"),
    "not a number": ((np.full((4, 4, 4), np.nan), np.eye(4)), "64 voxels are NaN or infinite"),
    "complex": ((np.zeros((4, 4, 4), complex), np.eye(4)), "one plain number per voxel"),
    "a list": (([[[1]]],), "a list is not a volume; give a path"),
    "a tensor": ((torch.zeros(4, 4, 4),), "a Tensor is not a volume"),
    "two modalities": ((np.zeros((4, 4, 4, 2)), np.eye(4)), "the image has 2 modalities, but the adapter was trained on 1"),
    "no such file": (("nowhere.nii.gz",), "no such file"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_an_invalid_volume_is_refused(arguments: tuple, message: str, model: flapsam.Model):
    with pytest.raises(FlapsamError, match=message):
        model.predict(*arguments)


def test_options_of_the_prediction_take_effect(model: flapsam.Model, path: Path):
    plain, flipped = model.predict(path), model.predict(path, flips="x")
    assert not np.array_equal(plain, flipped)
    prediction = model.segment(volume_of(load(path)), PredictionOptions(probabilities=True))
    assert prediction.probabilities is not None
    np.testing.assert_array_equal(prediction.labels, plain)
    assert [(segment.value, segment.name) for segment in model.legend] == [(1, "kidney"), (2, "tumour")]


def test_precision_is_full_on_a_cpu_unless_chosen_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = saved_lively(tmp_path)
    assert [flapsam.load(adapter, precision=name).precision for name in (None, "auto")] == ["fp32", "fp32"]
    monkeypatch.setattr("flapsam.adapters.model.usual_precision", lambda device: "bf16")
    assert flapsam.load(adapter).precision == "bf16"
    assert flapsam.load(adapter, precision="fp16").precision == "fp16"


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path):
    with pytest.raises(FlapsamError, match="neither an adapter nor a finished run"):
        flapsam.load(tmp_path)


def test_the_examples_in_the_readme_and_the_docs_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    names: dict[str, Any] = {}
    for line in long.text.splitlines():
        exec(line, names)
        if line.startswith("labels"):
            assert type(names["labels"]).__name__ == line.rpartition("# ")[2].rpartition(".")[2]


def test_the_import_takes_less_than_300_ms():
    code = "import time; t = time.perf_counter(); import flapsam; print(time.perf_counter() - t)"
    assert float(subprocess.check_output([sys.executable, "-c", code])) < 0.3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("lora", "rank"), 10**6, "they have another rank than 1000000"),
        (("samples", "size"), 2**40, "it describes a network that is far too large"),
        (("classes",), [f"class {n}" for n in range(1000)], "it describes a network that is far too large"),
    ],
)
def test_a_description_of_a_huge_network_takes_no_memory(field: tuple, value: object, message: str, tmp_path: Path):
    card = saved(tmp_path) / "flapsam.json"
    description = json.loads(card.read_text())
    place = description
    for name in field[:-1]:
        place = place[name]
    place[field[-1]] = value
    card.write_text(json.dumps(description))
    with pytest.raises(FlapsamError, match=message):
        flapsam.load(tmp_path)
