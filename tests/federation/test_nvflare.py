"""Hospitals on NVFLARE: real processes and mutual TLS on loopback. Each test covers what can happen at real sites."""

import importlib.util
import json
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel
import psutil
import pytest
import yaml
import zstandard
from safetensors import safe_open

from flapsam import __version__
from flapsam.experiments.simulation import simulate
from flapsam.federation.hospitals.handshake import REASONS
from flapsam.federation.privacy.budget import Budget
from flapsam.run.reading import fingerprint, read_config
from tests.helpers.command import flapsam
from tests.helpers.hospitals import Hospitals, adapter_of, kill_all, rounds_done, until
from tests.helpers.ledgers import read_events
from tests.helpers.sites import load, write_run

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("flapsam[nvflare] is not installed", allow_module_level=True)

from flapsam.federation.engines.nvflare.commands import NOT_OURS
from flapsam.federation.engines.nvflare.definition import write_job
from flapsam.federation.engines.nvflare.jobs import AdminLine
from flapsam.federation.engines.nvflare.kits import read_kit

pytestmark = pytest.mark.timeout(600)


CASE, PATIENT, PATH, USER = "mueller-knee", "PATIENT-4711", "st-elsewhere", "drhouse"
"""Markers that must not leave a site: in a case's name, in its header, in paths, and as the user's name."""


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """A server with three connected sites."""
    own, environment = f"own-{PATH}", {"USER": USER, "LOGNAME": USER, "HOME": f"/home/{USER}"}
    federation = Hospitals(
        tmp_path_factory.mktemp("federation"), ["site_a", "site_b", "site_c"], own, environment, spare=["site_d"]
    )
    federation.use_earlier_kit("site_c")
    federation.make_data()
    for path in [*federation.data.glob("*/images/*"), *federation.data.glob("*/labels/*")]:
        image = load(path)
        image.header["descrip"] = PATIENT.encode()
        nibabel.save(image, path.with_name(f"{CASE}-{path.name}"))
        path.unlink()
    try:
        federation.start_all()
        yield federation
    finally:
        federation.stop_all()


@pytest.fixture(autouse=True)
def _no_leftover_run(hospitals: Hospitals) -> Iterator[None]:
    """Stop a run that a failed test left behind, since it would block the next test."""
    yield
    leftover = [process for name, process in hospitals.running.items() if name.startswith("run-") and process.poll() is None]
    for process in leftover:
        kill_all(process)
    if leftover:
        hospitals.flapsam("stop", "--kit", hospitals.kit("coordinator"))


@pytest.fixture(scope="module")
def simulated(hospitals: Hospitals) -> Callable[[Path], dict[str, bytes]]:
    """A function that simulates a run and returns its adapter. Runs of the same configuration share one simulation."""
    adapters: dict[str, dict[str, bytes]] = {}

    def run(path: Path) -> dict[str, bytes]:
        config = read_config(path, [f"output={path.parent / 'simulated'}"])
        key = fingerprint(config)
        if key not in adapters:
            simulate(config)
            adapters[key] = adapter_of(config.output)
        return adapters[key]

    return run


