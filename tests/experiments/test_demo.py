"""The demo, small: everything from nothing, and its commands as anyone could give them."""

import json
import shlex
from pathlib import Path

import pytest

from flapsam.experiments.demo import begin_demo
from flapsam.run.reading import read_config
from tests.helpers.command import flapsam

SMALL = ("--sites", "2", "--cases", "4")
CHANGES = ("samples.size=32", "rounds.count=1", "modes=[federated]", "threads=1", "backbone.weights=random")


def test_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = tmp_path / "a demo"
    outcome = flapsam(capfd, "demo", folder, *SMALL, *(part for change in CHANGES for part in ("--set", change)))
    assert outcome.code == 0, outcome.err
    shown = [shlex.split(line[2:]) for line in outcome.out.splitlines() if line.startswith("$ ")]
    assert [command[:2] for command in shown] == [
        ["flapsam", "data"],
        ["flapsam", "simulate"],
        ["flapsam", "predict"],
        ["flapsam", "evaluate"],
    ]
    assert len(list((folder / "sites").glob("site_0[12]/images/*.nii.gz"))) == 8
    # Three cases in ten are for the test: one of four at each of two sites.
    assert len(list((folder / "label_maps").rglob("*.nii.gz"))) == 2
    again = flapsam(capfd, *shown[-1][1:], "--json")
    assert json.loads(again.out)["pooled"]["cases"] == 2


def test_its_run_lies_in_its_folder(tmp_path: Path):
    begin_demo(tmp_path / "demo", [])
    config = read_config(tmp_path / "demo" / "run.yaml")
    assert (config.data.path, config.output) == (tmp_path / "demo" / "sites", tmp_path / "demo" / "run")


def test_a_wrong_field_is_told_before_anything_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    outcome = flapsam(capfd, "demo", tmp_path / "demo", "--set", "rounds.count=none")
    assert outcome.code == 2
    assert "rounds.count" in outcome.err
    assert not (tmp_path / "demo").exists()


def test_nothing_is_written_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "mine").touch()
    outcome = flapsam(capfd, "demo", tmp_path)
    assert outcome.code == 2
    assert "name another folder" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
