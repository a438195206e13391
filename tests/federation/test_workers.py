"""Sites fitted side by side: the same result, and an end that says what happened."""

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


def told(run: Path) -> list[tuple]:
    """The ledger without times and sizes, which hold the fits' seconds."""
    fields = ("event", "federation", "round", "site", "slices", "loss", "dice")
    return [tuple(str(event.get(field)) for field in fields) for event in read_events(run)]


def test_workers_change_nothing(data: Path, tmp_path: Path):
    fields = {"modes": ["local", "federated"], "rounds": {"count": 2}}
    alone, together = (run_with(tmp_path / str(count), data, count, **fields) for count in (1, 2))
    assert adapter(alone) == adapter(together)
    assert told(alone) == told(together)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_ends_the_run_with_a_sentence_and_it_is_gone_on_with(data: Path, tmp_path: Path):
    config = read_config(write_run(tmp_path / "run.yaml", data, rounds={"count": 6}))
    reply = tmp_path / "run/state/federated/sites/site_0/reply-000002.packet"

    def kill_one() -> None:
        while not reply.exists():
            time.sleep(0.005)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(FlapsamError, match="a worker has died"):
        simulate(config, workers=2)
    simulate(config, workers=2, resume=True)
    whole = run_with(tmp_path / "whole", data, 1, rounds={"count": 6})
    assert adapter(tmp_path / "run") == adapter(whole)


def test_an_interruption_ends_the_workers_too(data: Path, tmp_path: Path):
    config = write_run(tmp_path / "run.yaml", data, rounds={"count": 50})
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from flapsam import cli; cli.main()"
    command = [sys.executable, "-c", start, "simulate", str(config), "--workers", "2"]
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