def run_of(folder: Path, hospitals: Hospitals, *, spare: bool = False, **fields: Any) -> Path:
    """Write the configuration of a run of the first three sites, or of all four."""
    path = write_run(folder / "run.yaml", hospitals.data, **fields)
    tree = yaml.safe_load(path.read_text())
    tree["data"]["sites"] = hospitals.sites + hospitals.spare * spare
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_federation_reproduces_the_simulations_adapter_with_little_overhead(
    hospitals: Hospitals, tmp_path: Path, simulated
):
    """Every site's own adapter is that of the simulation, too, and what is personal in it never leaves the site.

    Each site also scores the shared adapter on its test cases, and does so again when it is asked to evaluate it.
    """
    fields: dict[str, Any] = {"rounds": {"count": 3, "last_epochs": 1}, "personal": ["*.v_proj.lora_B.weight"]}
    config = run_of(tmp_path, hospitals, **fields)
    hospitals.start_run(config)
    hospitals.follow(config)
    run = tmp_path / "run"
    assert adapter_of(run) == simulated(config)
    for site in hospitals.sites:
        (own,) = (hospitals.state_of(site) / "runs").iterdir()
        assert adapter_of(own) == adapter_of(run)
        kept = adapter_of(own, "adapter-personal")
        assert kept == adapter_of(tmp_path / "simulated", f"adapter-personal/{site}")
        assert not [path for path in (hospitals.kit("server"), run) for path in path.rglob("*personal*")]
    results = json.loads((tmp_path / "simulated" / "results.json").read_text())["summaries"]["federated"]
    told = {event["site"]: event["scores"]["mean"]["mean"] for event in read_events(run, "site_test")}
    assert told == {site: pytest.approx(results[site]["mean_dice"], abs=5e-4) for site in hospitals.sites}
    (evaluated,) = hospitals.evaluate(tmp_path / "evaluation", run)
    assert {site: scores["mean"]["mean"] for site, scores in evaluated["sites"].items()} == told
    for event in read_events(run, "round"):
        fits = [fit["site_seconds"] for fit in read_events(run, "fit") if fit["round"] == event["round"]]
        assert len(fits) == 3
        assert event["seconds"] - max(fits) < 2


PRIVATE: dict[str, Any] = {
    "training": {"window": 1, "batch_size": 8, "warmup_steps": 2, "schedule_epochs": None},
    "privacy": {"epsilon": 8, "delta": 1e-3},
}
"""A run with differential privacy."""


def test_no_private_data_of_a_site_cross_the_wire_or_reach_the_server(hospitals: Hospitals, tmp_path: Path):
    """Covers the run above and a private one in which one site's data are broken, so that there is an error to report."""
    fields: dict[str, Any] = {**PRIVATE, "rounds": {"count": 2, "steps": 3, "weights": "uniform", "require": 2}}
    config, run = run_of(tmp_path, hospitals, **fields), tmp_path / "run"
    broken = next((hospitals.data / "site_c" / "labels").iterdir())
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    hospitals.start_run(config)
    output = hospitals.follow(config)
    broken.write_bytes(whole)
    assert f"site_c does not take part: {REASONS['data']}" in output
    own_log = (hospitals.state_of("site_c") / "site.log").read_text()
    assert broken.name in own_log
    # Of a private run, the server learns no count, loss or score.
    assert [set(event["cases"].values()) for event in read_events(run, "site")] == [{0}, {0}]
    fits = read_events(run, "fit")
    assert len(fits) == 4 and all(not fit["slices"] for fit in fits)
    assert {fit.get(told) for fit in fits for told in ("loss", "steps", "seconds", "site_seconds")} == {None}
    assert not read_events(run, "validation")
    sent = bytes(hospitals.proxy.record)
    packets = [path.read_bytes() for site in hospitals.sites for path in hospitals.state_of(site).rglob("reply-*.packet")]
    opened = [zstandard.ZstdDecompressor().decompress(packet[40:], 1 << 24) for packet in packets]
    at_server = [path.read_bytes() for root in (hospitals.kit("server"), run) for path in root.rglob("*") if path.is_file()]
    # The search finds what does travel, so it would also find what must not.
    assert hospitals.proxy.callers == set(hospitals.sites)
    assert b"FLAPSAM2" in sent and all(site.encode() in sent for site in hospitals.sites)
    assert len(packets) >= 3 and any(packet in sent for packet in packets)
    assert any(b"site_a" in content for content in at_server)
    for marker in (CASE, PATIENT, PATH, USER):
        for content in (sent, *opened, *at_server):
            assert marker.lower().encode() not in content.lower()


