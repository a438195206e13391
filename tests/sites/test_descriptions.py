"""Wrong ``dataset.json`` of both layouts that have one: each is one sentence that names the file."""

import json
import os
from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.sites import DATASETS, find_dataset

PAIR = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
WRONG: dict[str, tuple[str, object, str]] = {
    "no list": ("msd", {"training": 5}, "'training'"),
    "no pair": ("msd", {"training": ["a"]}, "'training.0'"),
    "numbers as paths": ("msd", {"training": [{"image": 1, "label": 2}]}, "'training.0.image'"),
    "no number": (
        "msd",
        {"training": [], "labels": {"one": "a"}},
        'labels: "one": "a" is neither a name with its label value nor the reverse',
    ),
    "list of labels": ("msd", {"training": [], "labels": ["a"]}, "'labels'"),
    "infinite label": ("nnunet", {"file_ending": ".nii", "labels": {"a": float("inf")}}, 'labels: "a": Infinity'),
    "no label": ("nnunet", {"file_ending": ".nii", "labels": {"a": []}}, r'labels: "a": \[\]'),
    "true label": ("nnunet", {"file_ending": ".nii", "labels": {"a": True}}, 'labels: "a": true'),
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
    with pytest.raises(FlapsamError, match=rf"dataset\.json(: .*|, ){message}"):
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


V2 = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "numTraining": 1, "file_ending": ".nii.gz"}
V1 = {
    "labels": {"0": "background", "1": "organ"},
    "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
}


def text(description: dict, **fields: object) -> bytes:
    return json.dumps(description | fields).encode()


READ: dict[str, tuple[bytes, dict]] = {
    "v2": (text(V2), {"organ": 1}),
    "v1": (text(V1), {"organ": 1}),
    "labels of v1 in v2": (text(V2, labels=V1["labels"]), {"organ": 1}),
    "labels of v2 in v1": (text(V1, labels=V2["labels"]), {"organ": 1}),
    "values as text": (text(V2, labels={"background": "0", "organ": " 1"}), {"organ": 1}),
    "whole values as floats": (text(V2, labels={"background": 0.0, "organ": 1.0}), {"organ": 1}),
    "a region of text and number": (text(V2, labels={"bg": 0, "organ": ["1", 2]}), {"organ": [1, 2]}),
    "names that are their values": (text(V1, labels={"0": "0", "1": "1"}), {"1": 1}),
    "no labels in v1": (text({"training": V1["training"]}), {}),
    "a byte order mark": (b"\xef\xbb\xbf" + text(V2), {"organ": 1}),
    "UTF-16": (json.dumps(V2).encode("utf-16"), {"organ": 1}),
    "an ending without its dot": (text(V2, file_ending="nii.gz"), {"organ": 1}),
    "an ending with a blank": (text(V2, file_ending=".nii.gz "), {"organ": 1}),
    "channel names as a list": (text(V2, channel_names=["MR"]), {"organ": 1}),
    "paths of Windows": (
        text(V1, training=[{"image": ".\\imagesTr\\a.nii.gz", "label": " labelsTr\\a.nii.gz"}]),
        {"organ": 1},
    ),
    "v1 that lists the file's number": (
        text(V1, training=[{"image": "./imagesTr/a_0000.nii.gz", "label": "./labelsTr/a.nii.gz"}]),
        {"organ": 1},
    ),
}


