"""Where a run stands, by a ledger written by hand; and how it is shown."""

import io
import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from flapsam.base.files import alone
from flapsam.report.progress import ConsoleObserver
from flapsam.report.standing import Standing
from flapsam.report.units import duration, rate
from flapsam.run.config import RunConfig
from flapsam.run.ledger import TOGETHER, Cohort, Event, Ledger, RoundClosed, RunEnded
from flapsam.run.reading import read_config
from tests.helpers.command import flapsam
from tests.helpers.ledgers import LEDGER, at, begun, closed, event, fit, site, validation
from tests.helpers.sites import make_sites, write_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return read_config(write_run(tmp_path / "run.yaml", tmp_path, rounds={"count": 4}))


def test_figures_in_the_middle_of_a_run(config: RunConfig):
    standing = Standing(config, LEDGER)
    (one,) = standing.cohorts.values()
    assert (one.rounds, one.planned, one.over, standing.ended) == (2, 4, False, False)
    assert (standing.bytes_up, standing.bytes_down) == (500, 200)
    # What round 2 gave is known of one site only.
    assert one.dice == {1: 0.5}
    assert one.newest == one.best == (1, 0.5)
    assert one.answered == ["a"]
    assert (one.sites["a"].loss, one.sites["a"].dice, one.sites["b"].loss, one.sites["b"].dice) == (0.2, 0.3, 0.3, 0.6)


def test_the_dice_of_a_round_waits_for_all_sites_that_tell_theirs(config: RunConfig):
    one = Standing(config, [*LEDGER, validation(30, "b", 2, 0.5)]).cohorts[TOGETHER]
    assert one.dice == {1: 0.5, 2: pytest.approx(0.4)}
    assert (one.newest, one.best) == ((2, pytest.approx(0.4)), (1, 0.5))
    # A site that is gone keeps it back no longer than the round.
    one = Standing(config, [*LEDGER, closed(30, 3, 10.0)]).cohorts[TOGETHER]
    assert one.dice == {1: 0.5, 2: 0.3}


def test_time_left(config: RunConfig):
    standing = Standing(config, LEDGER)
    # Rounds took 10 s each; two are left, and 7 s of the third are over.
    assert standing.seconds_left(at(27)) == 13
    assert standing.round_seconds_left(at(27)) == 3
    # A round that takes longer than those before is about to end, whatever it takes.
    assert standing.seconds_left(at(500)) == 10
    assert standing.round_seconds_left(at(500)) == 0
    assert Standing(config).seconds_left(at(0)) is None
    assert Standing(config, LEDGER[:4]).seconds_left(at(10)) == 4 * 10 - 10
    assert Standing(config, [*LEDGER, event("end", 40)]).seconds_left(at(50)) == 0


def test_time_left_of_federations_that_have_not_begun(config: RunConfig):
    config = config.model_copy(update={"modes": ["federated", "local", "centralised"]})
    standing = Standing(config, LEDGER)
    assert list(map(str, standing.cohorts)) == ["federated", "local/a", "local/b", "centralised"]
    # In all rounds of each, a's fits take 4 s and b's 6 s, as in the federation.
    assert standing.seconds_left(at(27)) == 13 + 4 * 4 + 4 * 6 + 4 * (4 + 6)


def test_a_run_that_settled_is_over(config: RunConfig):
    events = [*LEDGER[:10], event("delivery", 22, federation="federated", round=2, site="a", bytes_down=60)]
    standing = Standing(config, events)
    assert standing.cohorts[TOGETHER].over
    assert standing.seconds_left(at(22)) == 0
    assert standing.bytes_down == 200
    alone = Standing(config.model_copy(update={"modes": ["federated", "local"]}), [*LEDGER[:10], fit(24, "a", 1, "local/a")])
    assert alone.cohorts[TOGETHER].over
    assert not alone.cohorts[Cohort("local", "a")].over
    # What a site sends to itself does not travel.
    assert alone.bytes_up == 400


def test_what_went_wrong_is_counted(config: RunConfig):
    refused = event("refused", 25, federation="federated", round=3, site="b", reason="not finite", bytes_up=7)
    gone = event("excluded", 26, federation="federated", site="c", reason="another version")
    standing = Standing(config, [*LEDGER, refused, gone])
    assert {kind: len(events) for kind, events in standing.troubles.items()} == {"refused": 1, "missing": 0, "excluded": 1}
    one = standing.cohorts[TOGETHER]
    assert one.sites["b"].trouble == refused
    assert one.bytes_up == 507
    standing.add(fit(30, "b", 3))
    assert one.sites["b"].trouble is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3600, "1 h"), (3720, "1 h 2 min"), (90000, "1 d 1 h")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_rates():
    assert rate(2.5, " steps") == "2.5 steps/s"
    assert rate(0.1) == "10.0 s each"