LONG: dict[str, Any] = {"rounds": {"count": 4}, "training": {"window": 1, "batch_size": 8, "warmup_steps": 2, "epochs": 8}}
"""A run whose fits take seconds, which leaves time to kill something."""


def fitting(hospitals: Hospitals, site: str, run: Path) -> int:
    """The round that a site is working on: the one after the round of the tensors that it holds."""
    if not rounds_done(run):
        return 0
    identity = json.loads((run / "environment.json").read_text())["run"]
    with safe_open(hospitals.state_of(site) / "runs" / identity / "site" / "held.safetensors", "pt") as file:
        return json.loads(file.metadata()["about"])["round"] + 1


def descendant(hospitals: Hospitals, name: str, module: str) -> psutil.Process:
    (process,) = (
        child
        for child in psutil.Process(hospitals.running[name].pid).children(recursive=True)
        if any(module in part for part in child.cmdline())
    )
    return process


def test_a_killed_fit_misses_only_its_own_round_and_a_killed_site_rejoins(hospitals: Hospitals, tmp_path: Path):
    """A fit that runs out of memory is killed in the same way, and so is a site whose machine loses power.

    The run is private, and a fit that was killed counts as one that may have told something. It has secure aggregation, too,
    for which at least three of the four sites must be left in a round.
    """
    hospitals.start_site("site_d")
    until(lambda: "Connected to the server" in hospitals.said("site_d"))
    rounds = {"count": 6, "steps": 60, "weights": "uniform", "require": 3}
    fields: dict[str, Any] = {**PRIVATE, "rounds": rounds, "secure": True}
    config, run = run_of(tmp_path, hospitals, spare=True, **fields), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: fitting(hospitals, "site_b", run) == 2)
    descendant(hospitals, "site_b", "fit_process").kill()
    until(lambda: rounds_done(run) == 2)
    kill_all(hospitals.running["site_c"])
    time.sleep(10)
    hospitals.start_site("site_c")
    output = hospitals.follow(config, seconds=360)
    kill_all(hospitals.running["site_d"])
    missing = read_events(run, "missing")
    fits = {site: {fit["round"] for fit in read_events(run, "fit") if fit["site"] == site} for site in hospitals.sites}
    assert [(e["round"], e["reason"]) for e in missing if e["site"] == "site_b"] == [(2, REASONS["died"])]
    assert fits["site_a"] == {1, 2, 3, 4, 5, 6} and fits["site_b"] == {1, 3, 4, 5, 6}
    assert "site_c: connected, will take part after this round." in output
    missed = {event["round"] for event in missing if event["site"] == "site_c"}
    assert 3 in missed and missed | fits["site_c"] == {1, 2, 3, 4, 5, 6} and max(fits["site_c"]) == 6
    assert [job["outcome"] for job in read_events(run, "job_end")] == ["regroup", "done"]
    assert adapter_of(run)
    sums = {event["round"]: set(event["sites"]) for event in read_events(run, "summed")}
    assert sums == {number: {site for site in fits if number in fits[site]} | {"site_d"} for number in range(1, 7)}
    identity = json.loads((run / "environment.json").read_text())["run"]
    for site in hospitals.sites:
        spent = Budget(hospitals.state_of(site) / "privacy.jsonl").spent()
        assert {entry.round for entry in spent if entry.run == identity} >= fits[site]


