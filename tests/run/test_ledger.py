"""The ledger: every kind of event reads back as it was written, and a crash or a full disk costs at most one line."""

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.run.ledger import (
    TOGETHER,
    CaseTested,
    Cohort,
    Event,
    Fitted,
    Ledger,
    NearlyFinal,
    RunEnded,
    bytes_sent,
    nearly_final,
    parse_events,
    read_ledger,
)
from tests.helpers.ledgers import read_events

TIME = "2026-01-01T12:00:00+00:00"
FEDERATED = {"federation": "federated", "round": 1}
BORNE = {"federation": "federated", "aggregator": "median"}
LINES: list[dict[str, Any]] = [
    {"event": "site", "site": "a", "cases": {"train": 3, "val": 1, "test": 2}},
    {"event": "micro_batch", "windows": 4},
    {"event": "job", "federation": "federated", "job": "7", "sites": ["a", "b"]},
    {"event": "job_end", "federation": "federated", "job": "7", "outcome": "stopped", "reason": "too few sites"},
    {"event": "excluded", "federation": "federated", "site": "b", "reason": "another version"},
    {"event": "bounded", "federation": "federated", "site": "b", "unit": "slices", "claimed": 9000, "counted": 240},
    {"event": "borne", **BORNE, "sites": 5, "borne": 2, "least": 2, "borne_of_least": 0},
    {"event": "went_back", **FEDERATED},
    {"event": "fit", **FEDERATED, "site": "a", "bytes_down": 10, "bytes_up": 100, "slices": 9, "loss": None, "steps": 3.0},
    {"event": "summed", **FEDERATED, "sites": ["a", "b", "c"], "bytes_up": 3000, "bytes_down": 5000},
    {"event": "validation", "federation": "local/a", "round": 1, "site": "a", "dice": {"mean": 0.5, "ball": None}},
    {"event": "round", **FEDERATED, "seconds": 10.5, "aggregation_seconds": 0.25},
    {"event": "refused", **FEDERATED, "site": "b", "reason": "not finite", "bytes_up": 7},
    {"event": "left_out", **FEDERATED, "site": "b", "reason": "its change is 1e+30 times the others'"},
    {"event": "missing", **FEDERATED, "site": "b", "reason": "it is gone", "work": "validate"},
    {"event": "awaited", **FEDERATED, "site": "b", "work": "fit", "seconds": 3.5, "left": None, "share": 0.25},
    {"event": "delivery", **FEDERATED, "site": "a", "bytes_down": 20},
    {"event": "site_test", **FEDERATED, "site": "a", "scores": None, "bytes_down": 0},
    {"event": "kept", **FEDERATED, "site": "a", "kept": "shared", "dice": {"shared": 0.5, "trained on": None}},
    {"event": "test", "federation": "centralised", "site": "a", "case": "c", "dice": {"ball": 0.5}, "hd95": {"ball": None}},
    {"event": "label_map", "case": "a/c", "image": "c.nii", "of": [["c.nii", 1, 2]], "way": "0f", "written": [], "ml": {}},
    {"event": "end"},
]
"""One event of each kind, as all versions so far have written it."""
MISSING = next(line for line in LINES if line["event"] == "missing")


def test_every_kind_of_event_has_a_line():
    kinds = {kind.model_fields["event"].default for kind in get_args(get_args(Event)[0])}
    assert [line["event"] for line in LINES] == list(dict.fromkeys(line["event"] for line in LINES))
    assert {line["event"] for line in LINES} == kinds


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["event"])
def test_an_event_reads_back_as_it_was_written(line: dict[str, Any], tmp_path: Path):
    line = {**line, "time": TIME}
    (event,) = parse_events([json.dumps({**line, "a_field_of_a_later_version": 1})])
    Ledger(tmp_path / "events.jsonl").write(event)
    assert read_events(tmp_path) == [line]
    assert read_ledger(tmp_path / "events.jsonl") == [event]


