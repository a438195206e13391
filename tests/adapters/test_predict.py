"""``flapsam predict`` on the images that users have in practice."""

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel import orientations

from flapsam.adapters.model import Model
from flapsam.learning.cleaning import fill_holes, keep_largest
from flapsam.volumes import Volume, read_label
from tests.helpers.adapters import saved_lively
from tests.helpers.command import flapsam
from tests.helpers.dicom import changed, save_enhanced, save_series
from tests.helpers.sites import AFFINE, load, save
from tests.volumes.test_formats import save_as
from tests.volumes.test_volumes import ORIENTATIONS, stored_as

SHAPE = (18, 20, 8)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_lively(tmp_path_factory.mktemp("adapter"))


def anatomy(affine: np.ndarray = AFFINE) -> Volume:
    """Smooth blobs in Hounsfield units, in which the test adapter finds every class."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), 2)
    return Volume((200 * noise / noise.std()).round().astype(np.int16), affine)


def oblique() -> np.ndarray:
    """An affine rotated about two axes, with a spacing of 0.7 × 0.9 × 3.1 mm."""
    c, s = np.cos(0.3), np.sin(0.3)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(0.1), -np.sin(0.1)], [0, np.sin(0.1), np.cos(0.1)]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([0.7, 0.9, 3.1])
    affine[:3, 3] = -12.3, 45.6, 7.8
    return affine


def in_world(path: Path) -> np.ndarray:
    """The voxels of a label map, reoriented to the world axes."""
    volume = read_label(path)
    return orientations.apply_orientation(volume.array, orientations.io_orientation(volume.affine))


def predict(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    outcome = flapsam(capfd, "predict", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.mark.parametrize(
    "affine", [AFFINE, oblique(), np.diag([1.5, 1.0, 1.0, 1.0])], ids=["straight", "oblique", "sagittal"]
)
def test_the_label_map_is_the_same_for_every_stored_orientation(affine: np.ndarray, adapter: Path, tmp_path: Path, capfd):
    for codes in ORIENTATIONS:
        stored = stored_as(codes, anatomy(affine))
        for end in (".nii.gz", ".nrrd", ".mha"):
            save_as(stored, tmp_path / "in" / f"{codes}{end.replace('.', '_')}{end}")
    predict(capfd, adapter, tmp_path / "in", "-o", tmp_path / "out")
    written = sorted(path for path in (tmp_path / "out").iterdir() if path.name.startswith(tuple(ORIENTATIONS)))
    assert len(written) == 3 * len(ORIENTATIONS)
    expected = in_world(written[0])
    assert set(np.unique(expected)) == {0, 1, 2}
    for path in written:
        np.testing.assert_array_equal(in_world(path), expected, err_msg=path.name)
    for codes in ORIENTATIONS:
        before, after = tmp_path / "in" / f"{codes}_nii_gz.nii.gz", tmp_path / "out" / f"{codes}_nii_gz.nii.gz"
        np.testing.assert_array_equal(load(after).affine, load(before).affine)


def test_dicom_and_its_conversion_to_nifti_have_the_same_label_map(adapter: Path, tmp_path: Path, capfd):
    # Slices of a series run from feet to head along their normal, rows to the left and columns to the back.
    image = anatomy(oblique() @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    save_series(tmp_path / "in" / "series", image.array, image.affine, order=[3, 1, 5, 0, 2, 4, 7, 6])
    save_enhanced(tmp_path / "in" / "enhanced.dcm", image.array, image.affine, [4, 2, 0, 1, 5, 3, 6, 7])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "in" / "series")))
    sitk.WriteImage(reader.Execute(), str(tmp_path / "in" / "converted.nii.gz"))
    predict(capfd, adapter, tmp_path / "in", "-o", tmp_path / "out")
    expected = in_world(tmp_path / "out" / "converted.nii.gz")
    assert set(np.unique(expected)) == {0, 1, 2}
    for name in ("series", "enhanced"):
        np.testing.assert_array_equal(in_world(tmp_path / "out" / f"{name}.nii.gz"), expected)
        segmentation = pydicom.dcmread(tmp_path / "out" / f"{name}.seg.dcm")
        assert [s.SegmentLabel for s in segmentation.SegmentSequence] == ["kidney", "tumour"]
        assert segmentation.pixel_array.sum() == (expected > 0).sum()
    ours, converted = (read_label(tmp_path / "out" / f"{name}.nii.gz").affine for name in ("series", "converted"))
    np.testing.assert_allclose(ours, converted, atol=1e-4)


def test_images_are_found_in_files_folders_trees_and_lists(adapter: Path, tmp_path: Path, capfd, monkeypatch):
    image = anatomy()
    for path in ("in/a/one.nii.gz", "in/a/b/two.nrrd", "in/labels/truth.nii.gz", "other/three.mha", "out/in/four.nii.gz"):
        save_as(image, tmp_path / path)
    save_series(tmp_path / "in" / "patient" / "ct", image.array, image.affine)
    for name in ("segmentation.nii.gz", "one_label.nii.gz", "two-seg.nrrd", "two.seg.nrrd", "one_mask.nii"):
        save_as(image, tmp_path / "in" / "a" / name)
    (tmp_path / "in" / "notes.csv").write_text("not an image\n")
    (tmp_path / "list.txt").write_text("other/three.mha\n\nin/a\n")

    def stems(*arguments: str | Path) -> list[str]:
        result = predict(capfd, adapter, *arguments, "-o", tmp_path / "out")
        return sorted(str(Path(entry["written"][0]).relative_to(tmp_path / "out")) for entry in result["images"])

    assert stems(tmp_path / "in" / "a" / "one.nii.gz") == ["one.nii.gz"]
    assert stems(tmp_path / "in") == ["a/b/two.seg.nrrd", "a/one.nii.gz", "patient/ct.nii.gz"]
    assert stems(tmp_path / "list.txt") == ["b/two.seg.nrrd", "one.nii.gz", "three.mha"]
    assert stems(tmp_path / "in" / "a", tmp_path / "other") == ["b/two.seg.nrrd", "one.nii.gz", "three.mha"]
    # The output folder, which contains label maps by now, is not searched under any path. No folder is searched twice.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "a" / "b" / "again").symlink_to(tmp_path / "in")
    assert len(stems(tmp_path)) == 4
    assert len(predict(capfd, adapter, ".", "-o", "in/../out")["images"]) == 4


def test_one_of_several_series_must_be_chosen(adapter: Path, tmp_path: Path, capfd):
    image = anatomy()
    for name in ("T1 axial", "T2 axial"):
        save_series(tmp_path / "in", image.array, image.affine, series=name)

    def written(*arguments: str) -> set[str]:
        result = predict(capfd, adapter, tmp_path / "in", "-o", tmp_path / "out", "--no-dicom-seg", *arguments)
        return {Path(path).name for path in result["written"]}

    outcome = flapsam(capfd, "predict", adapter, tmp_path / "in", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "2 series in one folder: 3 'T1 axial' (8 files), 3 'T2 axial' (8 files); choose with --series" in outcome.err
    assert written("--series", "*t2*") == {"3_T2_axial.nii.gz"}
    assert written("--series", "*") == {"3_T1_axial.nii.gz", "3_T2_axial.nii.gz"}


def test_a_file_that_is_not_an_image_is_reported(adapter: Path, tmp_path: Path, capfd):
    save_series(tmp_path / "in", anatomy().array[..., :1], AFFINE)
    report, notes = next((tmp_path / "in").iterdir()), tmp_path / "notes.csv"
    changed(report, lambda header: setattr(header, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.88.11"))
    notes.write_text("a,b\n")
    outcome = flapsam(capfd, "predict", adapter, report, notes, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert f"{report}: holds no DICOM image" in outcome.err
    assert f"{notes}: not an image format that flapsam reads" in outcome.err


def test_volumes_are_reported_in_millilitres(adapter: Path, tmp_path: Path, capfd):
    save_as(anatomy(oblique()), tmp_path / "in" / "one.nii.gz")
    result = predict(capfd, adapter, tmp_path / "in", "-o", tmp_path / "out")
    labels = np.asanyarray(load(tmp_path / "out" / "one.nii.gz").dataobj)
    with (tmp_path / "out" / "volumes.csv").open() as file:
        (row,) = csv.DictReader(file)
    for value, name in ((1, "kidney"), (2, "tumour")):
        ml = (labels == value).sum() * 0.7 * 0.9 * 3.1 / 1000
        assert float(row[f"{name} (ml)"]) == pytest.approx(ml, abs=1e-5)
        assert result["images"][0]["ml"][name] == pytest.approx(ml, abs=1e-5)
    assert (row["case"], row["label_map"]) == ("one", "one.nii.gz")


def test_resume_skips_label_maps_made_in_the_same_way(adapter: Path, tmp_path: Path, capfd):
    for name in "abc":
        save_as(anatomy(), tmp_path / "in" / f"{name}.nii.gz")
    out = tmp_path / "out"

    def rewritten(*arguments: str) -> set[str]:
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
        result = predict(capfd, adapter, tmp_path / "in", "-o", out, *arguments)
        assert len(result["written"]) == 3
        assert len((out / "volumes.csv").read_text().splitlines()) == 4
        return {path.name[0] for path in out.glob("*.nii.gz") if path.stat().st_mtime_ns != before.get(path.name)}

    assert rewritten() == {"a", "b", "c"}
    assert rewritten("--resume") == set()
    (out / "b.nii.gz").unlink()
    assert rewritten("--resume") == {"b"}
    save_as(Volume(anatomy().array[::-1], AFFINE), tmp_path / "in" / "c.nii.gz")
    assert rewritten("--resume") == {"c"}
    assert rewritten("--resume", "--fill") == {"a", "b", "c"}
    # This is how a crash truncates the last line of the ledger.
    ledger = out / "predictions.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-20])
    assert rewritten("--resume", "--fill") == {"c"}
    assert rewritten() == {"a", "b", "c"}


def test_an_interruption_keeps_the_finished_label_maps(adapter: Path, tmp_path: Path, capfd, monkeypatch):
    for name in "abcd":
        save_as(anatomy(), tmp_path / "in" / f"{name}.nii.gz")
    segment, calls = Model.segment, []

    def interrupted(model: Model, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return segment(model, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "segment", interrupted)
        outcome = flapsam(capfd, "predict", adapter, tmp_path / "in", "-o", tmp_path / "out")
    assert outcome.code == 130
    assert "add --resume to continue" in outcome.err
    assert (tmp_path / "out" / "volumes.csv").read_text().count("\n") == 3
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii.gz")}
    assert set(before) == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}
    predict(capfd, adapter, tmp_path / "in", "-o", tmp_path / "out", "--resume")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii.gz")}
    assert {name for name in after if after[name] == before.get(name)} == {"a.nii.gz", "b.nii.gz"}
    assert len(after) == 4


def test_two_images_with_the_same_output_path_are_reported(adapter: Path, tmp_path: Path, capfd):
    save_as(anatomy(), tmp_path / "in" / "a.nii.gz")
    save_as(anatomy(), tmp_path / "in" / "a.nrrd")
    outcome = flapsam(capfd, "predict", adapter, tmp_path / "in", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "a.nrrd: its label map would overwrite that of" in outcome.err


def test_probabilities_are_stored_from_0_to_1(adapter: Path, tmp_path: Path, capfd):
    path = save_as(anatomy(oblique()), tmp_path / "in" / "one.nii.gz")
    result = predict(capfd, adapter, tmp_path / "in", "-o", tmp_path / "out", "--probabilities")
    assert [Path(name).relative_to(tmp_path / "out") for name in result["written"]] == [
        Path("one.nii.gz"),
        Path("probabilities/one.nii.gz"),
    ]
    image = load(tmp_path / "out" / "probabilities" / "one.nii.gz")
    probabilities = image.get_fdata()
    assert probabilities.shape == (*SHAPE, 3)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=3e-5)
    np.testing.assert_array_equal(image.affine, load(path).affine)
    labels = np.asanyarray(load(tmp_path / "out" / "one.nii.gz").dataobj)
    assert (probabilities.argmax(axis=-1) == labels).mean() > 0.999


@pytest.mark.parametrize("option", ["--flips=xy", "--planes", "--largest", "--fill"])
def test_options_change_the_label_map(option: str, adapter: Path, tmp_path: Path, capfd):
    noise = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)
    save(noise, tmp_path / "in" / "one.nii.gz")
    maps = []
    for number, arguments in enumerate(([], [option])):
        predict(capfd, adapter, tmp_path / "in", "-o", tmp_path / str(number), *arguments)
        maps.append(np.array(load(tmp_path / str(number) / "one.nii.gz").dataobj))
    assert not np.array_equal(*maps)
    if option in ("--largest", "--fill"):
        {"--largest": keep_largest, "--fill": fill_holes}[option](maps[0])
        np.testing.assert_array_equal(*maps)


def test_invalid_options_are_refused(adapter: Path, tmp_path: Path, capfd):
    image = save(np.zeros(SHAPE, np.float32), tmp_path / "image.nii.gz")
    for arguments, message in (
        (("--precision", "int4"), "Invalid value for '--precision'"),
        (("--flips", "left"), "flips 'left' names an unknown axis; use x (left to right)"),
        (("--split", "all"), "Invalid value for '--split'"),
        (("--device", "warp"), "device 'warp' is not available on this machine"),
    ):
        outcome = flapsam(capfd, "predict", adapter, image, "-o", tmp_path / "out", *arguments)
        assert outcome.code == 2
        assert message in outcome.err
    assert isinstance(nibabel.load(image), nibabel.Nifti1Image)