def test_by_default_nobody_is_left_out_however_slow_it_is_and_even_if_it_was_gone(
    hospitals: Hospitals, tmp_path: Path, simulated
):
    """The deadline is a second. One fit is halted for five, and then another site's machine is switched off and on."""
    fields = {**LONG, "rounds": {**LONG["rounds"], "deadline": 1}}
    config, run = run_of(tmp_path, hospitals, **fields), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: fitting(hospitals, "site_b", run) == 2)
    fit = descendant(hospitals, "site_b", "fit_process")
    fit.suspend()
    until(lambda: [event for event in read_events(run, "awaited") if event["site"] == "site_b"])
    time.sleep(5)
    assert rounds_done(run) == 1
    fit.resume()
    until(lambda: rounds_done(run) == 2)
    kill_all(hospitals.running["site_c"])
    until(lambda: "the run waits for site_c (rounds.require)" in hospitals.said("run-run"))
    hospitals.start_site("site_c")
    output = hospitals.follow(config, seconds=360)
    assert "site_b has not answered for" in output and "The run waits for it, because it is required" in output
    rounds = range(1, LONG["rounds"]["count"] + 1)
    for site in hospitals.sites:
        assert {event["round"] for event in read_events(run, "fit") if event["site"] == site} == {*rounds}
    assert adapter_of(run) == simulated(config)
    assert "All 3 sites took part in every round." in (run / "adapter" / "README.md").read_text()


def test_with_a_number_of_required_sites_a_slow_one_is_left_out_after_a_warning(hospitals: Hospitals, tmp_path: Path):
    rounds = {**LONG["rounds"], "count": 2, "deadline": 30, "require": 2}
    config, run = run_of(tmp_path, hospitals, **{**LONG, "rounds": rounds}), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: fitting(hospitals, "site_b", run) == 2)
    fit = descendant(hospitals, "site_b", "fit_process")
    fit.suspend()
    until(lambda: [event for event in read_events(run, "missing") if event["site"] == "site_b"], 240)
    fit.resume()
    output = hospitals.follow(config)
    fits = [event for event in (*read_events(run, "awaited"), *read_events(run, "missing")) if event["work"] == "fit"]
    warned, missing = (event for event in fits if (event["site"], event["round"]) == ("site_b", 2))
    assert (warned["event"], missing["event"]) == ("awaited", "missing") and warned["time"] < missing["time"]
    # Counts are rounded to multiples of 5, so that each of the three sites has a third.
    assert "the run continues without it and its 33% of the training cases" in output
    card = (run / "adapter" / "README.md").read_text()
    assert "All 3 sites took part in 1 of 2 rounds. The smallest was round 2, in which 2 of 3 sites took part" in card


def test_neither_a_stop_nor_a_repeated_round_nor_a_killed_server_changes_the_adapter(
    hospitals: Hospitals, tmp_path: Path, simulated, capfd
):
    config, run = run_of(tmp_path, hospitals, **LONG), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: rounds_done(run) == 2)
    # One fit is suspended, so that the run cannot end before it is stopped.
    fit = descendant(hospitals, "site_a", "fit_process")
    fit.suspend()
    assert flapsam(capfd, "federation", "stop", "--kit", hospitals.kit("coordinator")).out == "Jobs stopped: 1\n"
    with suppress(psutil.NoSuchProcess):
        fit.resume()
    assert "the run was stopped; run the same command to resume" in hospitals.follow(config, code=2)
    hospitals.start_run(config, "--from-round", "2")
    until(lambda: rounds_done(run) == 1)
    until(lambda: rounds_done(run) == 2)
    kill_all(hospitals.running["server"])
    hospitals.start_server()
    assert "The server was restarted" in hospitals.follow(config)
    assert [job["outcome"] for job in read_events(run, "job_end")] == ["aborted", "done"]
    assert not read_events(run, "missing")
    assert adapter_of(run) == simulated(config)


def test_a_server_killed_while_it_writes_its_state_does_not_change_the_adapter(
    hospitals: Hospitals, tmp_path: Path, simulated
):
    fields: dict[str, Any] = {"strategy": "full", "compression": {"codec": "fp32"}, "secure": True, "rounds": {"count": 4}}
    config, run = run_of(tmp_path, hospitals, **fields), tmp_path / "run"
    hospitals.start_run(config)
    until(lambda: rounds_done(run) == 1)
    job = descendant(hospitals, "server", "server-job")
    state = run / "state" / "federated" / "server"
    while True:
        if any(path.name.startswith(".part-") and "round" in path.name for path in state.iterdir()):
            job.suspend()
            if partial := list(state.glob(".part-*round*")):
                break
            job.resume()
        time.sleep(0.001)
        assert not read_events(run, "end")
    kill_all(hospitals.running["server"])
    assert [path for path in partial if path.exists()]
    hospitals.start_server()
    hospitals.follow(config)
    assert adapter_of(run) == simulated(config)


