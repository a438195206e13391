"""Hospitals on NVFLARE: real processes and mutual TLS on loopback. Each test says what would go wrong at real sites."""

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import psutil
import pytest
import zstandard
from federationmaker import Hospitals, adapter_of, events, kill_all, rounds_done, until
from safetensors import safe_open
from sitemaker import load, write_run

from flapsam.config import read_config
from flapsam.experiments.simulation import simulate
from flapsam.federation.handshake import REASONS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("nvflare") is None, reason="flapsam[nvflare] is not installed"),
    pytest.mark.timeout(240),
]


CASE, PATIENT, PATH, USER = "mueller-knee", "PATIENT-4711", "st-elsewhere", "drhouse"
"""What must not leave a site: in a case's name, in its header, in paths, and as the user's name."""


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """A server and three sites that are connected."""
    own, environment = f"own-{PATH}", {"USER": USER, "LOGNAME": USER, "HOME": f"/home/{USER}"}
    made = Hospitals(tmp_path_factory.mktemp("federation"), ["site_a", "site_b", "site_c"], own, environment)
    made.make_data()
    for path in [*made.data.glob("*/images/*"), *made.data.glob("*/labels/*")]:
        image = load(path)
        image.header["descrip"] = PATIENT.encode()
        nibabel.save(image, path.with_name(f"{CASE}-{path.name}"))
        path.unlink()
    try:
        made.start_all()
        yield made
    finally:
        made.stop_all()


@pytest.fixture(autouse=True)
def _nothing_left(hospitals: Hospitals) -> Iterator[None]:
    """A run that a failed test leaves behind would hold up the next one."""
    yield
    left = [process for name, process in hospitals.running.items() if name.startswith("run-") and process.poll() is None]
    for process in left:
        kill_all(process)
    if left:
        hospitals.flapsam("stop", "--kit", hospitals.kit("coordinator"))


def simulated(config: Path) -> dict[str, bytes]:
    simulate(read_config(config, [f"output={config.parent / 'simulated'}"]))
    return adapter_of(config.parent / "simulated")


def test_a_federation_gives_the_simulations_adapter_bit_for_bit_with_little_overhead(hospitals: Hospitals, tmp_path: Path):
    config = write_run(tmp_path / "run.yaml", hospitals.data, rounds={"count": 4})
    hospitals.start_run(config)
    hospitals.follow(config)
    run = tmp_path / "run"
    assert adapter_of(run) == simulated(config)
    for site in hospitals.sites:
        (own,) = (hospitals.state_of(site) / "runs").iterdir()
        assert adapter_of(own) == adapter_of(run)
    for event in events(run, "round"):
        fits = [fit["site_seconds"] for fit in events(run, "fit") if fit["round"] == event["round"]]
        assert len(fits) == 3
        assert event["seconds"] - max(fits) < 2


def test_nothing_of_a_site_is_at_the_server_or_crossed_the_wire(hospitals: Hospitals, tmp_path: Path):
    """After the run above, and one in which a site's data are broken, so that there are errors to tell."""
    config, run = write_run(tmp_path / "run.yaml", hospitals.data), tmp_path / "run"
    broken = next((hospitals.data / "site_c" / "labels").iterdir())
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    hospitals.start_run(config)
    said = hospitals.follow(config)
    broken.write_bytes(whole)
    assert f"site_c does not take part: {REASONS['data']}" in said
    own_log = (hospitals.state_of("site_c") / "site.log").read_text()
    assert broken.name in own_log
    sent = bytes(hospitals.proxy.record)
    packets = [path.read_bytes() for site in hospitals.sites for path in hospitals.state_of(site).rglob("reply-*.packet")]
    opened = [zstandard.ZstdDecompressor().decompress(packet[40:], 1 << 24) for packet in packets]
    at_server = [path.read_bytes() for root in (hospitals.kit("server"), run) for path in root.rglob("*") if path.is_file()]
    # What is looked for is found where it should be, so it would be found elsewhere.
    assert hospitals.proxy.callers == set(hospitals.sites)
    assert b"FLAPSAM2" in sent and all(site.encode() in sent for site in hospitals.sites)
    assert len(packets) >= 3 and any(packet in sent for packet in packets)
    assert any(b"site_a" in content for content in at_server)
    for marker in (CASE, PATIENT, PATH, USER):
        for content in (sent, *opened, *at_server):
            assert marker.lower().encode() not in content.lower()


