"""A calibration, and what ``flapsam predict`` says with it: the Dice to expect, and which images are unusual."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.stats import entropy

from flapsam.adapters.confidence import read_confidence
from flapsam.experiments.calibration import calibrate
from flapsam.experiments.simulation import simulate
from flapsam.learning.familiarity import look
from flapsam.run.reading import read_config
from flapsam.sites import hold_out_validation, read_sites
from flapsam.volumes import read_image
from tests.helpers.command import flapsam
from tests.helpers.families import small_run
from tests.helpers.sites import load, make_site, make_sites, save

pytestmark = pytest.mark.usefixtures("small_families")


@pytest.fixture(scope="module")
def run(small_families: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with sixteen cases to train and validate on, and its calibration beside it."""
    folder = tmp_path_factory.mktemp("calibration")
    data = make_sites(folder / "data", cases=10)
    config = read_config(small_run(folder / "run.yaml", data, rounds={"count": 1}))
    simulate(config.model_copy(update={"data": config.data.model_copy(update={"validation_fraction": 0.5})}))
    calibrate(folder / "run", folder / "confidence")
    return folder / "run"


def test_a_calibration_uses_validation_cases_and_knows_training_images(run: Path, tmp_path: Path, capfd):
    outcome = flapsam(capfd, "calibrate", run, "-o", tmp_path / "again", "--json")
    found = json.loads(outcome.out)
    config = read_config(run / "run.yaml")
    sites = [hold_out_validation(site, 0.5, config.seed) for site in read_sites(config.data, config.seed)]
    patients = {f"{case.site}/{case.subject}" for site in sites for case in site.of("val")}
    assert set(found["points"]) == patients and len(patients) == found["line"]["patients"]
    assert found["images"] == sum(len(site.of("train", "val")) for site in sites) == 16
    content = (tmp_path / "again").read_bytes()
    assert content == run.with_name("confidence").read_bytes()
    # It holds no name of a case or site and no path.
    names = {name for site in sites for case in site.cases for name in (site.name, case.name, str(case.image.parent))}
    assert not [name for name in names if name.encode() in content]
    # The measured Dice is that of ``evaluate``.
    out, truth = tmp_path / "out", tmp_path / "truth"
    cases = [case for site in sites for case in site.of("val")]
    assert flapsam(capfd, "predict", run, *(case.image for case in cases), "-o", out).code == 0
    truth.mkdir()
    for case in cases:
        shutil.copy(case.label, truth)
    for score in json.loads(flapsam(capfd, "evaluate", out, truth, "--adapter", run, "--json").out)["cases"]:
        known = [value for value in score["dice"].values() if value is not None]
        site = score["case"].rpartition("_")[0]
        assert found["points"][f"{site}/{score['case']}"][1] == pytest.approx(np.mean(known))
    text = flapsam(capfd, "calibrate", run, "-o", tmp_path / "again").out
    assert "expected calibration error" in text and "which knows 16 images" in text


