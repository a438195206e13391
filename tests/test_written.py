"""Files in the first version of each format, kept in ``written``, and files of future versions."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
import yaml

from flapsam.adapters.store import load_adapter
from flapsam.adapters.trained import find_trained
from flapsam.base.errors import FlapsamError
from flapsam.federation.packets import decode
from flapsam.report.run import read_run
from flapsam.run.config import RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import Fitted, RunEnded, read_ledger
from flapsam.run.reading import changed, fingerprint, read_config
from tests.federation.test_packets import CONTRACT
from tests.helpers.places import WRITTEN

RUN = WRITTEN / "run-format-1"
CONFIG, ENVIRONMENT = "run.yaml", "environment.json"


def with_format(path: Path, number: object) -> None:
    """Set the format number in a YAML or JSON file of a run."""
    path.write_text(json.dumps({**yaml.safe_load(path.read_text()), "format": number}))


def test_a_run_still_loads():
    config = read_config(RUN / CONFIG)
    assert (config.format, config.strategy, config.lora.rank, config.rounds.count) == (1, "lora", 1, 2)
    renamed = changed(config, {"backbone.name": "sam-tiny-1"})
    assert RunFolder(RUN).resume(renamed) == "ad77cfbecf484efb8166717e89d3d7cd"
    assert RunFolder(RUN).read_environment()["format"] == 1
    events = read_ledger(RUN / "events.jsonl")
    assert [event.bytes_up for event in events if isinstance(event, Fitted)] == [2074, 2060, 2117, 2110]
    assert isinstance(events[-1], RunEnded)


def test_the_adapter_of_a_run_still_loads():
    trained = find_trained(RUN)
    assert trained.run is not None
    assert trained.run.output == RUN
    network, card = load_adapter(trained.folder)
    assert (card.run, card.rounds, card.classes) == ("ad77cfbecf484efb8166717e89d3d7cd", 2, ["ball", "core"])
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_a_run_on_the_first_sam_tiny_keeps_its_backbone():
    assert read_config(RUN / CONFIG).backbone.name == "sam-tiny"
    assert read_run(RUN).config.backbone.name == "sam-tiny-1"


def test_a_run_on_the_first_sam_tiny_says_what_its_backbone_is_called_now():
    with pytest.raises(FlapsamError, match=r"now called sam-tiny-1; add --set backbone\.name=sam-tiny-1 to resume"):
        RunFolder(RUN).resume(read_config(RUN / CONFIG))


def test_a_packet_can_still_be_decoded():
    header, tensors = decode((WRITTEN / "packet-format-2").read_bytes(), lambda header: CONTRACT, CONTRACT.tensor_bytes)
    assert (header.run, header.round, header.sender, header.samples) == ("r", 3, "site", 7)
    assert header.metrics == {"loss": 0.5, "dice": None}
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a.weight": [[0, 1, 2], [3, 4, 5]],
        "b.bias": [0.5, -1.25],
    }


def test_the_format_number_does_not_change_the_fingerprint(tmp_path: Path):
    folder = copytree(RUN, tmp_path / "run")
    with_format(folder / CONFIG, 1)
    assert fingerprint(read_config(folder / CONFIG)) == fingerprint(read_config(RUN / CONFIG))


def test_cells_that_were_computed_with_the_first_sam_tiny_count_for_it_alone():
    """The digits are those of the version in which it was the default, with adapters on queries and values."""
    fields = {"data": {"path": "x", "labels": {"a": 1}}, "lora": {"projections": ["q", "v"]}}
    first, second = (
        fingerprint(RunConfig.model_validate({**fields, "backbone": {"name": name}})) for name in ("sam-tiny-1", "sam-tiny")
    )
    assert first.startswith("0470db9451af")
    assert second != first


@pytest.mark.parametrize(("file", "number"), [(CONFIG, 2), (ENVIRONMENT, 3)])
def test_files_of_a_later_version_are_refused(file: str, number: int, tmp_path: Path):
    folder = copytree(RUN, tmp_path / "run")
    with_format(folder / file, number)
    with pytest.raises(
        FlapsamError, match=rf"{file}: format {number} is newer than flapsam .* knows; install a newer flapsam"
    ):
        RunFolder(folder).resume(read_config(folder / CONFIG))


def test_an_invalid_format_number_is_refused(tmp_path: Path):
    folder = copytree(RUN, tmp_path / "run")
    with_format(folder / CONFIG, 0)
    with pytest.raises(FlapsamError, match="'format': Input should be 1"):
        read_config(folder / CONFIG)


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(FlapsamError, match="there is no run here"):
        RunFolder(tmp_path).read_environment()


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_run_without_a_readable_id_is_refused(text: str, tmp_path: Path):
    (tmp_path / ENVIRONMENT).write_text(text)
    with pytest.raises(FlapsamError, match="cannot read the id of the run"):
        RunFolder(tmp_path).read_environment()
