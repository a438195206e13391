"""The ledger: every kind of event comes back as it was written, and a crash or a full disk costs at most one line."""

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.run.ledger import TOGETHER, Cohort, Event, Fitted, Ledger, RunEnded, bytes_sent, parse_events, read_ledger
from tests.helpers.ledgers import read_events

TIME = "2026-01-01T12:00:00+00:00"
FEDERATED = {"federation": "federated", "round": 1}
LINES: list[dict[str, Any]] = [
    {"event": "site", "site": "a", "cases": {"train": 3, "val": 1, "test": 2}},
    {"event": "micro_batch", "windows": 4},
    {"event": "job", "federation": "federated", "job": "7", "sites": ["a", "b"]},
    {"event": "job_end", "federation": "federated", "job": "7", "outcome": "stopped", "reason": "too few sites"},
    {"event": "excluded", "federation": "federated", "site": "b", "reason": "another version"},
    {"event": "fit", **FEDERATED, "site": "a", "bytes_down": 10, "bytes_up": 100, "slices": 9, "loss": None, "steps": 3.0},
    {"event": "validation", "federation": "local/a", "round": 1, "site": "a", "dice": {"mean": 0.5, "ball": None}},
    {"event": "round", **FEDERATED, "seconds": 10.5, "aggregation_seconds": 0.25},
    {"event": "refused", **FEDERATED, "site": "b", "reason": "not finite", "bytes_up": 7},
    {"event": "missing", **FEDERATED, "site": "b", "reason": "it is gone", "work": "validate"},
    {"event": "delivery", **FEDERATED, "site": "a", "bytes_down": 20},
    {"event": "test", "federation": "centralised", "site": "a", "case": "c", "dice": {"ball": 0.5}, "hd95": {"ball": None}},
    {"event": "label_map", "case": "a/c", "image": "c.nii", "of": [["c.nii", 1, 2]], "way": "0f", "written": [], "ml": {}},
    {"event": "end"},
]
"""An event of each kind, as versions have written them from the beginning."""


def test_there_is_a_line_for_every_kind_of_event():
    kinds = {kind.model_fields["event"].default for kind in get_args(get_args(Event)[0])}
    assert [line["event"] for line in LINES] == list(dict.fromkeys(line["event"] for line in LINES))
    assert {line["event"] for line in LINES} == kinds


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["event"])
def test_an_event_comes_back_as_it_was_written(line: dict[str, Any], tmp_path: Path):
    line = {**line, "time": TIME}
    (event,) = parse_events([json.dumps({**line, "a_field_of_a_later_version": 1})])
    Ledger(tmp_path / "events.jsonl").write(event)
    assert read_events(tmp_path) == [line]
    assert read_ledger(tmp_path / "events.jsonl") == [event]


@pytest.mark.parametrize("name", ["federated", "centralised", "local/a", "local/a/b"])
def test_a_cohort_has_one_name(name: str):
    assert str(Cohort.parse(name)) == name
    assert Cohort.parse("local/a/b") == Cohort("local", "a/b")


@pytest.mark.parametrize("name", ["", "local", "local/", "federated/a", "all", "Federated"])
def test_what_is_no_cohort(name: str):
    with pytest.raises(ValueError, match="no cohort"):
        Cohort.parse(name)


def test_a_cut_line_is_repaired_and_nothing_is_written_twice(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    ledger = Ledger(path)
    fit = partial(Fitted, cohort=TOGETHER, site="a", bytes_down=0, bytes_up=0, slices=1)
    ledger.write(fit(round=1, loss=0.5))
    with path.open("a") as file:
        file.write('{"event": "fit", "fed')
    written: list[Event] = []
    again = Ledger(path, written.append)
    assert again.holds(fit(round=1))
    assert not again.holds(fit(round=1, cohort=Cohort("local", "a")))
    again.write(fit(round=1, loss=0.7))
    again.write(fit(round=2, loss=0.4))
    assert [(event["round"], event["loss"]) for event in read_events(tmp_path)] == [(1, 0.5), (2, 0.4)]
    assert again.events() == read_ledger(path)
    assert written == again.events()[1:]


def test_troubles_may_repeat_and_the_end_may_not(tmp_path: Path):
    ledger = Ledger(tmp_path / "events.jsonl")
    (missing,) = parse_events([json.dumps({**LINES[9], "time": TIME})])
    for event in (missing, missing, RunEnded(), RunEnded()):
        ledger.write(event)
    assert [event["event"] for event in read_events(tmp_path)] == ["missing", "missing", "end"]


def test_bytes_of_a_cohort():
    """100 of the fit and 7 refused went up; 10 to the fit and 20 of the delivery came down."""
    events = parse_events(json.dumps(line) for line in LINES)
    assert bytes_sent(events, TOGETHER) == (107, 30)
    assert bytes_sent(events, Cohort("local", "a")) == (0, 0)


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger = Ledger(tmp_path / "events.jsonl")
    ledger.write(RunEnded())
    before = ledger.path.read_bytes()

    def full(*_: object) -> str:
        ledger.path.open("a").write("{half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flapsam.run.ledger.json.dumps", full)
    (joined,) = parse_events(['{"event": "site", "site": "a", "cases": {}}'])
    with pytest.raises(OSError, match="No space left"):
        ledger.write(joined)
    assert ledger.path.read_bytes() == before
    assert not ledger.holds(joined)


@pytest.mark.parametrize("text", ["nonsense\n", '{"event": "fit"}\n', '{"event": "dance", "site": "a"}\n', "[]\n"])
def test_a_damaged_ledger_is_an_error(text: str, tmp_path: Path):
    path = tmp_path / "events.jsonl"
    with pytest.raises(FlapsamError, match="no ledger"):
        read_ledger(path)
    path.write_text(text)
    with pytest.raises(FlapsamError, match="damaged"):
        read_ledger(path)
