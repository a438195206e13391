"""Differential privacy in a federation: accounting, the ledger of what was spent, and what leaves a site."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, optimize
from scipy.stats import norm as normal

from flapsam.adapters.store import load_adapter
from flapsam.base.errors import FlapsamError
from flapsam.experiments.simulation import simulate
from flapsam.federation.agreement import SERVER
from flapsam.federation.client import Client
from flapsam.federation.hospitals.bounds import refusals
from flapsam.federation.hospitals.handshake import Presence, Proposal, SiteFailed, read_message
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.federation.hospitals.words import in_words
from flapsam.federation.packets import Header, decode, encode
from flapsam.federation.preparation import resolve
from flapsam.federation.privacy.accounting import LEAST, Plan, Steps, epsilon, noise_for, planned
from flapsam.federation.privacy.budget import Budget, BudgetError, Ceiling
from flapsam.learning import private
from flapsam.run.config import RANDOM, RunConfig
from flapsam.run.reading import read_config
from flapsam.sam import tensors_of
from flapsam.sites import IGNORED
from tests.helpers.families import small_run
from tests.helpers.ledgers import read_events
from tests.helpers.randomness import Seeded
from tests.helpers.sites import make_sites

RUN = "0" * 32
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

    return integrate.quad(inner, -9 * noise, 9 * noise + 1, limit=200, epsabs=1e-11)[0]


def solved(delta_at: Any, delta: float) -> float:
    return optimize.root_scalar(lambda eps: delta_at(eps) - delta, bracket=(1e-6, 60), xtol=1e-10).root


@pytest.mark.parametrize(
    ("noise", "count", "delta"),
    [(1.0, 1, 1e-5), (0.5, 1, 1e-3), (4.0, 16, 1e-5), (10.0, 400, 1e-6), (2.0, 3, 1e-3), (30.0, 1000, 1e-5)],
)
def test_epsilon_without_sampling_is_that_of_the_closed_form(noise: float, count: int, delta: float):
    # Gaussian steps add up to a single one, whose noise is smaller by the root of their number.
    exact = solved(lambda eps: delta_of_gaussian(eps, noise / math.sqrt(count)), delta)
    assert epsilon(Steps(1, noise, count), delta) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    ("sampling", "noise", "delta", "count"),
    [(0.5, 1.0, 1e-3, 1), (0.1, 0.7, 1e-5, 1), (0.02, 0.5, 1e-4, 1), (0.9, 3.0, 1e-3, 2), (0.2, 2.0, 1e-4, 2)],
)
def test_epsilon_with_sampling_is_that_of_arithmetic(sampling: float, noise: float, delta: float, count: int):
    one = delta_of_step if count == 1 else delta_of_two_steps
    exact = solved(lambda eps: max(one(eps, sampling, noise, removed) for removed in (True, False)), delta)
    found = epsilon(Steps(sampling, noise, count), delta)
    assert found == pytest.approx(exact, rel=2e-3) and found > exact * (1 - 1e-6)


def test_epsilon_of_many_steps_lies_between_the_limit_and_the_published_bound():
    found = epsilon(Steps(0.01, 4.0, 10_000), 1e-5)
    # Many steps come close to one Gaussian step (Bu et al. 2020, arXiv 1911.11607): μ = q √(T (exp(1/σ²) − 1)).
    mu = 0.01 * math.sqrt(10_000 * math.expm1(1 / 16))
    assert found == pytest.approx(solved(lambda eps: delta_of_gaussian(eps, 1 / mu), 1e-5), rel=0.01)
    # Abadi et al. 2016, section 3.2: the moments accountant gives 1.26, which later accountants have only lowered.
    assert found < 1.26


@pytest.mark.parametrize(("allowed", "sampling", "count"), [(1.0, 0.5, 100), (8.0, 0.5, 160), (12.0, 1.0, 1)])
def test_the_noise_suffices_and_is_hardly_more(allowed: float, sampling: float, count: int):
    noise = noise_for(allowed, 1e-3, sampling, count)
    assert 0.99 * allowed < epsilon(Steps(sampling, noise, count), 1e-3) <= allowed


def test_no_run_has_less_noise_than_the_least():
    """A search for less would take ever longer, and where patients hardly ever take part, any noise would do."""
    assert noise_for(1000, 1e-3, 0.5, 1) == noise_for(1, 0.5, 1e-9, 1) == LEAST


PLAN = Plan(Steps(0.5, 20.0, 10), 1.0, 1e-6)


def opened(path: Path, ceiling: Ceiling | None = None) -> Budget:
    budget = Budget(path, ceiling)
    budget.create(begun=False)
    return budget


def test_a_run_takes_no_more_steps_than_its_noise_is_for(tmp_path: Path):
    path = tmp_path / "state" / "privacy.jsonl"
    for number in range(1, 6):
        opened(path).spend("a", number, 2, PLAN)
    with pytest.raises(BudgetError, match=r"with round 5, .* 12 private steps, but its noise is for 10"):
        opened(path).spend("a", 5, 2, PLAN)
    assert [(entry.run, entry.round, entry.plan.steps.count) for entry in opened(path).spent()] == [
        ("a", number, 2) for number in range(1, 6)
    ]


def test_a_site_reveals_no_more_than_its_ceiling_over_all_runs(tmp_path: Path):
    """By hand: two runs with ε = 1 and δ = 1e-6 each, however many rounds they have, spend 2 and 2e-6."""
    budget = opened(tmp_path / "privacy.jsonl", Ceiling(epsilon=2.5, delta=2e-6))
    for run in ("a", "b"):
        for number in (1, 2):
            budget.check(run, PLAN)
            budget.spend(run, number, 2, PLAN)
    assert budget.total() == (2.0, 2e-6)
    for act in (lambda plan: budget.check("c", plan), lambda plan: budget.spend("c", 1, 2, plan)):
        with pytest.raises(BudgetError, match=r"ε would rise to 3; this site allows 2.5, of which other runs have spent 2"):
            act(PLAN)
        with pytest.raises(BudgetError, match="δ would rise to 3e-06"):
            act(replace(PLAN, epsilon=0.5))
        with pytest.raises(BudgetError):
            act(replace(PLAN, epsilon=math.nan))
    assert len(budget.spent()) == 4
    # A run that has begun may go on.
    budget.spend("a", 3, 2, PLAN)


@pytest.mark.parametrize("less", [{"steps": Steps(0.5, 1.0, 10)}, {"steps": Steps(0.4, 20.0, 10)}, {"epsilon": 0.5}])
def test_a_run_cannot_change_its_promise_on_the_way(less: dict[str, Any], tmp_path: Path):
    budget = opened(tmp_path / "privacy.jsonl")
    budget.spend("a", 1, 2, PLAN)
    for act in (lambda plan: budget.check("a", plan), lambda plan: budget.spend("a", 2, 2, plan)):
        with pytest.raises(BudgetError, match="differ from earlier rounds"):
            act(replace(PLAN, **less))


def test_a_missing_or_damaged_ledger_ends_all_answers(tmp_path: Path):
    path = tmp_path / "privacy.jsonl"
    with pytest.raises(FlapsamError, match="is missing, although this site has taken part in private runs"):
        Budget(path).create(begun=True)
    budget = opened(path)
    budget.spend("a", 1, 2, PLAN)
    path.unlink()
    with pytest.raises(FlapsamError, match="cannot be written"):
        budget.spend("a", 2, 2, PLAN)
    good = {"run": "a", "round": 1, "sampling": 0.5, "noise": 1, "steps": 2, "epsilon": 1, "delta": 1e-5}
    for damage in ({"noise": 0}, {"noise": math.nan}, {"steps": 0}, {"epsilon": -1}, {"delta": 1}, {"sampling": "x"}):
        path.write_text(json.dumps({**good, **damage}) + "\n")
        with pytest.raises(FlapsamError, match="restore this file"):
            opened(path)
    for damaged in ('{"run": "a"}\n', "nonsense\n", "[]\n"):
        path.write_text(damaged)
        with pytest.raises(FlapsamError, match="restore this file"):
            budget.spend("a", 2, 2, PLAN)


def test_an_entry_that_a_crash_has_cut_off_was_never_spent(tmp_path: Path):
    path = tmp_path / "privacy.jsonl"
    budget = opened(path)
    budget.spend("a", 1, 2, PLAN)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert len(budget.spent()) == 1 and path.read_bytes() == whole + whole[:20]
    budget.spend("a", 2, 2, PLAN)
    assert len(budget.spent()) == 2 and path.read_bytes().startswith(whole)


def test_a_failed_write_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "privacy.jsonl"
    budget = opened(path)
    budget.spend("a", 1, 2, PLAN)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FlapsamError, match="No space left"):
        budget.spend("a", 2, 2, PLAN)
    monkeypatch.undo()
    assert len(budget.spent()) == 1
    budget.spend("a", 2, 2, PLAN)


def test_without_locks_nothing_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    budget = opened(tmp_path / "privacy.jsonl")
    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(FlapsamError, match="has no locks"):
        budget.spend("a", 1, 2, PLAN)
    assert not budget.spent()


SPENDER = """
import sys
from pathlib import Path
from flapsam.federation.privacy.accounting import Plan, Steps
from flapsam.federation.privacy.budget import Budget, BudgetError, Ceiling
budget = Budget(Path(sys.argv[1]), Ceiling(epsilon=30, delta=0.5))
budget.create(begun=False)
print("ready", flush=True)
if sys.argv[3]:
    sys.stdin.readline()
