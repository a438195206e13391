"""Scores of label maps on disk. Expected values are counted by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from safetensors.numpy import save_file

from flapsam.adapters import evaluation
from flapsam.adapters.evaluation import evaluate
from flapsam.base.errors import FlapsamError
from flapsam.learning.metrics import CaseScores, as_json_of
from flapsam.report.tables import site_table
from tests.helpers.adapters import trained
from tests.helpers.command import flapsam
from tests.helpers.sites import save

SHAPE = (12, 10, 4)


@pytest.fixture(scope="module")
def card() -> str:
    return trained("flap")[1].model_dump_json()


def rows(*values: int) -> np.ndarray:
    """A label map with one plane of 10 · 4 voxels for each value, and background in the others."""
    array = np.zeros(SHAPE, np.uint8)
    array[: len(values)] = np.array(values)[:, None, None]
    return array


def write(folder: Path, **label_maps: np.ndarray) -> Path:
    for name, array in label_maps.items():
        save(array, folder / f"{name}.nii.gz")
    return folder


def run_with(folder: Path, card: str, labels: str, **fields: str) -> Path:
    """The folder of a run with an adapter, as far as ``evaluate`` reads it."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "flapsam.json").write_text(card)
    save_file({"x": np.zeros(1, np.float32)}, folder / "adapter" / "weights.safetensors")
    more = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (folder / "run.yaml").write_text(f"data:\n  path: {folder}\n  labels: {labels}\n{more}")
    return folder


IGNORE = {
    "as documented": "{kidney: 1, tumour: 2, ignore: 255}",
    "in capitals": "{kidney: 1, tumour: 2, Ignore: 255}",
    "as labelme has it": "{_background_: 0, kidney: 1, tumour: 2, __ignore__: 255}",
    "several values, first": "{ignore: [254, 255], kidney: 1, tumour: 2}",
    "with a name for 0": "{nothing: 0, kidney: 1, tumour: 2, IGNORE: 255}",
}


@pytest.mark.parametrize("labels", IGNORE.values(), ids=IGNORE)
def test_ignored_voxels_are_left_out(labels: str, card: str, tmp_path: Path):
    run = run_with(tmp_path / "run", card, labels)
    write(tmp_path / "predicted", a=rows(1, 1, 2, 1, 1), b=rows(1, 0, 2, 2, 0))
    write(tmp_path / "truth", a=rows(1, 1, 2, 255, 255), b=rows(1, 1, 255, 2, 2))
    first, second = evaluate(tmp_path / "predicted", tmp_path / "truth", run)
    assert first.dice == {"kidney": 1.0, "tumour": 1.0}
    # Kidney 2 · 1 / (1 + 2). Of the tumour, one predicted plane is ignored, so it is 2 · 1 / (1 + 2), too.
    assert second.dice == {"kidney": pytest.approx(2 / 3), "tumour": pytest.approx(2 / 3)}


def test_a_class_in_neither_label_map_has_no_dice(tmp_path: Path, card: str):
    run = run_with(tmp_path / "run", card, "{kidney: 1, tumour: 2}")
    write(tmp_path / "truth", a=rows(1, 1), b=rows(1, 1), c=rows(1, 1, 2))
    write(tmp_path / "predicted", a=rows(), b=rows(1, 1), c=rows(1, 1, 2))
    scores = evaluate(tmp_path / "predicted", tmp_path / "truth", run)
    assert [score.dice["tumour"] for score in scores] == [None, None, 1.0]
    pooled = as_json_of(scores)["pooled"]
    assert pooled["dice"] == {"kidney": pytest.approx(2 / 3), "tumour": 1.0}
    assert {name: mean["cases"] for name, mean in pooled["measures"]["dice"].items()} == {"kidney": 3, "tumour": 1}
    assert (pooled["missed"], pooled["spurious"]) == ({"kidney": 1, "tumour": 0}, {"kidney": 0, "tumour": 0})
    # The mean has no interval, because a single patient has a tumour.
    assert shown(scores)[-1] == ["all cases", "3", "3", "0.667", "1.000 n=1", "0.833"]
    ones = evaluate(tmp_path / "predicted", tmp_path / "truth", run, absent="one")
    assert [score.dice["tumour"] for score in ones] == [1.0, 1.0, 1.0]
    assert "has a Dice of 1 there" in as_json_of(ones)["absent"]


