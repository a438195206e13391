"""Sites fitted in parallel: the same result, clear errors, and no process left behind."""

import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.experiments.simulation import simulate
from flapsam.run.reading import read_config
from tests.helpers.ledgers import read_events
from tests.helpers.sites import make_sites, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("data"), sites=3, cases=3)


def adapter(run: Path) -> dict[str, bytes]:
    paths = [path for folder in run.glob("adapter*") for path in folder.rglob("*.safetensors")]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def recorded(run: Path) -> list[tuple]:
    """The ledger's events without durations and sizes, which differ between runs."""
    fields = ("event", "federation", "round", "site", "slices", "loss", "dice")
    kinds = ("fit", "round", "validation", "kept", "test")
    return [tuple(str(e.get(field)) for field in fields) for e in read_events(run) if e["event"] in kinds]


def test_a_run_whose_worker_died_resumes_with_the_result_of_a_run_without_workers(data: Path, tmp_path: Path):
    fields = {"rounds": {"count": 3, "last_epochs": 1}, "personal": ["*.lora_B.weight"]}
    config = read_config(write_run(tmp_path / "run.yaml", data, **fields))
    run = tmp_path / "run"

    def kill_a_worker() -> None:
        while not any((run / "state/federated/sites/site_0").glob("reply-000002-*")):
            time.sleep(0.005)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill_a_worker, daemon=True).start()
    with pytest.raises(FlapsamError, match="a worker has died"):
        simulate(config, workers=2)
    simulate(config, workers=2, resume=True)
    assert not multiprocessing.active_children()
    serial = tmp_path / "serial" / "run"
    simulate(read_config(write_run(serial.parent / "run.yaml", data, **fields)))
    assert adapter(run) == adapter(serial) and len(adapter(run)) == 4
    assert recorded(run) == recorded(serial)


def test_an_interruption_also_ends_the_workers(data: Path, tmp_path: Path):
    config = write_run(tmp_path / "run.yaml", data, rounds={"count": 50})
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from flapsam import cli; cli.main()"
    command = [sys.executable, "-c", program, "simulate", str(config), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    while not list((tmp_path / "run").rglob("reply-*.packet")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, b"add --resume to continue" in output, b"Traceback" in output) == (130, True, False)
    deadline = time.monotonic() + 10
    while left := subprocess.run(["pgrep", "--session", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