plan = Plan(Steps(0.5, 20.0, 10**9), 1.0, 1e-6)
for number in range(10**9):
    try:
        budget.spend(f"{sys.argv[2]}-{number // 5}", number, 2, plan)
    except BudgetError:
        sys.exit()
    print(number, flush=True)
"""


def spender(path: Path, name: str, waits: str = "") -> subprocess.Popen[str]:
    """A process that spends privacy. Its first line says that it is ready."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SPENDER, path, name, waits], **pipes)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_the_ledger_never_falls_below_what_was_spent_when_it_is_killed(tmp_path: Path):
    path, rng, told = tmp_path / "privacy.jsonl", np.random.default_rng(0), 0
    for life in range(20):
        process = spender(path, f"{life}")
        assert process.stdout
        # Some entries later, in the middle of whatever it is doing.
        for _ in range(1 + int(rng.integers(5))):
            told += bool(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        told += len(process.stdout.read().split())
        process.wait()
        assert len(Budget(path).spent()) >= told
    assert told >= 20


def test_two_processes_together_do_not_exceed_the_ceiling(tmp_path: Path):
    path = tmp_path / "privacy.jsonl"
    processes = [spender(path, name, "waits") for name in "ab"]
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    told = sum(len(process.communicate()[0].split()) for process in processes)
    entries = Budget(path).spent()
    assert len(entries) == told
    assert Budget(path).total()[0] == len({entry.run for entry in entries}) == 30


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return resolve(read_config(small_run(tmp_path / "run.yaml", make_sites(tmp_path / "data", cases=5), **PRIVATE)))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rounds": {"weights": "uniform"}}, "needs rounds.steps"),
        ({"rounds": {"steps": 8}}, "cannot be used with rounds.weights: slices"),
        ({"rounds": {"steps": 8, "weights": "cases"}}, "cannot be used with rounds.weights: cases"),
        ({"rounds": {"steps": 8, "weights": "uniform", "patience": 2}}, "cannot be used with rounds.patience"),
        ({"training": {"schedule_epochs": 9}}, "needs training.schedule_epochs: null"),
        ({"site_ranks": {"site_0": 1}}, "cannot be used with site_ranks"),
        ({"rounds": {"count": 10**6, "steps": 8, "weights": "uniform"}}, "allows at most 1,000,000 steps"),
        ({"privacy": {"epsilon": 0}}, "privacy.epsilon"),
        ({"privacy": {"delta": 1}}, "privacy.delta"),
        ({"privacy": {"sampling": 1.1}}, "privacy.sampling"),
        ({"privacy": {"clip": 5e-324}}, "privacy.clip"),
        ({"privacy": {"clip": float("inf")}}, "privacy.clip"),
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
        assert [entry.plan for entry in Budget(ledger).spent()] == 2 * [replace(plan, steps=replace(plan.steps, count=2))]
        # Two rounds more could be repeated.
        assert plan.steps.count == 8 and epsilon(plan.steps, 1e-3) <= 8 and Budget(ledger).total() == (8, 1e-3)


def site_of(tmp_path: Path, **fields: Any) -> SiteConfig:
    tree = {"data": {"path": tmp_path / "data" / "site_0"}, "state": tmp_path / "state", "threads": 1}
    return SiteConfig.model_validate({**tree, "bounds": {"min_steps": 1}, **fields})


def joined(config: RunConfig, site: SiteConfig, run: str = RUN) -> tuple[SiteSide, Presence]:
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
    """The server's packet that begins the first round."""
    agreement = side.client.agreement
    header = Header(run=agreement.run, round=0, base=0, sender=SERVER)
    return encode(header, agreement.nothing(side.client.rank), {})


@pytest.mark.usefixtures("small_families")
def test_a_run_cannot_come_back_with_another_configuration(config: RunConfig, tmp_path: Path):
    """Personal tensors of a run without privacy would otherwise be sent once the same run no longer calls them personal."""
    site, pattern = site_of(tmp_path), "*.lora_B.weight"
    side, _ = joined(config.model_copy(update={"privacy": None, "personal": [pattern]}), site)
    side.fit([packet_of_start(side)])
    kept = next((site.run_folder(RUN) / "site").glob("personal-*"))
    with pytest.raises(SiteFailed, match=r"^bounds$"):
        joined(config, site)
    assert "not the one with which this site joined" in site.journal.read_text()
    # Nor if an earlier version has left the state, and no record of the configuration.
    (site.run_folder(RUN) / "proposal.sha256").unlink()
    with pytest.raises(SiteFailed, match=r"^bounds$"):
        joined(config, site)
    # Even if it could, what was personal would not be loaded.
    joined(config.model_copy(update={"privacy": None}), site)
    side, _ = joined(config.model_copy(update={"privacy": None}), site)
    state = side.client.state
    assert state.personal_before(9) and kept.exists() and not side.client.agreement.personal
    side.client._receive([packet_of_start(side)])
    for name, tensor in side.client.agreement.start.items():
        assert torch.equal(tensors_of(side.network, [name])[name], tensor), name


@pytest.mark.usefixtures("small_families")
def test_a_private_run_does_not_tell_which_label_values_a_site_has(config: RunConfig, tmp_path: Path):
    only_core = config.data.model_copy(update={"labels": {"core": 2}})
    changed = config.model_copy(update={"data": only_core})
    with pytest.raises(SiteFailed, match=r"^data$"):
        joined(changed.model_copy(update={"privacy": None}), site_of(tmp_path, state=tmp_path / "other"))
    site = site_of(tmp_path)
    side, _ = joined(changed, site)
    labels = side.client.data.train[0].labels()
    # The ball around the core has a value that belongs to no class. The loss leaves it out.
    assert set(np.unique(labels)) == {IGNORED, 0, 1}


@pytest.mark.usefixtures("small_families")
@pytest.mark.parametrize(
    ("privacy", "own", "code"),
    [
        ({"windows": 257}, {}, "bounds"),
        ({"sampling": 0.04}, {}, "bounds"),
        ({"sampling": 0.05}, {"min_cases": 3}, ""),
        ({"sampling": 1}, {"min_cases": 4}, "cases"),
    ],
)
def test_a_private_run_has_bounds_at_a_site(
    privacy: dict[str, Any], own: dict[str, Any], code: str, config: RunConfig, tmp_path: Path
):
    assert config.privacy
    changed = config.model_copy(update={"privacy": config.privacy.model_copy(update=privacy)})
    if not code:
        joined(changed, site_of(tmp_path, **own))
        return
    with pytest.raises(SiteFailed, match=f"^{code}$"):
        joined(changed, site_of(tmp_path, **own))


@pytest.mark.usefixtures("small_families")
def test_a_round_is_on_the_disk_before_its_first_step(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = site_of(tmp_path)
    side, _ = joined(config, site)
    order: list[str] = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        order.extend(["written"] * (os.fstat(descriptor).st_ino == site.privacy_spent.stat().st_ino))

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(private, "uniform", lambda source, count: (order.append("step"), np.ones(count))[1])
    side.fit([packet_of_start(side)])
    assert order == ["written", "step", "step"]


@pytest.mark.usefixtures("small_families")
def test_a_sites_own_adapter_of_a_private_run_is_chosen_once_and_nothing_is_said(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    last = config.model_copy(update={"rounds": config.rounds.model_copy(update={"last_epochs": 1})})
    site = site_of(tmp_path)
    side, _ = joined(last, site)
    assert side.own([b"nonsense"]) == b"" and not (site.run_folder(RUN) / "adapter-personal").exists()
    assert side.own([packet_of_start(side)]) == b"" and (site.run_folder(RUN) / "adapter-personal").exists()
    card = load_adapter(site.run_folder(RUN) / "adapter-personal", RANDOM)[1]
    assert card.privacy is None
    monkeypatch.setattr(side.client, "own", lambda packets: pytest.fail("it was chosen again"))
    assert side.own([packet_of_start(side)]) == b""