def test_the_rule_of_the_run_is_the_default(tmp_path: Path, card: str):
    run = run_with(tmp_path / "run", card, "{kidney: 1, tumour: 2}", absent_class="one")
    write(tmp_path / "truth", a=rows(1))
    write(tmp_path / "predicted", a=rows(1))
    assert evaluate(tmp_path / "predicted", tmp_path / "truth", run)[0].dice["tumour"] == 1.0
    assert evaluate(tmp_path / "predicted", tmp_path / "truth", run, absent="none")[0].dice["tumour"] is None


def test_a_missing_prediction_is_an_error_or_a_zero_that_is_named(tmp_path: Path, capfd):
    write(tmp_path / "truth", a=rows(1, 1), b=rows(1), c=rows(1))
    write(tmp_path / "predicted", a=rows(1, 1))
    outcome = flapsam(capfd, "evaluate", tmp_path / "predicted", tmp_path / "truth")
    assert outcome.code == 2
    assert "no prediction for 2 of 3 cases: b, c; add them" in outcome.err
    outcome = flapsam(capfd, "evaluate", tmp_path / "predicted", tmp_path / "truth", "--missing", "zero", "--json")
    result = json.loads(outcome.out)
    assert (result["missing"], result["pooled"]["mean_dice"]) == (["b", "c"], pytest.approx(1 / 3))
    assert "No prediction, so that the Dice is 0: b, c." in caption(
        evaluate(tmp_path / "predicted", tmp_path / "truth", missing="zero")
    )
    outcome = flapsam(capfd, "evaluate", tmp_path / "predicted", tmp_path / "truth", "--missing", "leave-out", "--json")
    assert json.loads(outcome.out)["pooled"]["mean_dice"] == 1.0
    assert "left out, because there is no prediction: b, c" in outcome.err


MISSING: dict[str, tuple[dict[str, list[str]], list[str], str]] = {
    # splits by site, predicted cases, cases that the message names
    "all test cases are there": ({"x": ["train", "test"], "y": ["test", "train"]}, ["x/x_1", "y/y_0"], ""),
    "a test case is missing": ({"x": ["train", "test"], "y": ["test", "test"]}, ["x/x_1", "y/y_0"], "1 of 3 cases: y/y_1;"),
    "a site is missing": ({"x": ["train", "test"], "y": ["test", "train"]}, ["x/x_1"], "1 of 2 cases: y/y_0;"),
    "two splits": ({"x": ["train", "test"], "y": ["val", "test"]}, ["x/x_1", "x/x_0"], "1 of 3 cases: y/y_1;"),
    "a single training case": ({"x": ["train", "train"], "y": ["test"]}, ["x/x_0"], "1 of 2 cases: x/x_1;"),
}


@pytest.mark.parametrize(("splits", "predicted", "message"), MISSING.values(), ids=MISSING)
def test_only_cases_of_the_predicted_splits_can_be_missing(
    splits: dict[str, list[str]], predicted: list[str], message: str, tmp_path: Path
):
    table = "case,site,split\n"
    for site, of_site in splits.items():
        for index, split in enumerate(of_site):
            table += f"{site}_{index},{site},{split}\n"
            for folder in ("images", "labels"):
                save(rows(1), tmp_path / "data" / site / folder / f"{site}_{index}.nii.gz")
    (tmp_path / "data" / "sites.csv").write_text(table)
    write(tmp_path / "predicted", **{name: rows(1) for name in predicted})
    if not message:
        assert [score.dice for score in evaluate(tmp_path / "predicted", tmp_path / "data")] == [{"1": 1.0}] * len(predicted)
        return
    with pytest.raises(FlapsamError) as caught:
        evaluate(tmp_path / "predicted", tmp_path / "data")
    assert message in str(caught.value)


def _turned(path: Path) -> None:
    nibabel.save(nibabel.load(path).as_reoriented(np.array([[2, 1], [0, -1], [1, -1]])), path)  # pyright: ignore