def test_a_connection_without_a_certificate_is_refused(hospitals: Hospitals):
    context = ssl.create_default_context(cafile=str(hospitals.kit("server") / "startup/rootCA.pem"))
    context.set_alpn_protocols(["h2"])
    with (
        suppress(ConnectionResetError, ssl.SSLError),
        socket.create_connection(("localhost", hospitals.port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as caller,
    ):
        caller.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert caller.recv(100) == b""
    until(lambda: "Refused: a connection without a certificate." in hospitals.said("server"))


def test_check_finds_no_problem_at_a_site_that_is_ready(hospitals: Hospitals, tmp_path: Path):
    own = hospitals.folder / hospitals.own / "site_a.yaml"
    config = write_run(tmp_path / "run.yaml", tmp_path)
    output = hospitals.flapsam("check", hospitals.kit("site_a"), "--data", own, "--config", config, "--json")
    findings = json.loads(output[output.index("[") : output.rindex("]") + 1])
    assert all(finding["fine"] for finding in findings)
    assert [finding["what"] for finding in findings] == [
        *("certificate", "network", "data", "disk", "run"),
        *["asks"] * 5,
        "memory",
    ]
    assert "Figures over 1 or more patients leave this site" in findings[8]["about"]
    assert "Leaves this site in each round" in findings[9]["about"]


def test_a_certificate_from_another_federation_is_refused(hospitals: Hospitals, tmp_path: Path):
    foreign = Hospitals(tmp_path, ["site_a"])
    foreign.make_data()
    foreign.point("site_a", hospitals.port)
    foreign.start_site("site_a")
    own = tmp_path / "own" / "site_a.yaml"
    assert "cannot be reached" in foreign.flapsam("check", foreign.kit("site_a"), "--data", own, code=2)
    before = hospitals.said("server").count("site_a has connected")
    refused = "Refused: the other side's certificate is not from this federation."
    until(lambda: refused in foreign.said("site_a"))
    foreign.stop_all()
    assert "Connected" not in foreign.said("site_a")
    assert hospitals.said("server").count("site_a has connected") == before


def test_a_sites_certificate_is_refused_under_another_name(hospitals: Hospitals, tmp_path: Path):
    thief = Hospitals(tmp_path, ["site_b"])
    thief.make_data()
    shutil.rmtree(thief.kit("site_b"))
    shutil.copytree(hospitals.kit("site_b"), thief.kit("site_b"))
    for name in ("client.crt", "client.key"):
        shutil.copy(hospitals.kit("site_a") / "startup" / name, thief.kit("site_b") / "startup" / name)
    thief.point("site_b", hospitals.port)
    thief.start_site("site_b")
    until(lambda: "Refused: site_a's certificate, used as site_b." in hospitals.said("server"))
    thief.stop_all()
    assert "Connected" not in thief.said("site_b")


def submit(hospitals: Hospitals, folder: Path, change: Callable[[Path], None]) -> str:
    """Submit a modified job as the coordinator and return its final status."""
    job = write_job(folder, "0" * 32, folder, hospitals.sites, 1)
    change(job)
    with AdminLine(read_kit(hospitals.kit("coordinator"), "coordinator")) as line:
        identity = line.ask(lambda session: session.submit_job(str(job)))
        until(lambda: str(line.ask(lambda s: s.get_job_meta(identity))["status"]).startswith("FINISHED"))
        return json.dumps(line.ask(lambda session: session.get_job_meta(identity)))


def add_code(job: Path) -> None:
    (job / "site" / "custom").mkdir()
    (job / "site" / "custom" / "spy.py").write_text("open('/tmp/spied', 'w')")


def name_another_class(job: Path) -> None:
    path = job / "site/config/config_fed_client.json"
    path.write_text(path.read_text().replace("flapsam.federation.engines.nvflare.executor.FlapsamExecutor", OTHER_CLASS))


OTHER_CLASS = "nvflare.app_common.executors.statistics.statistics_executor.StatisticsExecutor"


@pytest.fixture(scope="module")
def malicious(hospitals: Hospitals) -> Hospitals:
    """From here on, the server allows everything, so it is the sites themselves that refuse.

    Its kit and the coordinator's are those of version 0.1.0, as site_c's kit is from the beginning.
    """
    kill_all(hospitals.running["server"])
    for name in ("server", "coordinator"):
        hospitals.use_earlier_kit(name)
    make_careless(hospitals.kit("server"))
    before = len(hospitals.said("server"))
    hospitals.start_server()
    until(lambda: all(f"{site} is back" in hospitals.said("server")[before:] for site in hospitals.sites))
    return hospitals


def make_careless(kit: Path) -> None:
    for name, change in (
        ("authorization.json", lambda tree: tree["permissions"].update(project_admin="any")),
        ("resources.json", lambda tree: tree.update(class_allow_list=["*"])),
    ):
        path = kit / "local" / name
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))


