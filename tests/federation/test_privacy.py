"""Differential privacy in a federation: accounting, the ledger of what was spent, and what leaves a site."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate, optimize
from scipy.stats import norm as normal

from flapsam.base.errors import FlapsamError
from flapsam.experiments.simulation import simulate
from flapsam.federation.client import Client
from flapsam.federation.hospitals.bounds import refusals
from flapsam.federation.hospitals.handshake import Presence, Proposal, SiteFailed, read_message
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.federation.hospitals.words import in_words
from flapsam.federation.packets import decode
from flapsam.federation.preparation import resolve
from flapsam.federation.privacy.accounting import Steps, epsilon, noise_for, planned
from flapsam.federation.privacy.budget import Budget, BudgetError, Ceiling
from flapsam.run.config import RunConfig
from flapsam.run.reading import read_config
from tests.helpers.families import small_run
from tests.helpers.ledgers import read_events
from tests.helpers.randomness import Seeded
from tests.helpers.sites import make_sites

PRIVATE: dict[str, Any] = {
    "training": {"window": 1, "batch_size": 8, "warmup_steps": 2, "schedule_epochs": None},
    "rounds": {"count": 2, "steps": 2, "weights": "uniform"},
    "privacy": {"epsilon": 8, "delta": 1e-3, "windows": 2},
}
"""Fields of a private run."""


def cdf(x: float) -> float:
    """The distribution function of the standard normal distribution."""
    return float(normal.cdf(x))


def delta_of_gaussian(eps: float, noise: float) -> float:
    """δ of a Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, arXiv 1805.06530, equation 6)."""
    return cdf(1 / (2 * noise) - eps * noise) - math.exp(eps) * cdf(-1 / (2 * noise) - eps * noise)


def delta_of_step(eps: float, sampling: float, noise: float, removed: bool) -> float:
    """δ of one Gaussian step with Poisson sampling, where a patient is removed from the data, or added to them.

    The output is distributed as P = (1 − q) N(0, σ²) + q N(1, σ²) with the patient and as Q = N(0, σ²) without. Their ratio
    rises with the output, so δ is the probability beyond a threshold.
    """
    ratio = math.exp(eps if removed else -eps)
    if ratio <= 1 - sampling:
        return 1 - math.exp(eps) if removed else 0.0
    threshold = noise**2 * math.log((ratio - 1 + sampling) / sampling) + 0.5

    def with_patient(x: float) -> float:
        return (1 - sampling) * cdf(x / noise) + sampling * cdf((x - 1) / noise)

    without = cdf(threshold / noise)
    if removed:
        return 1 - with_patient(threshold) - math.exp(eps) * (1 - without)
    return without - math.exp(eps) * with_patient(threshold)


def delta_of_two_steps(eps: float, sampling: float, noise: float, removed: bool) -> float:
    """δ of two such steps: the second step's δ at what the first step's outcome has left of ε, on average."""

    def inner(x: float) -> float:
        ratio = 1 - sampling + sampling * math.exp((2 * x - 1) / (2 * noise**2))
        plain = float(normal.pdf(x, 0, noise))
        density, loss = (plain * ratio, math.log(ratio)) if removed else (plain, -math.log(ratio))
        return density * delta_of_step(eps - loss, sampling, noise, removed)

    return integrate.quad(inner, -9 * noise, 9 * noise + 1, limit=400, epsabs=1e-13)[0]


def solved(delta_at: Any, delta: float) -> float:
    return optimize.root_scalar(lambda eps: delta_at(eps) - delta, bracket=(1e-6, 60), xtol=1e-10).root


@pytest.mark.parametrize(
    ("noise", "count", "delta"),
    [(1.0, 1, 1e-5), (0.5, 1, 1e-3), (4.0, 16, 1e-5), (10.0, 400, 1e-6), (2.0, 3, 1e-3), (30.0, 1000, 1e-5)],
)
def test_epsilon_without_sampling_is_that_of_the_closed_form(noise: float, count: int, delta: float):
    # Gaussian steps add up to a single one, whose noise is smaller by the root of their number.
    exact = solved(lambda eps: delta_of_gaussian(eps, noise / math.sqrt(count)), delta)
    assert epsilon([Steps(1, noise, count)], delta) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    ("sampling", "noise", "delta"), [(0.5, 1.0, 1e-3), (0.1, 0.7, 1e-5), (0.02, 0.5, 1e-4), (0.9, 3.0, 1e-3)]
)
@pytest.mark.parametrize("count", [1, 2])
def test_epsilon_with_sampling_is_that_of_arithmetic(sampling: float, noise: float, delta: float, count: int):
    one = delta_of_step if count == 1 else delta_of_two_steps
    exact = solved(lambda eps: max(one(eps, sampling, noise, removed) for removed in (True, False)), delta)
    found = epsilon([Steps(sampling, noise, count)], delta)
    assert found == pytest.approx(exact, rel=2e-3) and found > exact * (1 - 1e-6)


def test_epsilon_of_many_steps_lies_between_the_limit_and_the_published_bound():
    found = epsilon([Steps(0.01, 4.0, 10_000)], 1e-5)
    # Many steps come close to one Gaussian step (Bu et al. 2020, arXiv 1911.11607): μ = q √(T (exp(1/σ²) − 1)).
    mu = 0.01 * math.sqrt(10_000 * math.expm1(1 / 16))
    assert found == pytest.approx(solved(lambda eps: delta_of_gaussian(eps, 1 / mu), 1e-5), rel=0.01)
    # Abadi et al. 2016, section 3.2: the moments accountant gives 1.26, which later accountants have only lowered.
    assert found < 1.26


def test_steps_of_several_kinds_are_composed_in_any_order():
    parts = [Steps(0.5, 2.0, 10), Steps(0.1, 1.0, 5), Steps(0.5, 2.0, 7)]
    assert epsilon(parts, 1e-5) == epsilon(parts[::-1], 1e-5) == epsilon([Steps(0.5, 2.0, 17), parts[1]], 1e-5)
    assert epsilon(parts, 1e-5) > epsilon(parts[:2], 1e-5) and epsilon([], 1e-5) == 0


@pytest.mark.parametrize(("allowed", "sampling", "count"), [(1.0, 0.5, 100), (8.0, 0.5, 160), (30.0, 1.0, 1)])
def test_the_noise_suffices_and_is_hardly_more(allowed: float, sampling: float, count: int):
    noise = noise_for(allowed, 1e-3, sampling, count)
    assert 0.99 * allowed < epsilon([Steps(sampling, noise, count)], 1e-3) <= allowed


PLAN = Steps(0.5, 20.0, 10)
ROUND = Steps(0.5, 20.0, 2)


def test_a_run_takes_no_more_steps_than_its_noise_is_for(tmp_path: Path):
    path = tmp_path / "state" / "privacy.jsonl"
    for number in range(1, 6):
        Budget(path).spend("a", number, ROUND, PLAN)
    with pytest.raises(BudgetError, match=r"with round 5, .* 12 private steps, but its noise is for 10"):
        Budget(path).spend("a", 5, ROUND, PLAN)
    assert len(Budget(path).spent) == 5
    Budget(path).spend("b", 1, ROUND, PLAN)
    assert Budget(path).epsilon(1e-5) == epsilon([Steps(0.5, 20.0, 12)], 1e-5)


def test_a_site_reveals_no_more_than_its_ceiling_over_all_runs(tmp_path: Path):
    path, delta = tmp_path / "privacy.jsonl", 1e-5
    budget = Budget(path, Ceiling(epsilon([Steps(0.5, 20.0, 14)], delta) + 1e-9, delta))
    budget.check("a", PLAN)
    for number in range(1, 6):
        budget.spend("a", number, ROUND, PLAN)
        # What the run has spent is no longer ahead of it.
        budget.check("a", PLAN)
    with pytest.raises(BudgetError, match=r"this site allows .*, of which .* is spent"):
        budget.check("b", PLAN)
    for number in (1, 2):
        budget.spend("b", number, ROUND, PLAN)
    with pytest.raises(BudgetError):
        budget.spend("b", 3, ROUND, PLAN)
    assert len(Budget(path).spent) == 7


def test_a_run_cannot_lower_its_noise_on_the_way(tmp_path: Path):
    budget = Budget(tmp_path / "privacy.jsonl")
    budget.spend("a", 1, ROUND, PLAN)
    less = Steps(0.5, 1.0, 10)
    with pytest.raises(BudgetError, match="not what it was"):
        budget.check("a", less)
    with pytest.raises(BudgetError, match="not what it was"):
        budget.spend("a", 2, Steps(0.5, 1.0, 2), less)


def test_a_missing_or_damaged_ledger_ends_all_answers(tmp_path: Path):
    path = tmp_path / "privacy.jsonl"
    with pytest.raises(FlapsamError, match="is missing, although this site has taken part in runs"):
        Budget(path, begun=True)
    budget = Budget(path)
    budget.spend("a", 1, ROUND, PLAN)
    path.unlink()
    with pytest.raises(FlapsamError, match="cannot be written"):
        budget.spend("a", 2, ROUND, PLAN)
    for damaged in ('{"run": "a"}\n', "nonsense\n", '{"run":"a","round":1,"sampling":0.5,"noise":0,"steps":2}\n', "[]\n"):
        path.write_text(damaged)
        with pytest.raises(FlapsamError, match="restore this file"):
            Budget(path)


def test_an_entry_that_a_crash_has_cut_off_was_never_spent(tmp_path: Path):
    path = tmp_path / "privacy.jsonl"
    Budget(path).spend("a", 1, ROUND, PLAN)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert len(Budget(path).spent) == 1 and path.read_bytes() == whole


SPENDER = """
import sys
from pathlib import Path
from flapsam.federation.privacy.accounting import Steps
from flapsam.federation.privacy.budget import Budget
budget = Budget(Path(sys.argv[1]))
while True:
    number = len(budget.spent) + 1
    budget.spend("a", number, Steps(0.5, 20.0, 2), Steps(0.5, 20.0, 10**9))
    print(number, flush=True)
