"""When the coordinator ends a job early, so that a site can take part again."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flapsam.federation.hospitals.handshake import GONE
from flapsam.run.ledger import TOGETHER, AnswerMissing, Event, Fitted, JobStarted, SiteExcluded
from flapsam.run.observer import Observer
from flapsam.run.reading import read_config
from tests.helpers.sites import write_run

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("flapsam[nvflare] is not installed", allow_module_level=True)

from flapsam.federation.engines.nvflare.jobs import Job, RunFollower

EARLIER, JOB = (JobStarted(cohort=TOGETHER, job=job, sites=["a", "b"]) for job in ("0", "1"))
MISSING, DIED = (AnswerMissing(cohort=TOGETHER, round=1, site="b", reason=reason) for reason in (GONE, "its fit has died"))
EXCLUDED, OTHER = (SiteExcluded(cohort=TOGETHER, site="b", reason=reason) for reason in (GONE, "another version"))
FIT = Fitted(cohort=TOGETHER, round=2, site="b", bytes_down=0, bytes_up=0, slices=1)


@pytest.mark.parametrize(
    ("events", "connected", "asked"),
    [
        ([JOB], ["a", "b"], False),
        ([JOB, MISSING], ["a"], False),
        ([JOB, MISSING], ["a", "b"], True),
        ([JOB, MISSING, FIT], ["a", "b"], False),
        ([JOB, DIED], ["a", "b"], False),
        ([JOB, EXCLUDED], ["a", "b"], True),
        ([JOB, OTHER], ["a", "b"], False),
        ([JOB], ["a", "b", "c"], True),
        ([JOB], ["a", "b", "d"], False),
        ([MISSING, EARLIER], ["a", "b", "c"], False),
        ([EARLIER, MISSING, JOB], ["a", "b"], False),
    ],
)
def test_a_job_ends_early_for_a_connected_site_that_does_not_take_part(
    events: list[Event], connected: list[str], asked: bool, tmp_path: Path
):
    config = read_config(write_run(tmp_path / "run.yaml", tmp_path), ["data.sites=[a, b, c]"])
    requests: list[Any] = []
    admin: Any = SimpleNamespace(ask=requests.append)
    follower, job = RunFollower(config, admin, Observer(), 0, events=events), Job("1", ["a", "b"], None)
    for _ in range(2):
        follower._regroup_if_back(job, connected)
    assert len(requests) == asked