def test_a_site_refuses_a_forbidden_strategy_and_a_server_of_another_version(malicious: Hospitals, tmp_path: Path):
    """The run also shows that kits of version 0.1.0 still work: server and coordinator have such kits here."""
    hospitals = malicious
    (tmp_path / "sitecustomize.py").write_text("import flapsam.base.version\nflapsam.base.version.__version__ = '0.0.1'\n")
    for site in ("site_b", "site_c"):
        kill_all(hospitals.running[site])
    hospitals.start_site("site_b", strategies=["lora"])
    hospitals.start_site("site_c", environment={"PYTHONPATH": str(tmp_path)})
    until(lambda: all(hospitals.said(site).rstrip().endswith("Connected to the server.") for site in ("site_b", "site_c")))
    config = run_of(tmp_path, hospitals, rounds={"count": 1, "min_sites": 1, "require": 1})
    hospitals.start_run(config)
    output = hospitals.follow(config)
    assert f"site_b does not take part: {REASONS['strategy']}" in output
    assert f"site_c does not take part: it runs flapsam 0.0.1, the server runs {__version__}" in output
    assert {event["site"] for event in read_events(tmp_path / "run", "fit")} == {"site_a"}
    assert adapter_of(tmp_path / "run")
    assert (
        "the run's strategy is flap, this site's strategies are lora"
        in (hospitals.state_of("site_b") / "site.log").read_text()
    )
    assert (
        f"the server runs flapsam {__version__}, this site runs 0.0.1"
        in (hospitals.state_of("site_c") / "site.log").read_text()
    )


@pytest.mark.parametrize("change", [add_code, name_another_class])
def test_a_site_refuses_a_job_that_is_not_flapsams_own(change: Callable[[Path], None], malicious: Hospitals, tmp_path: Path):
    log = malicious.kit("server") / "log.txt"
    before = len(log.read_text())
    assert "FINISHED:COMPLETED" not in submit(malicious, tmp_path, change)
    until(lambda: all(f"{site}: {NOT_OURS}" in log.read_text()[before:] for site in malicious.sites))
    until(lambda: "Refused: a job that is not flapsam's own." in malicious.said("server"))
    assert not [path for site in malicious.sites for path in malicious.kit(site).rglob("spy.py")]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_participant_leaves_no_process_behind_when_it_ends(ending: signal.Signals, hospitals: Hospitals):
    process = hospitals.running["site_b" if ending == signal.SIGINT else "site_c"]
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(ending)
    assert process.wait(20) == 0
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
