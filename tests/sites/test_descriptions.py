"""Wrong ``dataset.json`` of both layouts that have one: each is one sentence that names the file."""

import json
import os
from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.sites import DATASETS

PAIR = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
WRONG: dict[str, tuple[str, object, str]] = {
    "no list": ("msd", {"training": 5}, "'training' must list pairs"),
    "no pair": ("msd", {"training": ["a"]}, "'training' must list pairs"),
    "numbers as paths": ("msd", {"training": [{"image": 1, "label": 2}]}, "'training' must list pairs"),
    "no number": (
        "msd",
        {"training": [], "labels": {"one": "a"}},
        "'labels' must give each class a name and a whole number",
    ),
    "list of labels": ("msd", {"training": [], "labels": ["a"]}, "'labels' must give each class"),
    "infinite label": ("nnunet", {"file_ending": ".nii", "labels": {"a": float("inf")}}, "'labels' must give each class"),
    "no label": ("nnunet", {"file_ending": ".nii", "labels": {"a": []}}, "'labels' must give each class"),
    "true label": ("nnunet", {"file_ending": ".nii", "labels": {"a": True}}, "'labels' must give each class"),
    "no ending": ("nnunet", {"file_ending": None, "labels": {}}, "the files end in None"),
    "no images": (
        *("nnunet", {"file_ending": ".nii", "labels": {}, "dataset": {"a": {"images": [], "label": "b"}}}),
        "case 'a' under 'dataset' has no images or no label",
    ),
    "no cases": ("nnunet", {"file_ending": ".nii", "labels": {}, "dataset": [1]}, "under 'dataset' has no images"),
}


def read_all(layout: str, folder: Path) -> None:
    dataset = DATASETS[layout]
    dataset.recognises(folder)
    dataset.read(folder)
    dataset.labels(folder)


@pytest.mark.parametrize(("layout", "description", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_description_is_refused(layout: str, description: object, message: str, tmp_path: Path):
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(FlapsamError, match=rf"dataset\.json: .*{message}"):
        read_all(layout, tmp_path)


@pytest.mark.parametrize("layout", ["msd", "nnunet"])
def test_what_is_not_a_description_is_refused(layout: str, tmp_path: Path):
    path = tmp_path / "dataset.json"
    path.write_text("[" * 100_000)
    with pytest.raises(FlapsamError, match="not valid JSON"):
        read_all(layout, tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FlapsamError, match="this is a pipe, a socket or a device"):
        read_all(layout, tmp_path)


def test_a_path_that_no_file_can_have_is_a_missing_file(tmp_path: Path):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [PAIR, {**PAIR, "image": "x" * 5000}]}))
    problems = DATASETS["msd"].read(tmp_path).problems
    assert len(problems) == 4
    assert all("is missing" in problem for problem in problems)
