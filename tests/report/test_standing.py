"""The progress of a run, computed from a ledger written by hand, and how it is shown."""

import io
import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from flapsam.base.files import alone, write_text
from flapsam.report.progress import ConsoleObserver
from flapsam.report.standing import Standing
from flapsam.report.units import duration, rate
from flapsam.run.config import RunConfig
from flapsam.run.ledger import TOGETHER, Cohort, Event, Ledger, LedgerReader, RoundClosed, RunEnded
from flapsam.run.reading import read_config
from tests.helpers.command import flapsam
from tests.helpers.ledgers import LEDGER, at, begun, closed, event, fit, site, validation
from tests.helpers.sites import make_sites, write_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return read_config(write_run(tmp_path / "run.yaml", tmp_path, rounds={"count": 4}))


def test_the_figures_of_an_unfinished_run(config: RunConfig):
    standing = Standing(config, LEDGER)
    (cohort,) = standing.cohorts.values()
    assert (cohort.rounds, cohort.planned, cohort.over, standing.ended) == (2, 4, False, False)
    assert (standing.bytes_up, standing.bytes_down) == (500, 200)
    # Only one site has reported its scores of round 2.
    assert cohort.dice == {1: 0.5}
    assert cohort.newest == cohort.best == (1, 0.5)
    assert cohort.answered == ["a"]
    assert (cohort.sites["a"].loss, cohort.sites["a"].dice, cohort.sites["b"].loss, cohort.sites["b"].dice) == (
        0.2,
        0.3,
        0.3,
        0.6,
    )


def test_the_dice_of_a_round_waits_for_all_sites_that_report_it(config: RunConfig):
    cohort = Standing(config, [*LEDGER, validation(30, "b", 2, 0.5)]).cohorts[TOGETHER]
    assert cohort.dice == {1: 0.5, 2: pytest.approx(0.4)}
    assert (cohort.newest, cohort.best) == ((2, pytest.approx(0.4)), (1, 0.5))
    # It waits for a missing site only until the next round is closed.
    cohort = Standing(config, [*LEDGER, closed(30, 3, 10.0)]).cohorts[TOGETHER]
    assert cohort.dice == {1: 0.5, 2: 0.3}


def test_time_left(config: RunConfig):
    standing = Standing(config, LEDGER)
    # Rounds took 10 s each. Two are left, and 7 s of the third have passed.
    assert standing.seconds_left(at(27)) == 13
    assert standing.round_seconds_left(at(27)) == 3
    # A round that takes longer than earlier ones is expected to end at once.
    assert standing.seconds_left(at(500)) == 10
    assert standing.round_seconds_left(at(500)) == 0
    assert Standing(config).seconds_left(at(0)) is None
    assert Standing(config, LEDGER[:4]).seconds_left(at(10)) == 4 * 10 - 10
    assert Standing(config, [*LEDGER, event("end", 40)]).seconds_left(at(50)) == 0


def test_the_time_left_includes_cohorts_that_have_not_started(config: RunConfig):
    config = config.model_copy(update={"modes": ["federated", "local", "centralised"]})
    standing = Standing(config, LEDGER)
    assert list(map(str, standing.cohorts)) == ["federated", "local/a", "local/b", "centralised"]
    # In every cohort, a's fits take 4 s and b's take 6 s, as in the federation.
    assert standing.seconds_left(at(27)) == 13 + 4 * 4 + 4 * 6 + 4 * (4 + 6)


def test_a_settled_run_is_over(config: RunConfig):
    events = [*LEDGER[:10], event("delivery", 22, federation="federated", round=2, site="a", bytes_down=60)]
    standing = Standing(config, events)
    assert standing.cohorts[TOGETHER].over
    assert standing.seconds_left(at(22)) == 0
    assert standing.bytes_down == 200
    with_local = Standing(
        config.model_copy(update={"modes": ["federated", "local"]}), [*LEDGER[:10], fit(24, "a", 1, "local/a")]
    )
    assert with_local.cohorts[TOGETHER].over
    assert not with_local.cohorts[Cohort("local", "a")].over
    # Local training sends nothing.
    assert with_local.bytes_up == 400


def test_troubles_are_counted(config: RunConfig):
    refused = event("refused", 25, federation="federated", round=3, site="b", reason="not finite", bytes_up=7)
    excluded = event("excluded", 26, federation="federated", site="c", reason="another version")
    standing = Standing(config, [*LEDGER, refused, excluded])
    assert {kind: len(events) for kind, events in standing.troubles.items()} == {
        "refused": 1,
        "left_out": 0,
        "missing": 0,
        "excluded": 1,
    }
    cohort = standing.cohorts[TOGETHER]
    assert cohort.sites["b"].trouble == refused
    assert cohort.bytes_up == 507
    standing.add(fit(30, "b", 3))
    assert cohort.sites["b"].trouble is None


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
    """The lines that a terminal shows of a run."""
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
        ["b", "training", "0.300", "0.500"],
    ]
    assert len(lines) == 7
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("count", [40, 200])
def test_many_sites_are_summarised(config: RunConfig, count: int):
    names = [f"site_{number:03}" for number in range(count)]
    events = [*map(site, names), *(fit(1, name, 1) for name in names[:17])]
    lines = shown(config, events, width=80, works=dict.fromkeys(names[17:22], "fit"))
    counted = f"17 of {count} sites have answered; site_017, site_018, site_019 and 2 more working"
    assert " ".join(lines[3:]) == counted
    assert len(lines) <= 5


