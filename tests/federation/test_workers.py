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


def run_with(folder: Path, data: Path, workers: int, **fields: object) -> Path:
    simulate(read_config(write_run(folder / "run.yaml", data, **fields)), workers=workers)
    return folder / "run"


def adapter(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "adapter").glob("*.safetensors")}


def recorded(run: Path) -> list[tuple]:
    """The ledger's events without durations and sizes, which differ between runs."""
    fields = ("event", "federation", "round", "site", "slices", "loss", "dice")
    return [tuple(str(event.get(field)) for field in fields) for event in read_events(run)]


def test_workers_do_not_change_the_result(data: Path, tmp_path: Path):
    fields = {"modes": ["local", "federated"], "rounds": {"count": 2}}
    serial, parallel = (run_with(tmp_path / str(count), data, count, **fields) for count in (1, 2))
    assert adapter(serial) == adapter(parallel)
    assert recorded(serial) == recorded(parallel)
    assert not multiprocessing.active_children()


def test_a_run_whose_worker_died_ends_with_an_error_and_resumes(data: Path, tmp_path: Path):
    config = read_config(write_run(tmp_path / "run.yaml", data, rounds={"count": 3}))
    site = tmp_path / "run/state/federated/sites/site_0"

    def kill_a_worker() -> None:
        while not any(site.glob("reply-000002-*")):
            time.sleep(0.005)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill_a_worker, daemon=True).start()
    with pytest.raises(FlapsamError, match="a worker has died"):
        simulate(config, workers=2)
    simulate(config, workers=2, resume=True)
    uninterrupted = run_with(tmp_path / "whole", data, 1, rounds={"count": 3})
    assert adapter(tmp_path / "run") == adapter(uninterrupted)


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
