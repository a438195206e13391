"""The trackers' files, read with their own readers and compared with a ledger written by hand."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.report.tracking import TRACKERS, Tracking, track_run
from flapsam.run.config import RunConfig
from flapsam.run.observer import Observer
from flapsam.run.reading import read_config
from tests.helpers.command import flapsam
from tests.helpers.ledgers import FINISHED, begun, read_events
from tests.helpers.sites import make_sites, write_run

Curves = dict[str, list[tuple[int, float]]]

SITE: Curves = {"cross_entropy": [(1, 1.0), (2, 1.0)], "dice_loss": [(1, 0.25), (2, 0.25)], "bytes_up": [(1, 100), (2, 100)]}
DOWN: Curves = {"bytes_down": [(1, 10), (2, 60), (3, 60)]}
EXPECTED: dict[str, Curves] = {
    "federated": {
        "seconds": [(1, 10.0), (2, 10.0)],
        "aggregation_seconds": [(1, 0.5), (2, 0.5)],
        "bytes_up_so_far": [(1, 200), (2, 400), (3, 400)],
        "bytes_down_so_far": [(1, 20), (2, 140), (3, 260)],
        "validation_dice/mean": [(1, 0.5), (2, 0.4)],
        "test_dice/mean": [(2, 0.6)],
        "test_dice/ball": [(2, 0.6)],
    },
    "federated/a": {
        **SITE,
        **DOWN,
        "loss": [(1, 0.5), (2, 0.4)],
        "seconds": [(1, 4.0), (2, 4.0)],
        "validation_dice/mean": [(1, 0.4), (2, 0.3)],
        "validation_dice/ball": [(1, 0.5), (2, 0.4)],
        "validation_dice/core": [(1, 0.3), (2, 0.2)],
        "test_dice/mean": [(2, 0.8)],
        "test_dice/ball": [(2, 0.8)],
    },
    "federated/b": {
        **SITE,
        **DOWN,
        "loss": [(1, 0.5), (2, 0.3)],
        "seconds": [(1, 6.0), (2, 6.0)],
        "validation_dice/mean": [(1, 0.6), (2, 0.5)],
        "validation_dice/ball": [(1, 0.7), (2, 0.6)],
        "validation_dice/core": [(1, 0.5), (2, 0.4)],
        "test_dice/mean": [(2, 0.5)],
        "test_dice/ball": [(2, 0.5)],
    },
}
"""Series → curve → round and value, computed by hand from ``FINISHED``."""


def read_tensorboard(folder: Path) -> tuple[Curves, dict[str, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    curves: Curves = {}
    parameters: dict[str, str] = {}
    for path in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            curves[f"{path.relative_to(folder)}/{tag}"] = [(point.step, point.value) for point in events.Scalars(tag)]
        if path == folder / "federated":
            content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
            start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info  # type: ignore[attr-defined]
            parameters = {name: value.string_value for name, value in start.hparams.items()}
    return curves, parameters


def read_mlflow(folder: Path) -> tuple[Curves, dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=folder.as_uri())
    (experiment,) = [candidate for candidate in client.search_experiments() if candidate.name == "flapsam"]
    (run,) = client.search_runs([experiment.experiment_id])
    curves = {
        key: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    return curves, run.data.params


READERS: dict[str, Callable[[Path], tuple[Curves, dict[str, str]]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return read_config(write_run(tmp_path / "run.yaml", tmp_path, rounds={"count": 4}))


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def read_curves(folder: Path, name: str) -> Curves:
    return READERS[name](folder / "tracking" / name)[0]


def check(tracked: Curves) -> None:
    expected = {f"{series}/{name}": curve for series, curves in EXPECTED.items() for name, curve in curves.items()}
    assert tracked.keys() == expected.keys()
    for name, curve in expected.items():
        assert [step for step, _ in tracked[name]] == [step for step, _ in curve], name
        assert [value for _, value in tracked[name]] == pytest.approx([value for _, value in curve]), name


@pytest.mark.parametrize("name", TRACKERS)
def test_a_ledger_is_tracked_completely_and_only_once(name: str, config: RunConfig, tmp_path: Path):
    folder = begun(tmp_path / "run", config, FINISHED)
    for _ in range(2):
        (target,) = track_run(folder, [name])
        assert str(folder / "tracking" / name) in target
        check(read_curves(folder, name))


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("stopped", [0, 1, 7, 14, len(FINISHED)])
def test_a_resumed_run_has_no_duplicate_points(name: str, stopped: int, config: RunConfig, tmp_path: Path):
    folder = begun(tmp_path / "run", config, [])
    config = config.model_copy(update={"output": folder})
    for past, new in ([], FINISHED[:stopped]), (FINISHED[:stopped], FINISHED[stopped:]):
        tracking = Tracking([name], pytest.fail)
        tracking.opened(config, past)
        for event in new:
            tracking.event(event)
        tracking.close()
    check(read_curves(folder, name))


@pytest.mark.parametrize("name", TRACKERS)
def test_the_configuration_is_tracked(name: str, config: RunConfig, tmp_path: Path):
    folder = begun(tmp_path / "run", config, FINISHED)
    track_run(folder, [name])
    _, parameters = READERS[name](folder / "tracking" / name)
    assert {"lora.rank": "2", "samples.size": "32", "data.labels.ball": "1"}.items() <= parameters.items()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_reported_in_one_sentence(
    name: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    folder = begun(tmp_path / "run", config, FINISHED)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    outcome = flapsam(capfd, "track", folder, "--to", name)
    assert outcome.code == 2
    assert outcome.err.strip() == f"Error: tracking with {name} needs another package; run pip install 'flapsam[{name}]'"
    assert not (folder / "tracking").exists()


def test_an_unknown_tracker_is_reported_before_the_run_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"))
    outcome = flapsam(capfd, "simulate", run, "--track", "wandb")
    assert outcome.code == 2
    assert "Invalid value for '--track'" in outcome.err and "'mlflow'" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_left_out(config: RunConfig, tmp_path: Path):
    folder = begun(tmp_path / "run", config, FINISHED)
    (folder / "tracking").write_text("where a folder should be")
    messages: list[str] = []
    tracking = Tracking(["tensorboard"], messages.append)
    tracking.opened(config.model_copy(update={"output": folder}), FINISHED)
    tracking.event(FINISHED[-1])
    tracking.close()
    assert len(messages) == 1
    assert messages[0].startswith("tensorboard has failed and is left out from now on")
    with pytest.raises(FlapsamError, match="tensorboard has failed"):
        track_run(folder, ["tensorboard"])


OFFLINE = """
import socket, sys, threading, time
from pathlib import Path