def test_a_prediction_in_another_order_is_scored_in_place(tmp_path: Path):
    array = np.random.default_rng(0).integers(0, 3, SHAPE, np.uint8)
    write(tmp_path / "truth", a=array)
    write(tmp_path / "predicted", a=array)
    _turned(tmp_path / "predicted" / "a.nii.gz")
    assert evaluate(tmp_path / "predicted", tmp_path / "truth")[0].dice == {"1": 1.0, "2": 1.0}


def _two_formats(folder: Path) -> None:
    import SimpleITK as sitk

    sitk.WriteImage(sitk.ReadImage(str(folder / "predicted" / "a.nii.gz")), str(folder / "predicted" / "a.seg.nrrd"))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "another shape": (
        lambda folder: save(rows(1)[:-1], folder / "predicted" / "a.nii.gz"),
        "its shape (11, 10, 4) differs from the ground truth's (12, 10, 4)",
    ),
    "another place": (
        lambda folder: save(rows(1), folder / "predicted" / "a.nii.gz", np.diag([1, 1, 2.5, 1])),
        "its affine differs from the ground truth's",
    ),
    "a value of no class": (
        lambda folder: write(folder / "predicted", a=rows(1, 2, 3, 7)),
        "value 3, 7 belongs to no class",
    ),
    "no whole number": (
        lambda folder: save(rows(1).astype(np.float32) / 2, folder / "predicted" / "a.nii.gz"),
        "holds 0.5 at voxel (0, 0, 0)",
    ),
    "two files of one case": (_two_formats, "is a label map of the same case; remove one"),
    "no truth": (lambda folder: write(folder / "predicted", z=rows(1)), "there is no label map for z"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_wrong_predictions_are_refused(spoil: Callable[[Path], object], message: str, card: str, tmp_path: Path):
    run = run_with(tmp_path / "run", card, "{kidney: 1, tumour: 2}")
    write(tmp_path / "truth", a=rows(1))
    write(tmp_path / "predicted", a=rows(1))
    spoil(tmp_path)
    with pytest.raises(FlapsamError) as caught:
        evaluate(tmp_path / "predicted", tmp_path / "truth", run)
    assert str(caught.value).startswith(f"{tmp_path / 'predicted'}")
    assert message in str(caught.value)


def test_a_truth_scored_against_itself_may_hold_ignored_values(card: str, tmp_path: Path):
    run = run_with(tmp_path / "run", card, "{kidney: 1, tumour: 2, ignore: 255}")
    truth = write(tmp_path / "truth", a=rows(1, 2, 255))
    assert evaluate(truth, truth, run)[0].dice == {"kidney": 1.0, "tumour": 1.0}


def test_an_adapter_that_learned_the_background_as_a_class_is_refused(card: str, tmp_path: Path):
    tree = json.loads(card) | {"classes": ["Background", "kidney"], "labels": {"Background": 0, "kidney": 1}}
    run = run_with(tmp_path / "run", json.dumps(tree), "{Background: 0, kidney: 1}")
    truth = write(tmp_path / "truth", a=rows(1))
    with pytest.raises(
        FlapsamError, match="the adapter's classes are Background, kidney, but those of its labels are kidney"
    ):
        evaluate(truth, truth, run)


def test_without_an_adapter_a_value_below_0_is_refused(tmp_path: Path):
    truth = write(tmp_path / "truth", a=rows(1).astype(np.int8) - 1)
    with pytest.raises(FlapsamError, match="label value -1 is below 0"):
        evaluate(truth, truth)


def test_the_names_of_the_choices_are_those_of_the_command_line():
    assert evaluation.Missing.__args__ == ("error", "zero", "leave-out")  # pyright: ignore


def shown(scores: list[CaseScores]) -> list[list[str]]:
    """The rows of the terminal's table as text."""
    columns = [[str(cell) for cell in column.cells] for column in site_table(scores).columns]
    return [list(row) for row in zip(*columns, strict=True)]


def caption(scores: list[CaseScores]) -> str:
    return str(site_table(scores).caption)