@pytest.mark.parametrize(("description", "labels"), READ.values(), ids=READ)
def test_a_description_as_people_write_it_is_read(description: bytes, labels: dict, tmp_path: Path):
    images = ["a_0000"] if b"channel_names" in description or b"\0" in description or b"a_0000" in description else ["a"]
    for folder, names in (("imagesTr", images), ("labelsTr", ["a"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.nii.gz").touch()
    (tmp_path / "dataset.json").write_bytes(description)
    dataset = find_dataset(tmp_path)
    found = dataset.read(tmp_path)
    assert found.problems == []
    assert [(case.name, [image.name for image in case.images], case.label.name) for case in found.cases] == [
        ("a", [f"{images[0]}.nii.gz"], "a.nii.gz")
    ]
    assert dict(dataset.labels(tmp_path)) == labels


REFUSED: dict[str, tuple[bytes, str]] = {
    "a trailing comma": (text(V2)[:-1] + b",}", r": not valid JSON \(.*line 1 column \d+"),
    "a comment": (b'{\n  // ours\n  "labels": {}\n}', r": not valid JSON \(.*line 2 column 3"),
    "quotation marks of a word processor": ("{\u201clabels\u201d: {}}".encode(), r": not valid JSON \(.*line 1 column 2"),
    "an empty file": (b"", r": not valid JSON \(.*line 1 column 1"),
    "a key twice": (text(V2)[:-1] + b', "labels": {"b": 1}}', r": not valid JSON \(key 'labels' is there twice"),
    "keys of neither": (
        text({"modality": {"0": "MR"}, "labels": V2["labels"], "file_ending": ".nii.gz"}),
        ": it has neither",
    ),
    "a page instead of the file": (b"<!DOCTYPE html>\n<html>", r": not valid JSON \(.*line 1 column 1"),
    "numbers twice": (text(V2, labels={"0": 1, "1": 2}), ", labels: keys and values are all numbers; name the classes"),
    "half the other way round": (text(V2, labels={"background": 0, "1": "organ"}), ', labels: "1": "organ" is neither'),
    "no whole number": (text(V2, labels={"organ": 1.5}), ', labels: "organ": 1.5 is neither'),
    "no value": (text(V2, labels={"background": 0, "organ": None}), ', labels: "organ": null is neither'),
    "one name for two values": (text(V1, labels={"1": "organ", "2": "Organ"}), ", labels: 'organ' is listed twice"),
    "an ending of another format": (text(V2, file_ending="nrrd"), ": the files end in nrrd, but flapsam reads NIfTI"),
}


@pytest.mark.parametrize(("description", "message"), REFUSED.values(), ids=REFUSED)
def test_a_description_that_is_unclear_is_refused_in_one_sentence(description: bytes, message: str, tmp_path: Path):
    (tmp_path / "dataset.json").write_bytes(description)
    with pytest.raises(FlapsamError, match=r"dataset\.json" + message) as error:
        dataset = find_dataset(tmp_path)
        dataset.read(tmp_path)
        dataset.labels(tmp_path)
    assert "\n" not in str(error.value)


ONE_OF_TWO = text(V1, training=[{"image": "imagesTr/a_0000.nii.gz", "label": "labelsTr/a.nii.gz"}])
MODALITIES: dict[str, tuple[bytes, list[str], list[str], str]] = {
    "v1 that lists one of two": (ONE_OF_TWO, ["a_0000", "a_0001"], ["a_0000.nii.gz", "a_0001.nii.gz"], ""),
    "v1 with a gap": (text(V1), ["a_0000", "a_0002"], ["a_0000.nii.gz", "a_0002.nii.gz"], "modalities count from _0000"),
    "v2 that begins with the second": (text(V2), ["a_0001"], ["a_0001.nii.gz"], "modalities count from _0000"),
    "v2 without the number": (text(V2), ["a_0000", "b"], ["a_0000.nii.gz"], "images are called CASE_0000.nii.gz"),
}


@pytest.mark.parametrize(("description", "files", "images", "problem"), MODALITIES.values(), ids=MODALITIES)
def test_no_modality_is_passed_over(description: bytes, files: list[str], images: list[str], problem: str, tmp_path: Path):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "labelsTr" / "a.nii.gz").touch()
    for name in files:
        (tmp_path / "imagesTr" / f"{name}.nii.gz").touch()
    (tmp_path / "dataset.json").write_bytes(description)
    found = find_dataset(tmp_path).read(tmp_path)
    assert [[image.name for image in case.images] for case in found.cases] == [images]
    assert len(found.problems) == bool(problem)
    assert all(problem in sentence for sentence in found.problems)
