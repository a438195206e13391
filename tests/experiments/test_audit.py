"""The membership attack on a finished adapter."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from flapsam.experiments.audit import allowed, auc, found, interval
from flapsam.experiments.simulation import simulate
from flapsam.run.config import Privacy
from flapsam.run.reading import read_config
from tests.helpers.command import flapsam
from tests.helpers.families import small_run
from tests.helpers.sites import make_sites


def test_the_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0, 1, 30).round(1), rng.normal(0.5, 1, 20).round(1)
    pairs = [0.5 if member == other else float(member < other) for member in members for other in others]
    assert 0.5 in pairs and auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    low, high = interval(members, others)
    assert low < auc(members, others) < high
    assert auc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1 and auc(np.array([1.0]), np.array([1.0])) == 0.5


def test_members_are_found_below_the_losses_of_the_others():
    others = [float(value) for value in range(1, 101)]
    # At 1 %, one of a hundred others may be suspected, so suspects have a loss below 2. At 5 %, it is below 6.
    members = [0.5, 1.5, 1.9, 5.5, 70.0]
    one, five = (found(members, others, share) for share in (0.01, 0.05))
    assert (one.share, five.share) == (0.6, 0.8)
    # Clopper and Pearson for 3 of 5, from a table.
    assert (one.low, one.high) == pytest.approx((0.1466, 0.9473), abs=1e-4)
    # With fewer than a hundred others, none may be suspected at 1 %.
    assert found([0.5, 1.5], [1.0, 2.0], 0.01).share == 0.5


@pytest.mark.parametrize(
    ("epsilon", "share", "most"),
    [
        (1.0, 0.01, math.e * 0.01 + 1e-5),
        (8.0, 0.01, 1 - math.exp(-8) * (0.99 - 1e-5)),
        (1000.0, 0.05, 1.0),
        (0.1, 0.0, 1e-5),
    ],
)
def test_what_privacy_allows_is_that_of_arithmetic(epsilon: float, share: float, most: float):
    assert allowed(share, Privacy(epsilon=epsilon, delta=1e-5)) == pytest.approx(most)


@pytest.mark.usefixtures("no_report", "small_families")
def test_an_audit_tells_members_from_others_and_writes_a_file(tmp_path: Path, capfd: pytest.CaptureFixture):
    data = make_sites(tmp_path / "data", cases=5)
    simulate(read_config(small_run(tmp_path / "run.yaml", data)))
    outcome = flapsam(capfd, "audit", tmp_path / "run", "-o", tmp_path / "audit.json")
    assert outcome.code == 0, outcome.err
    assert "AUC" in outcome.out and "no proof of privacy" in outcome.out
    written = json.loads((tmp_path / "audit.json").read_text())
    # Of five cases at each of two sites, one is for the test, and one of the others for validation.
    assert (written["members"], written["others"]) == (6, 2)
    assert not written["losses"]["members"].keys() & written["losses"]["others"].keys()
    assert all(0 < loss < 3 for part in written["losses"].values() for loss in part.values())
    assert json.loads(flapsam(capfd, "audit", tmp_path / "run", "--json").out) == written
    few = flapsam(capfd, "audit", tmp_path / "run" / "adapter", "--data", data / "site_0")
    assert (few.code, "Traceback" in few.err) == (2, False)


def test_an_adapter_outside_of_a_run_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture):
    outcome = flapsam(capfd, "audit", tmp_path)
    assert outcome.code == 2 and "neither an adapter nor a finished run" in outcome.err