def test_predict_tells_the_dice_to_expect_and_what_is_unusual(run: Path, tmp_path: Path, capfd):
    config, images = read_config(run / "run.yaml"), tmp_path / "in"
    images.mkdir()
    shutil.copy(next((config.data.path / "site_0" / "images").iterdir()), images / "known.nii.gz")
    noise = np.random.default_rng(0).normal(0, 100, (20, 16, 6)).astype(np.float32)
    save(noise, images / "noise.nii.gz")
    save(noise, images / "thick.nii.gz", np.diag([1.0, 1, 9, 1]))
    arguments = ["predict", run, images, "-o", tmp_path / "out", "--confidence", run.with_name("confidence")]
    arguments += ["--probabilities", "--uncertainty", "--json"]
    outcome = flapsam(capfd, *arguments)
    assert outcome.code == 0, outcome.err
    by_name = {Path(one["image"]).name: one for one in json.loads(outcome.out)["images"]}
    known, noisy = (by_name[f"{name}.nii.gz"]["confidence"] for name in ("known", "noise"))
    assert known["unusual"] == [] and 0 <= known["low"] <= known["dice"] <= known["high"] <= 1
    assert noisy == {"dice": None, "low": None, "high": None, "unusual": ["slices look different"]}
    assert "spacing 1 × 1 × 9 mm" in by_name["thick.nii.gz"]["confidence"]["unusual"][0]
    # The Dice to expect follows from the probabilities that were written.
    shares = load(tmp_path / "out" / "probabilities" / "known.nii.gz").get_fdata()
    labels = np.asarray(load(tmp_path / "out" / "known.nii.gz").dataobj)
    soft = [
        2 * shares[labels == value, value].sum() / ((labels == value).sum() + shares[..., value].sum())
        for value in (1, 2)
        if (labels == value).sum() + shares[..., value].sum() > 0.5
    ]
    line = read_confidence(run.with_name("confidence"), run / "adapter").line
    assert known["dice"] == pytest.approx(line.dice(float(np.mean(soft)))[0], abs=1e-3)
    # So does the uncertainty.
    stored = load(tmp_path / "out" / "uncertainty" / "known.nii.gz")
    expected = entropy(shares, axis=-1) / np.log(3)
    np.testing.assert_allclose(stored.get_fdata(), expected, atol=0.5 / 255 + 1e-3)
    np.testing.assert_array_equal(stored.affine, load(images / "known.nii.gz").affine)
    # The table has it, and so has a run that skips what is done.
    rows = {row["case"]: row for row in csv.DictReader((tmp_path / "out" / "volumes.csv").open())}
    assert rows["noise"]["unusual"] == "slices look different" and rows["noise"]["expected_dice"] == ""
    assert float(rows["known"]["expected_dice"]) == pytest.approx(known["dice"], abs=5e-4)
    resumed = flapsam(capfd, *arguments, "--resume")
    assert json.loads(resumed.out)["images"] == json.loads(outcome.out)["images"]
    # Without the option, nothing is said and the table has its former columns.
    plain = flapsam(capfd, "predict", run, images, "-o", tmp_path / "plain")
    assert plain.code == 0 and "unlike" not in plain.err
    assert "expected_dice" not in (tmp_path / "plain" / "volumes.csv").read_text()
    warned = flapsam(capfd, *arguments[:-1])
    assert "noise.nii.gz: is unlike the images of the calibration (slices look different)" in warned.err


def test_an_image_is_judged_alike_after_the_file_was_read_again(run: Path):
    """Files are written as arrays lie in memory, so that one in another order would come back as another."""
    from flapsam.adapters.model import load as load_model

    confidence, model = read_confidence(run.with_name("confidence"), run / "adapter"), load_model(run)
    config = read_config(run / "run.yaml")
    images = sorted((config.data.path / "site_1" / "images").iterdir())
    basis = confidence.familiar.basis
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-5)
    assert all(not confidence.familiar.unusual(look(model.network, read_image(path), model.card.samples)) for path in images)


def test_an_adapter_outside_of_a_run_needs_labelled_cases(run: Path, tmp_path: Path, capfd):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    outcome = flapsam(capfd, "calibrate", tmp_path / "adapter", "-o", tmp_path / "c")
    assert outcome.code == 2 and "name a folder of labelled cases with --data" in outcome.err
    make_site(tmp_path / "data" / "own", 9, seed=9)
    few = flapsam(capfd, "calibrate", tmp_path / "adapter", "-o", tmp_path / "c", "--data", tmp_path / "data")
    assert few.code == 2 and "9 patients to calibrate on and 9 images" in few.err
    assert not (tmp_path / "c").exists()
    make_site(tmp_path / "data" / "own", 10, seed=9)
    done = flapsam(capfd, "calibrate", tmp_path / "adapter", "-o", tmp_path / "c", "--data", tmp_path / "data", "--json")
    assert done.code == 0 and json.loads(done.out)["images"] == 10
    # It was made for an equal adapter, so that the run's takes it, too. In the adapter's folder, it changes nothing.
    shutil.copy(tmp_path / "c", tmp_path / "adapter" / "calibration.safetensors")
    for trained, file in ((run, tmp_path / "c"), (tmp_path / "adapter", tmp_path / "adapter" / "calibration.safetensors")):
        arguments = ["-o", tmp_path / "out", "--confidence", file]
        assert flapsam(capfd, "predict", trained, tmp_path / "data" / "own" / "images", *arguments).code == 0