"""


def test_the_ledger_never_falls_below_what_was_spent_when_it_is_killed(tmp_path: Path):
    path, rng, steps = tmp_path / "privacy.jsonl", np.random.default_rng(0), 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", SPENDER, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()
        # Some entries later, in the middle of whatever it is doing.
        for _ in range(int(rng.integers(30))):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read().split()
        process.wait()
        entries = len(Budget(path).spent)
        assert entries >= steps + 1 and entries >= max(map(int, told), default=0)
        steps = entries


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return resolve(read_config(small_run(tmp_path / "run.yaml", make_sites(tmp_path / "data", cases=5), **PRIVATE)))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rounds": {"weights": "uniform"}}, "needs rounds.steps"),
        ({"rounds": {"steps": 8}}, "does not go with rounds.weights: slices"),
        ({"rounds": {"steps": 8, "weights": "cases"}}, "does not go with rounds.weights: cases"),
        ({"rounds": {"steps": 8, "weights": "uniform", "patience": 2}}, "does not go with rounds.patience"),
        ({"training": {"schedule_epochs": 9}}, "needs training.schedule_epochs: null"),
        ({"privacy": {"epsilon": 0}}, "privacy.epsilon"),
        ({"privacy": {"delta": 1}}, "privacy.delta"),
        ({"privacy": {"sampling": 1.1}}, "privacy.sampling"),
        ({"privacy": {"clip": 0}}, "privacy.clip"),
    ],
)
def test_settings_that_would_reveal_more_are_refused(fields: dict[str, Any], sentence: str, tmp_path: Path):
    with pytest.raises(FlapsamError, match=sentence):
        read_config(small_run(tmp_path / "run.yaml", tmp_path, **{**PRIVATE, **fields}))


@pytest.mark.usefixtures("no_report", "small_families")
def test_only_tensors_leave_a_site_and_a_round_is_spent_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answers: list[tuple[str, Any]] = []
    fit = Client.fit

    def twice(client: Client, packets: list[bytes], *rest: Any) -> bytes:
        answer = fit(client, packets, *rest)
        assert fit(client, packets, *rest) == answer
        number = client.state.held()
        contract = client.agreement.up(client.data.site, (number[0] if number else 0) + 1)
        answers.append((client.data.site, decode(answer, lambda header: contract, 1 << 24)[0]))
        return answer

    monkeypatch.setattr(Client, "fit", twice)
    simulate(config)
    assert len(answers) == 4
    assert all(header.samples == 0 and not header.metrics for _, header in answers)
    assert not read_events(tmp_path / "run", "validation")
    for site in ("site_0", "site_1"):
        ledger = tmp_path / "run" / "state" / "federated" / "sites" / site / "privacy.jsonl"
        plan = planned(config)
        assert [entry.steps for entry in Budget(ledger).spent] == 2 * [Steps(0.5, plan.noise, 2)]
        # Two rounds more could be repeated before more than 8 would have been spent.
        assert Budget(ledger).epsilon(1e-3) < epsilon([plan], 1e-3) <= 8


def site_of(tmp_path: Path, **fields: Any) -> SiteConfig:
    tree = {"data": {"path": tmp_path / "data" / "site_0"}, "state": tmp_path / "state", "threads": 1}
    return SiteConfig.model_validate({**tree, "bounds": {"min_steps": 1}, **fields})


def joined(config: RunConfig, site: SiteConfig, run: str = "0" * 32) -> tuple[SiteSide, Presence]:
    side = SiteSide("site_0", site)
    return side, read_message(Presence, side.join(Proposal.of(run, config).model_dump_json().encode()))


@pytest.mark.usefixtures("small_families")
def test_a_site_with_a_ceiling_refuses_what_would_exceed_it(config: RunConfig, tmp_path: Path):
    site = site_of(tmp_path, privacy={"epsilon": 8, "delta": 1e-3})
    assert [code for code, _ in refusals(config.model_copy(update={"privacy": None}), site)] == ["privacy"]
    assert not list(refusals(config, site))
    side, presence = joined(config, site)
    # No count of patients' data leaves.
    assert set(presence.cases.values()) == {0} and presence.training_cases == presence.training_slices == 1
    assert any("ε = 8" in sentence for sentence in in_words(side.config, site))
    side.client.randomness = Seeded()
    side.fit([packet_of_start(side)])
    assert [entry["steps"] for entry in map(json.loads, site.privacy_spent.read_text().splitlines())] == [2]
    joined(config, site)
    # A second run would spend as much again. A run with less noise than the ceiling asks for is refused at once.
    with pytest.raises(SiteFailed, match=r"^privacy$"):
        joined(config, site, "1" * 32)
    with pytest.raises(SiteFailed, match=r"^privacy$"):
        joined(config, site_of(tmp_path, state=tmp_path / "other", privacy={"epsilon": 4, "delta": 1e-3}))
    site.privacy_spent.unlink()
    with pytest.raises(SiteFailed, match=r"^state$"):
        joined(config, site)


def packet_of_start(side: SiteSide) -> bytes:
    from tests.federation.test_site_limits import packet

    return packet(side, 0)


@pytest.mark.usefixtures("small_families")
def test_a_gradient_that_is_not_finite_has_no_answer(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = site_of(tmp_path)
    side, _ = joined(config, site)
    monkeypatch.setattr("flapsam.learning.private._flat_gradient", lambda moving: np.full(9, math.nan))
    side.client.randomness = Seeded(1)
    monkeypatch.setattr("flapsam.learning.private.uniform", lambda source, count: np.zeros(count))
    with pytest.raises(SiteFailed):
        side.fit([packet_of_start(side)])
    # Its steps count as spent, because nobody knows how far they went.
    assert len(Budget(site.privacy_spent).spent) == 1
    assert not list((site.run_folder("0" * 32) / "site").glob("reply*"))
