"""A run that is killed at any moment and resumed ends with the same adapter, bit for bit. Real processes, real kill -9."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flapsam.experiments.simulation import simulate
from flapsam.federation.aggregation import AGGREGATORS
from flapsam.federation.aggregation.flexlora import FlexLora
from flapsam.run.reading import read_config
from tests.helpers.ledgers import read_events
from tests.helpers.sites import make_sites, write_run

# FlexLoRA that, if a signal file is given, touches it in the process's second aggregation and waits to be killed.
PROGRAM = """
import sys, time
from pathlib import Path
from flapsam import cli
from flapsam.federation.aggregation import AGGREGATORS
from flapsam.federation.aggregation.flexlora import FlexLora

signal_file = sys.argv.pop(1)
results = 0

class Slow(FlexLora):
    def aggregate(self, *arguments):
        global results
        results += 1
        if signal_file and results == 2:
            Path(signal_file).touch()
            time.sleep(120)
        return super().aggregate(*arguments)

AGGREGATORS["slow"] = Slow
cli.main()
"""


def start(config: Path, *arguments: str, signal_file: Path | str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(signal_file), "simulate", str(config), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output.decode()


def kill_when(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, (process.stdout.read() if process.stdout else b"").decode()
        assert time.monotonic() < deadline, "the moment to kill the process never came"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def files(folder: Path) -> dict[str, bytes]:
    """The files of an adapter except its descriptions, which name the run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("flapsam.json", "README.md")}


FIELDS = {
    "rounds": {"count": 4, "steps": 7},
    "aggregator": "slow",
    "training": {"window": 3, "batch_size": 4, "warmup_steps": 2},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of four rounds. Its data are next to it."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(AGGREGATORS, "slow", FlexLora)
        simulate(read_config(write_run(root / "run.yaml", make_sites(root / "data", sites=3, cases=4), **FIELDS)))
    return root / "run"


def assert_resumed_run_is_equal(uninterrupted: Path, config: Path) -> None:
    finish(start(config, "--resume"))
    run = config.parent / "run"
    assert files(run / "adapter") == files(uninterrupted / "adapter")
    for label_map in (uninterrupted / "predictions").rglob("*.nii.gz"):
        assert (run / label_map.relative_to(uninterrupted)).read_bytes() == label_map.read_bytes()
    # The ledger contains every fit once, with the same figures.
    ledgers = [
        [(e["round"], e["site"], e["loss"], e["bytes_up"]) for e in read_events(folder) if e["event"] == "fit"]
        for folder in (run, uninterrupted)
    ]
    # Packets contain the run's id and the fit's seconds, so their sizes differ by a few bytes.
    assert [entry[:3] for entry in ledgers[0]] == [entry[:3] for entry in ledgers[1]]
    assert [entry[3] for entry in ledgers[0]] == pytest.approx([entry[3] for entry in ledgers[1]], rel=0.01)


def test_a_run_that_is_killed_twice_resumes(uninterrupted: Path, tmp_path: Path):
    """It is killed during a client's fit, and while the server aggregates."""
    config = write_run(tmp_path / "run.yaml", uninterrupted.parent / "data", **FIELDS)
    process = start(config)
    sites = tmp_path / "run" / "state" / "federated" / "sites"
    kill_when(process, lambda: any(sites.glob("site_0/reply-000002-*")))
    # The first site has answered round 2, and the second is still fitting.
    assert not any(sites.glob("site_1/reply-000002-*"))
    process = start(config, "--resume", signal_file=tmp_path / "aggregating")
    kill_when(process, (tmp_path / "aggregating").exists)
    assert not (tmp_path / "run" / "adapter").exists()
    assert_resumed_run_is_equal(uninterrupted, config)
