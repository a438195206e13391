"""Ledgers written by hand, and a reader of ledgers that does not use flapsam."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flapsam.run.config import RunConfig
from flapsam.run.ledger import Event, parse_events
from flapsam.run.reading import write_config

START = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def event(kind: str, when: float, /, **fields: Any) -> Event:
    (parsed,) = parse_events([json.dumps({"event": kind, "time": at(when).isoformat(), **fields})])
    return parsed


def site(name: str) -> Event:
    return event("site", 0, site=name, cases={"train": 3, "val": 1, "test": 1})


def fit(when: float, name: str, number: int, federation: str = "federated", **fields: Any) -> Event:
    defaults = {"bytes_down": 10, "bytes_up": 100, "loss": 0.5, "cross_entropy": 1.0, "dice_loss": 0.25, "seconds": 4.0}
    return event("fit", when, federation=federation, round=number, site=name, slices=9, **{**defaults, **fields})


def validation(when: float, name: str, number: int, dice: float, federation: str = "federated") -> Event:
    scores = {"mean": dice, "ball": dice + 0.1, "core": dice - 0.1}
    return event("validation", when, federation=federation, round=number, site=name, dice=scores)


def closed(when: float, number: int, seconds: float, federation: str = "federated") -> Event:
    return event("round", when, federation=federation, round=number, seconds=seconds, aggregation_seconds=0.5)


def scored(when: float, name: str, case: str, dice: float, federation: str = "federated") -> Event:
    fields = {"federation": federation, "site": name, "case": case}
    return event("test", when, **fields, dice={"ball": dice, "core": None}, hd95={"ball": 1.0, "core": None})


LEDGER = [
    site("a"),
    site("b"),
    fit(4, "a", 1, seconds=4.0),
    fit(10, "b", 1, seconds=6.0),
    closed(10, 1, 10.0),
    validation(14, "a", 1, 0.4),
    fit(14, "a", 2, loss=0.4, bytes_down=60),
    validation(20, "b", 1, 0.6),
    fit(20, "b", 2, loss=0.3, bytes_down=60, seconds=6.0),
    closed(20, 2, 10.0),
    validation(24, "a", 2, 0.3),
    fit(24, "a", 3, loss=0.2, bytes_down=60),
]
"""Two of four rounds are complete, and the first of two sites has answered in the third."""
FINISHED = [
    *LEDGER[:11],
    event("delivery", 24, federation="federated", round=2, site="a", bytes_down=60),
    validation(30, "b", 2, 0.5),
    event("delivery", 30, federation="federated", round=2, site="b", bytes_down=60),
    scored(31, "a", "a1", 0.8),
    scored(32, "b", "b1", 0.6),
    scored(33, "b", "b2", 0.4),
    event("end", 34),
]
"""The run settled after two rounds."""


def begun(folder: Path, config: RunConfig, events: list[Event]) -> Path:
    """Create the folder of a run with this ledger."""
    folder.mkdir()
    (folder / "run.yaml").write_text(write_config(config.model_copy(update={"output": folder})))
    (folder / "environment.json").write_text(json.dumps({"run": "5ca1ab1e" * 4}))
    if events:
        (folder / "events.jsonl").write_text("".join(json.dumps(event.as_json()) + "\n" for event in events))
    return folder


def read_events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the complete lines of a run's ledger so far, optionally of one kind."""
    path = run / "events.jsonl"
    text = path.read_text() if path.exists() else ""
    events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [event for event in events if kind in (None, event["event"])]
