"""A small demo: it creates everything it needs, and users can repeat the commands that it prints."""

import json
import shlex
from pathlib import Path

import pytest

from flapsam.experiments.demo import begin_demo
from flapsam.run.reading import read_config
from tests.helpers.command import flapsam

SMALL = ("--sites", "2", "--cases", "4")
CHANGES = ("samples.size=32", "rounds.count=1", "modes=[federated]", "threads=1", "backbone.weights=random")


def test_the_demo_prints_commands_that_can_be_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = tmp_path / "a demo"
    outcome = flapsam(capfd, "demo", folder, *SMALL, *(part for change in CHANGES for part in ("--set", change)))
    assert outcome.code == 0, outcome.err
    commands = [shlex.split(line[2:]) for line in outcome.out.splitlines() if line.startswith("$ ")]
    assert [command[:2] for command in commands] == [
        ["flapsam", "data"],
        ["flapsam", "simulate"],
        ["flapsam", "predict"],
        ["flapsam", "evaluate"],
    ]
    assert len(list((folder / "sites").glob("site_0[12]/images/*.nii.gz"))) == 8
    # Three cases in ten are for testing, which is one of four at each of the two sites.
    assert len(list((folder / "label_maps").rglob("*.nii.gz"))) == 2
    repeated = flapsam(capfd, *commands[-1][1:], "--json")
    assert json.loads(repeated.out)["pooled"]["cases"] == 2


def test_the_demos_run_is_in_its_folder(tmp_path: Path):
    begin_demo(tmp_path / "demo", [])
    config = read_config(tmp_path / "demo" / "run.yaml")
    assert (config.data.path, config.output) == (tmp_path / "demo" / "sites", tmp_path / "demo" / "run")


def test_an_invalid_field_is_reported_before_anything_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    outcome = flapsam(capfd, "demo", tmp_path / "demo", "--set", "rounds.count=none")
    assert outcome.code == 2
    assert "rounds.count" in outcome.err
    assert not (tmp_path / "demo").exists()


def test_existing_files_are_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "mine").touch()
    outcome = flapsam(capfd, "demo", tmp_path)
    assert outcome.code == 2
    assert "name another folder" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