@pytest.mark.parametrize("name", ["federated", "centralised", "local/a", "personal/a"])
def test_a_cohort_is_parsed_from_its_name(name: str):
    assert str(Cohort.parse(name)) == name


@pytest.mark.parametrize("name", ["", "local", "local/", "personal", "federated/a", "all", "Federated"])
def test_an_invalid_cohort_name_is_refused(name: str):
    with pytest.raises(ValueError, match="is not a cohort"):
        Cohort.parse(name)


@pytest.mark.parametrize("site", ["../../x", "a/b", "a\n"])
def test_a_ledger_from_others_cannot_name_a_path_as_a_site(site: str, tmp_path: Path):
    """Trackers make a folder for each cohort and site of a ledger."""
    for event in ({"event": "site", "site": site, "cases": {}}, {"event": "round", "federation": f"local/{site}"}):
        (tmp_path / "events.jsonl").write_text(
            json.dumps({"round": 1, "seconds": 1, "aggregation_seconds": 1, **event}) + "\n"
        )
        with pytest.raises(FlapsamError, match="damaged"):
            read_ledger(tmp_path / "events.jsonl")


def test_a_truncated_line_is_removed_and_no_event_is_written_twice(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    ledger = Ledger(path)
    fit = partial(Fitted, cohort=TOGETHER, site="a", bytes_down=0, bytes_up=0, slices=1)
    ledger.write(fit(round=1, loss=0.5))
    with path.open("a") as file:
        file.write('{"event": "fit", "fed')
    written: list[Event] = []
    reopened = Ledger(path, written.append)
    assert reopened.holds(fit(round=1))
    assert not reopened.holds(fit(round=1, cohort=Cohort("local", "a")))
    reopened.write(fit(round=1, loss=0.7))
    reopened.write(fit(round=2, loss=0.4))
    assert [(event["round"], event["loss"]) for event in read_events(tmp_path)] == [(1, 0.5), (2, 0.4)]
    assert reopened.events() == read_ledger(path)
    assert written == reopened.events()[1:]


def test_failures_may_repeat_but_the_end_may_not(tmp_path: Path):
    ledger = Ledger(tmp_path / "events.jsonl")
    (missing,) = parse_events([json.dumps({**MISSING, "time": TIME})])
    for event in (missing, missing, RunEnded(), RunEnded()):
        ledger.write(event)
    assert [event["event"] for event in read_events(tmp_path)] == ["missing", "missing", "end"]


def test_going_back_moves_what_will_be_written_again_and_keeps_the_rest(tmp_path: Path):
    kinds = {
        "kept": ["site 0 a", "fit 1 a", "fit 1 b", "validation 0 a", "round 1 ", "local fit 2 a"],
        "dropped": [
            "validation 1 a",
            "fit 2 a",
            "refused 2 b",
            "left_out 3 b",
            "round 2 ",
            "delivery 3 a",
            "test a",
            "end",
        ],
    }
    by_kind = {line["event"]: line for line in LINES}

    def event(text: str) -> Event:
        words = text.removeprefix("local ").split()
        line = {**by_kind[words[0]], "time": TIME}
        if len(words) > 1:
            line |= {"round": int(words[1])} if "round" in line else {}
            line |= {"site": words[-1]} if "site" in line else {}
        if "federation" in line:
            line["federation"] = "local/a" if text.startswith("local") else "federated"
        (parsed,) = parse_events([json.dumps(line)])
        return parsed

    ledger = Ledger(tmp_path / "events.jsonl")
    kept, dropped = ([event(text) for text in kinds[kind]] for kind in ("kept", "dropped"))
    for line in [*kept, *dropped]:
        ledger.write(line)
    ledger.go_back(TOGETHER, 2)
    assert read_ledger(tmp_path / "events.jsonl")[:-1] == kept
    assert ledger.events()[-1].as_json() | {"time": ""} == {**FEDERATED, "event": "went_back", "time": "", "round": 2}
    assert read_ledger(tmp_path / "events-dropped.jsonl") == dropped
    # They can be written again, unlike those that were kept.
    for line in [*kept, *dropped]:
        ledger.write(line)
    assert Ledger(ledger.path).events() == [*kept, ledger.events()[len(kept)], *dropped]


def test_bytes_are_summed_by_cohort_and_direction():
    """Up: the fit 100, the refused packet 7, secure aggregation 3,000. Down: the fit 10, the delivery 20, and 5,000."""
    events = parse_events(json.dumps(line) for line in LINES)
    assert bytes_sent(events, TOGETHER) == (3107, 5030)
    assert bytes_sent(events, Cohort("local", "a")) == (0, 0)


def test_rounds_and_bytes_until_nearly_the_final_dice_are_those_by_hand():
    events: list[Event] = []
    for number, dices in enumerate([(0.2, 0.4), (0.7, 0.72), (0.6, 0.8), (0.7, 0.8)], 1):
        for site, dice in zip("ab", dices, strict=True):
            fit = {"event": "fit", "federation": "federated", "round": number, "site": site, "slices": 1}
            score = {"event": "validation", "federation": "federated", "round": number, "site": site, "dice": {"mean": dice}}
            size = {"bytes_up": 10 * number, "bytes_down": 100 * (number - 1)}
            events += parse_events(map(json.dumps, ({**fit, **size}, score)))
    # The final mean is 0.75, and 95 % of it is 0.7125. Round 2 has 0.71 and round 3 has 0.7.
    nearly = nearly_final(events)
    assert nearly is not None and nearly.rounds == 4
    assert nearly.bytes_a_site == 10 + 20 + 30 + 40 + 100 + 200 + 300
    # Round 2 reaches 90 %. Its result comes down in round 3.
    assert nearly_final(events, 0.9) == NearlyFinal(2, 10 + 20 + 100 + 200)
    assert nearly_final(events[:4]) is None


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger = Ledger(tmp_path / "events.jsonl")
    ledger.write(RunEnded())
    before = ledger.path.read_bytes()

    def fail_halfway(*_: object) -> str:
        ledger.path.open("a").write("{half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flapsam.run.ledger.json.dumps", fail_halfway)
    (event,) = parse_events(['{"event": "site", "site": "a", "cases": {}}'])
    with pytest.raises(FlapsamError, match=r"events\.jsonl: cannot be written \(No space left"):
        ledger.write(event)
    assert ledger.path.read_bytes() == before
    assert not ledger.holds(event)


@pytest.mark.parametrize("text", ["nonsense\n", '{"event": "fit"}\n', '{"event": "dance", "site": "a"}\n', "[]\n"])
def test_a_missing_or_damaged_ledger_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "events.jsonl"
    with pytest.raises(FlapsamError, match="no ledger"):
        read_ledger(path)
    path.write_text(text)
    with pytest.raises(FlapsamError, match="damaged"):
        read_ledger(path)


def test_a_class_without_dice_reads_back_and_older_lines_say_that_it_was_1(tmp_path: Path):
    tested = {
        "event": "test",
        "federation": "federated",
        "site": "a",
        "dice": {"ball": 0.5, "core": None},
        "hd95": {"core": None},
    }
    lines = [{**tested, "case": "old"}, {**tested, "case": "new", "absent": "none"}]
    ledger = Ledger(tmp_path / "events.jsonl")
    for event in parse_events([json.dumps({**line, "time": TIME}) for line in lines]):
        ledger.write(event)
    old, new = read_ledger(tmp_path / "events.jsonl")
    assert isinstance(old, CaseTested) and isinstance(new, CaseTested)
    assert (old.absent, new.absent) == ("one", "none")
    assert new.dice == {"ball": 0.5, "core": None}
    assert [line.get("absent") for line in read_events(tmp_path)] == [None, "none"]
