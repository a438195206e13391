"""Who took part in a federation, from ledgers written by hand."""

import json

import pytest

from flapsam.run.ledger import parse_events
from flapsam.run.participation import participation

TIME = "2026-01-01T00:00:00+00:00"
CASES = {
    "a": {"train": 5, "val": 1, "test": 2},
    "b": {"train": 20, "val": 4, "test": 9},
    "c": {"train": 10, "val": 2, "test": 1},
}


def ledger(*rounds: str, cases: dict = CASES, **more: list) -> list:
    """The events of closed rounds, each given by the letters of the sites that answered it."""
    lines = [{"event": "site", "site": site, "cases": counts} for site, counts in cases.items()]
    for number, answered in enumerate(rounds, start=1):
        about = {"federation": "federated", "round": number}
        for site in answered:
            sizes = {"bytes_down": 1, "bytes_up": 1, "slices": 1, "loss": 1.0, "cross_entropy": 1.0}
            lines.append({"event": "fit", **about, "site": site, **sizes})
        lines += [{**about, **line} for line in more.get(f"round_{number}", [])]
        lines.append({"event": "round", **about, "seconds": 1.0, "aggregation_seconds": 0.1})
    return list(parse_events([json.dumps({"time": TIME, **line}) for line in lines]))


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        (ledger(), ""),
        (ledger("abc", "cba"), "All 3 sites took part in every round."),
        (
            ledger("abc", "ac", "ab", "abc"),
            "All 3 sites took part in 2 of 4 rounds. The smallest was round 2, in which 2 of 3 sites took part with 18 of "
            "42 training and validation cases.",
        ),
        (
            ledger("abc", round_1=[{"event": "left_out", "site": "b", "reason": "too large"}]),
            "All 3 sites took part in 0 of 1 rounds. The smallest was round 1, in which 2 of 3 sites took part with 18 of "
            "42 training and validation cases.",
        ),
        (
            # What secure aggregation summed counts, and not what was answered. A private run tells no counts.
            ledger(
                "abc",
                cases={site: {"train": 0, "val": 0, "test": 0} for site in "abc"},
                round_1=[{"event": "summed", "sites": ["a", "b"], "bytes_up": 1, "bytes_down": 1}],
            ),
            "All 3 sites took part in 0 of 1 rounds. The smallest was round 1, in which 2 of 3 sites took part.",
        ),
        (ledger("a", cases={"a": CASES["a"]}), ""),
    ],
)
def test_the_sentence_names_the_smallest_round(events: list, sentence: str):
    assert participation(events).sentence() == sentence