def test_labelled_cases_take_the_place_of_the_runs_own(run: Path, tmp_path: Path, capfd):
    make_site(tmp_path / "data" / "own", 11, seed=9)
    outcome = flapsam(capfd, "calibrate", run, "-o", tmp_path / "c", "--data", tmp_path / "data", "--json")
    found = json.loads(outcome.out)
    assert set(found["points"]) == {f"own/own_{number}" for number in range(11)} and found["images"] == 11


def test_a_calibration_holds_for_the_options_that_it_was_made_with(run: Path, tmp_path: Path, capfd):
    assert flapsam(capfd, "calibrate", run, "-o", tmp_path / "c", "--flips", "x", "--fill").code == 0
    images = read_config(run / "run.yaml").data.path / "site_0" / "images"
    plain = ["predict", run, images, "-o", tmp_path / "out", "--confidence", tmp_path / "c"]
    assert flapsam(capfd, *plain, "--flips", "x", "--fill").code == 0
    outcome = flapsam(capfd, *plain)
    assert outcome.code == 2 and "was made with --flips x --fill; predict so, too" in outcome.err
    own = flapsam(capfd, *plain[:-1], run.with_name("confidence"), "--planes")
    assert own.code == 2 and "was made without --flips, --planes, --largest and --fill" in own.err


def test_a_calibration_that_cannot_be_written_is_refused_before_any_case_is_segmented(run: Path, tmp_path: Path, capfd):
    outcome = flapsam(capfd, "calibrate", run, "-o", tmp_path)
    assert (outcome.code, outcome.err) == (2, f"Error: {tmp_path}: this is a folder; name the file to write\n")


def test_a_file_that_is_no_calibration_of_the_adapter_is_refused(run: Path, tmp_path: Path, capfd):
    images = read_config(run / "run.yaml").data.path / "site_0" / "images"
    known = run.with_name("confidence")
    with safe_open(known, "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tree = json.loads(metadata["flapsam"])
    damaged = {
        "cut": known.read_bytes()[:-100],
        "text": b"hello",
        "empty": b"",
    }
    crafted = {
        "shape": ({**tensors, "deviations": tensors["deviations"][:-1]}, tree),
        "nan": ({**tensors, "usual": np.full(2, np.nan, np.float32)}, tree),
        "missing": ({name: array for name, array in tensors.items() if name != "mean"}, tree),
        "more": ({**tensors, "other": tensors["mean"]}, tree),
        "line": (tensors, {**tree, "line": {}}),
        "later": (tensors, {**tree, "format": 99}),
        "nobody": (tensors, {**tree, "line": {**tree["line"], "patients": 0}}),
        "narrow": ({**tensors, "deviations": 0 * tensors["deviations"]}, tree),
        "spread": (tensors, {**tree, "line": {**tree["line"], "spread": -1.0}}),
        "list": (tensors, []),
        "adapter": (tensors, {**tree, "adapter": "0" * 64}),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    for name, (arrays, description) in crafted.items():
        save_file(arrays, tmp_path / name, metadata={"flapsam": json.dumps(description)})
    for name in (*damaged, *crafted, "nothing"):
        outcome = flapsam(capfd, "predict", run, images, "-o", tmp_path / "out", "--confidence", tmp_path / name)
        assert outcome.code == 2 and str(tmp_path / name) in outcome.err, name
        assert "Traceback" not in outcome.err and outcome.err.count("\n") == 1, (name, outcome.err)
    assert not (tmp_path / "out").exists()