def test_without_a_terminal_each_round_is_one_line(config: RunConfig, capsys: pytest.CaptureFixture[str]):
    with ConsoleObserver(Console(stderr=True, force_terminal=False)) as observer:
        observer.opened(config, [])
        observer.begin("federated", 400)
        for entry in LEDGER:
            observer.event(entry)
        observer.end()
    assert capsys.readouterr().err.splitlines() == [
        "federated",
        "federated: round 1 of 4 in 10 s, 200 B up, 20 B down",
        "federated: round 2 of 4 in 10 s, validation Dice 0.500 after round 1, 400 B up, 140 B down",
        "federated: 2 of 4 rounds done, validation Dice 0.500 after round 1, 500 B up, 200 B down",
    ]


def test_status_shows_a_stopped_and_a_running_run(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    missing = event("missing", 26, federation="federated", round=3, site="b", reason="did not answer in time")
    folder = begun(tmp_path / "run", config, [*LEDGER, missing])
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "fit", "time": "2026-01-0')
    outcome = flapsam(capfd, "status", folder)
    assert outcome.code == 0
    for part in ("run 5ca1ab1e5ca1", "started 2026-01-01 12:00:00 UTC", "probably stopped", "2 of 4", "round 3:"):
        assert part in outcome.out
    assert "answers missing: 1, most recently b in round 3: did not answer in time" in outcome.out
    lock = alone(folder / "state" / "lock")
    assert "a process is running it" in flapsam(capfd, "status", folder).out
    lock.close()
    reported = json.loads(flapsam(capfd, "status", folder, "--json").out)
    assert (reported["at_work"], reported["bytes_up"], reported["missing"]["count"]) == (False, 500, 1)
    assert reported["federations"]["federated"]["dice"] == {"1": 0.5}


@pytest.mark.parametrize(
    ("events", "text"),
    [([], "started, no event yet"), ([*LEDGER, event("end", 90)], "ended 2026-01-01 12:01:30 UTC"), (LEDGER[:2], "0 of 4")],
)
def test_status_of_a_run_in_any_state(
    events: list[Event], text: str, config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = begun(tmp_path / "run", config, events)
    assert text in flapsam(capfd, "status", folder).out
    assert json.loads(flapsam(capfd, "status", folder, "--json").out)["ended"] == (text.startswith("ended"))


def test_status_of_a_folder_without_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    outcome = flapsam(capfd, "status", tmp_path)
    assert outcome.code == 2
    assert "there is no run here" in outcome.err


def test_following_ends_when_the_run_ends(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = begun(tmp_path / "run", config, LEDGER[:9])

    def finish() -> None:
        time.sleep(0.3)
        ledger = Ledger(folder / "events.jsonl")
        ledger.write(RoundClosed(cohort=TOGETHER, round=2, seconds=10.0, aggregation_seconds=0.5))
        ledger.write(RunEnded())

    thread = threading.Thread(target=finish)
    thread.start()
    outcome = flapsam(capfd, "status", folder, "--follow")
    thread.join()
    assert "federated: round 2 of 4 in 10 s" in outcome.out
    assert "ended" in outcome.out.splitlines()[-1]


def test_a_reader_reads_only_what_was_added_and_notices_a_run_that_went_back(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    reader = LedgerReader(path)
    assert reader.added() == []
    lines = [json.dumps(entry.as_json()) + "\n" for entry in LEDGER[:4]]
    path.write_text(lines[0] + lines[1] + lines[2][:-5])
    assert reader.added() == LEDGER[:2]
    path.write_text("".join(lines))
    assert reader.added() == LEDGER[2:4]
    assert reader.added() == []
    # A run that goes back replaces its ledger, which may have become longer again by the next look.
    write_text(path, "".join(lines) * 2)
    assert reader.added() is None
    assert len(LedgerReader(path).added() or []) == 8


def test_only_one_process_can_work_in_a_run_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"))
    lock = alone(tmp_path / "run" / "state" / "lock")
    outcome = flapsam(capfd, "simulate", run)
    lock.close()
    assert outcome.code == 2
    assert "another process is using this folder" in outcome.err
    assert not (tmp_path / "run" / "events.jsonl").exists()