def shown(config: RunConfig, events: list[Event], *, width: int, works: dict[str, str]) -> list[str]:
    """The lines of the view of a run on a terminal."""
    console = Console(record=True, force_terminal=True, width=width, height=24, file=io.StringIO())
    observer = ConsoleObserver(console)
    observer.opened(config, events)
    observer.begin("federated", 400, 200)
    for name, work in works.items():
        observer.works(name, work)
    console.print(observer._view())
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("width", [80, 100])
def test_a_terminal_shows_the_run(config: RunConfig, width: int):
    lines = shown(config, [*LEDGER, validation(30, "b", 2, 0.5)], width=width, works={"b": "fit"})
    assert lines[0].startswith("federated ━") and "200/400" in lines[0]
    assert lines[1].startswith("round 3 of 4, ")
    assert lines[2] == "validation Dice 0.400 after round 2, best 0.500 after round 1"
    assert lines[3] == "500 B up, 200 B down"
    assert [line.split() for line in lines[5:7]] == [
        ["a", "answered", "in", "4", "s", "0.200", "0.300"],
        ["b", "fits", "0.300", "0.500"],
    ]
    assert len(lines) == 7
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("count", [40, 200])
def test_many_sites_are_counted(config: RunConfig, count: int):
    names = [f"site_{number:03}" for number in range(count)]
    events = [*map(site, names), *(fit(1, name, 1) for name in names[:17])]
    lines = shown(config, events, width=80, works=dict.fromkeys(names[17:22], "fit"))
    counted = f"17 of {count} sites have answered; site_017, site_018, site_019 and 2 more at work"
    assert " ".join(lines[3:]) == counted
    assert len(lines) <= 5


def test_elsewhere_than_on_a_terminal_a_round_is_a_line(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    with ConsoleObserver(Console(stderr=True, force_terminal=False)) as observer:
        observer.opened(config, [])
        observer.begin("federated", 400)
        for one in LEDGER:
            observer.event(one)
        observer.end()
    assert capsys.readouterr().err.splitlines() == [
        "federated",
        "federated: round 1 of 4 in 10 s, 200 B up, 20 B down",
        "federated: round 2 of 4 in 10 s, validation Dice 0.500 after round 1, 400 B up, 140 B down",
        "federated: 2 of 4 rounds done, validation Dice 0.500 after round 1, 500 B up, 200 B down",
    ]


def test_status_of_a_run_elsewhere(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    missing = event("missing", 26, federation="federated", round=3, site="b", reason="did not answer in time")
    folder = begun(tmp_path / "run", config, [*LEDGER, missing])
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "fit", "time": "2026-01-0')
    outcome = flapsam(capfd, "status", folder)
    assert outcome.code == 0
    for part in ("run 5ca1ab1e5ca1", "begun 2026-01-01 12:00:00 UTC", "probably stopped", "2 of 4", "round 3:"):
        assert part in outcome.out
    assert "answers missing: 1, the last b in round 3: did not answer in time" in outcome.out
    lock = alone(folder / "state" / "lock")
    assert "a process is at work on it" in flapsam(capfd, "status", folder).out
    lock.close()
    found = json.loads(flapsam(capfd, "status", folder, "--json").out)
    assert (found["at_work"], found["bytes_up"], found["missing"]["count"]) == (False, 500, 1)
    assert found["federations"]["federated"]["dice"] == {"1": 0.5}


@pytest.mark.parametrize(
    ("events", "text"),
    [([], "begun, no event yet"), ([*LEDGER, event("end", 90)], "ended 2026-01-01 12:01:30 UTC"), (LEDGER[:2], "0 of 4")],
)
def test_status_of_a_run_in_any_state(
    events: list[Event], text: str, config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = begun(tmp_path / "run", config, events)
    assert text in flapsam(capfd, "status", folder).out
    assert json.loads(flapsam(capfd, "status", folder, "--json").out)["ended"] == (text.startswith("ended"))


def test_status_of_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    outcome = flapsam(capfd, "status", tmp_path)
    assert outcome.code == 2
    assert "there is no run here" in outcome.err


def test_following_ends_with_the_run(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = begun(tmp_path / "run", config, LEDGER[:9])

    def go_on() -> None:
        time.sleep(0.3)
        ledger = Ledger(folder / "events.jsonl")
        ledger.write(RoundClosed(cohort=TOGETHER, round=2, seconds=10.0, aggregation_seconds=0.5))
        ledger.write(RunEnded())

    writer = threading.Thread(target=go_on)
    writer.start()
    outcome = flapsam(capfd, "status", folder, "--follow")
    writer.join()
    assert "federated: round 2 of 4 in 10 s" in outcome.out
    assert "ended" in outcome.out.splitlines()[-1]


def test_two_processes_are_never_at_work_on_one_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"))
    lock = alone(tmp_path / "run" / "state" / "lock")
    outcome = flapsam(capfd, "simulate", run)
    lock.close()
    assert outcome.code == 2
    assert "another process is at work here" in outcome.err
    assert not (tmp_path / "run" / "events.jsonl").exists()
