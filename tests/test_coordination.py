"""When a job is ended so that a site can take part again."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sitemaker import write_run

from flapsam.config import read_config
from flapsam.federation.handshake import GONE
from flapsam.federation.ledger import Event
from flapsam.federation.observer import Observer

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("flapsam[nvflare] is not installed", allow_module_level=True)

from flapsam.federation.engines.nvflare.coordination import Job, Run

JOB: Event = {"event": "job", "job": "1", "sites": ["a", "b"]}
MISSING: Event = {"event": "missing", "site": "b", "reason": GONE}
FIT: Event = {"event": "fit", "site": "b"}


@pytest.mark.parametrize(
    ("events", "connected", "asked"),
    [
        ([JOB], ["a", "b"], False),
        ([JOB, MISSING], ["a"], False),
        ([JOB, MISSING], ["a", "b"], True),
        ([JOB, MISSING, FIT], ["a", "b"], False),
        ([JOB, {**MISSING, "reason": "its fit has died"}], ["a", "b"], False),
        ([JOB, {"event": "excluded", "site": "b", "reason": GONE}], ["a", "b"], True),
        ([JOB, {"event": "excluded", "site": "b", "reason": "another version"}], ["a", "b"], False),
        ([JOB], ["a", "b", "c"], True),
        ([JOB], ["a", "b", "d"], False),
        ([MISSING, {**JOB, "job": "0"}], ["a", "b", "c"], False),
        ([{**JOB, "job": "0"}, MISSING, JOB], ["a", "b"], False),
    ],
)
def test_a_job_ends_for_a_site_that_is_there_and_does_not_take_part(
    events: list[Event], connected: list[str], asked: bool, tmp_path: Path
):
    config = read_config(write_run(tmp_path / "run.yaml", tmp_path), ["data.sites=[a, b, c]"])
    questions: list[Any] = []
    line: Any = SimpleNamespace(ask=questions.append)
    run, job = Run(config, line, Observer(), 0, events=events), Job("1", ["a", "b"], None)
    for _ in range(2):
        run._regroup_if_back(job, connected)
    assert len(questions) == asked