LONG = {"rounds": {"count": 4}, "training": {"window": 1, "batch_size": 8, "warmup_steps": 2, "epochs": 30}}
"""A run whose fits take seconds, in which there is time to kill something."""


def fitting(hospitals: Hospitals, site: str, run: Path) -> int:
    """The round that a site works at: one more than those that went into the tensors that it has received."""
    if not rounds_done(run):
        return 0
    identity = json.loads((run / "environment.json").read_text())["run"]
    with safe_open(hospitals.state_of(site) / "runs" / identity / "site" / "held.safetensors", "pt") as file:
        return json.loads(file.metadata()["about"])["round"] + 1


def descendant(hospitals: Hospitals, name: str, module: str) -> psutil.Process:
    (found,) = (
        child
        for child in psutil.Process(hospitals.running[name].pid).children(recursive=True)
        if any(module in part for part in child.cmdline())
    )
    return found


def test_a_fit_that_is_killed_misses_its_round_and_no_other(hospitals: Hospitals, tmp_path: Path):
    """As a fit does that runs out of memory."""
    config, run = write_run(tmp_path / "run.yaml", hospitals.data, **LONG), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: fitting(hospitals, "site_b", run) == 2)
    descendant(hospitals, "site_b", "site_process").kill()
    hospitals.follow(config)
    assert [(e["round"], e["site"], e["reason"]) for e in events(run, "missing")] == [(2, "site_b", REASONS["died"])]
    answered = [sum(fit["round"] == number for fit in events(run, "fit")) for number in (1, 2, 3, 4)]
    assert answered == [3, 2, 3, 3]
    assert [job["outcome"] for job in events(run, "job_end")] == ["done"]
    assert adapter_of(run)


def test_a_site_that_is_killed_takes_part_again_when_it_is_back(hospitals: Hospitals, tmp_path: Path):
    fields = {**LONG, "rounds": {"count": 6}}
    config, run = write_run(tmp_path / "run.yaml", hospitals.data, **fields), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: rounds_done(run) == 1)
    kill_all(hospitals.running["site_c"])
    time.sleep(10)
    hospitals.start_site("site_c")
    said = hospitals.follow(config, seconds=180)
    assert "site_c is there: takes part after this round." in said
    missed = {event["round"] for event in events(run, "missing")}
    fitted = {fit["round"] for fit in events(run, "fit") if fit["site"] == "site_c"}
    assert 2 in missed and missed | fitted == {1, 2, 3, 4, 5, 6} and max(fitted) == 6
    assert [job["outcome"] for job in events(run, "job_end")] == ["regroup", "done"]
    assert adapter_of(run)


def test_a_server_that_is_killed_gives_the_adapter_that_it_would_have_given(hospitals: Hospitals, tmp_path: Path):
    config, run = write_run(tmp_path / "run.yaml", hospitals.data, **LONG), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: rounds_done(run) == 1)
    kill_all(hospitals.running["server"])
    hospitals.start_server()
    assert "The server was started anew" in hospitals.follow(config)
    assert not events(run, "missing")
    assert adapter_of(run) == simulated(config)


def test_a_server_that_is_killed_while_it_writes_its_state_does_too(hospitals: Hospitals, tmp_path: Path):
    fields = {"strategy": "full", "compression": {"codec": "fp32"}, "aggregator": "fedavg", "rounds": {"count": 5}}
    config, run = write_run(tmp_path / "run.yaml", hospitals.data, **fields), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: rounds_done(run) == 1)
    job = descendant(hospitals, "server", "runner_process")
    state = run / "state" / "federated" / "server"
    while True:
        if any(path.name.startswith(".part-") and "round" in path.name for path in state.iterdir()):
            job.suspend()
            if half := list(state.glob(".part-*round*")):
                break
            job.resume()
        assert not events(run, "end")
    kill_all(hospitals.running["server"])
    assert [path for path in half if path.exists()]
    hospitals.start_server()
    hospitals.follow(config)
    assert adapter_of(run) == simulated(config)