asked = []
def refuse(*arguments, **_):
    asked.append(str(arguments[-1] if len(arguments) == 2 else arguments))
    raise OSError("there is no network")
socket.socket.connect = refuse
socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
from flapsam.report.tracking import TRACKERS, track_run
track_run(Path(sys.argv[1]), list(TRACKERS))
time.sleep(1)
print(asked)
"""


def test_tracking_does_not_use_the_network(config: RunConfig, tmp_path: Path):
    folder = begun(tmp_path / "run", config, FINISHED)
    # MLflow sends no telemetry where it detects tests or continuous integration.
    hidden = ("CI", "PYTEST_CURRENT_TEST", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "GITHUB_ACTIONS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE, folder], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().splitlines()[-1] == "[]"


def test_a_quiet_run_is_tracked_while_it_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"), modes=["federated", "local"])
    outcome = flapsam(capfd, "simulate", run, "--quiet", "--json", "--track", "tensorboard", "--track", "mlflow")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["folder"] == str(tmp_path / "run")
    events = read_events(tmp_path / "run")
    losses: Curves = {}
    for event in events:
        if event["event"] == "fit":
            losses.setdefault(f"{event['federation']}/{event['site']}/loss", []).append((event["round"], event["loss"]))
    assert len(losses) == 4
    for name in TRACKERS:
        curves = read_curves(tmp_path / "run", name)
        assert {key: curve for key, curve in curves.items() if key.endswith("/loss")} == {
            key: [(step, pytest.approx(value, rel=1e-6)) for step, value in curve] for key, curve in losses.items()
        }
        assert not any(key.startswith("local") and "bytes" in key for key in curves)


def test_all_observers_receive_the_same_calls():
    from flapsam.run.observer import Observers

    class Counter(Observer):
        def __init__(self) -> None:
            self.steps = 0.0

        def step(self, count: float = 1) -> None:
            self.steps += count

    both = Counter(), Counter()
    Observers(*both).step(2)
    assert [observer.steps for observer in both] == [2, 2]
