"""Wrong ``dataset.json`` of both layouts that have one: each is one sentence that names the file."""

import json
import os
from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.sites import DATASETS

PAIR = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
WRONG: dict[str, tuple[str, object, str]] = {
    "no list": ("msd", {"training": 5}, "'training'"),
    "no pair": ("msd", {"training": ["a"]}, "'training.0'"),
    "numbers as paths": ("msd", {"training": [{"image": 1, "label": 2}]}, "'training.0.image'"),
    "no number": (
        "msd",
        {"training": [], "labels": {"one": "a"}},
        "'labels.one'",
    ),
    "list of labels": ("msd", {"training": [], "labels": ["a"]}, "'labels'"),
    "infinite label": ("nnunet", {"file_ending": ".nii", "labels": {"a": float("inf")}}, "'labels.a"),
    "no label": ("nnunet", {"file_ending": ".nii", "labels": {"a": []}}, "'labels.a"),
    "true label": ("nnunet", {"file_ending": ".nii", "labels": {"a": True}}, "'labels.a"),
    "no ending": ("nnunet", {"file_ending": None, "labels": {}}, "'file_ending'"),
    "no images": (
        *("nnunet", {"file_ending": ".nii", "labels": {}, "dataset": {"a": {"images": [], "label": "b"}}}),
        "'dataset.a.images'",
    ),
    "no cases": ("nnunet", {"file_ending": ".nii", "labels": {}, "dataset": [1]}, "'dataset'"),
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


def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [PAIR, {**PAIR, "image": "x" * 5000}]}))
    with pytest.raises(FlapsamError, match=r"dataset\.json, training, entry 1: 'x+' cannot be used"):
        DATASETS["msd"].read(tmp_path)
