"""Test scores of hospitals: what a site tells about its test cases, and what it keeps to itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta

from flapsam.base.errors import FlapsamError
from flapsam.experiments.simulation import simulate
from flapsam.federation.hospitals.aggregates import aggregated, interval_of, pooled_dice, unchanged
from flapsam.federation.hospitals.evaluation import begin, evaluation_of
from flapsam.federation.hospitals.handshake import SiteFailed
from flapsam.federation.hospitals.server_side import ServerSide
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.federation.preparation import resolve
from flapsam.federation.rounds import Answer, Work
from flapsam.learning.metrics import CaseScores, summarise
from flapsam.report.page import write_report
from flapsam.report.site_tests import site_rows
from flapsam.report.tables import site_tests_json
from flapsam.run.config import Evaluation, RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import SiteTested, read_ledger
from flapsam.run.reading import read_config
from flapsam.run.site_scores import Figures
from tests.helpers.sites import make_sites, write_run

SITES = ("site_0", "site_1")
PLAIN = Evaluation()


def scores_of(dices: list[float | None], **more: Any) -> list[CaseScores]:
    return [
        CaseScores(f"case {n}", "site", {"ball": dice}, {"ball": 10.0 * n}, outcome={"ball": "both"}, **more)
        for n, dice in enumerate(dices)
    ]


def test_nothing_is_told_about_fewer_patients_than_the_minimum():
    dices = [0.5, 0.6, 0.7, 0.8, None, None]
    assert aggregated(scores_of([0.5, 0.6, 0.7, 0.8]), 5, PLAIN) is None
    told = aggregated(scores_of(dices), 5, PLAIN)
    # Six patients are enough, but only four of them have the class.
    assert told is not None and "dice" not in told.measures and told.mean is None
    assert told.measures["hd95"]["ball"].patients == 5
    told = aggregated(scores_of(dices), 4, PLAIN)
    assert told is not None and told.measures["dice"]["ball"].mean == 0.65


def two_classes(second: list[float | None], outcomes: list[str]) -> list[CaseScores]:
    """Ten patients with class a, and the given scores of class b."""
    return [
        CaseScores(
            f"case {n}",
            "site",
            {"a": 0.5 + 0.01 * n, "b": dice, "both": 0.6},
            {"a": 1.0, "b": 1.0},
            outcome={"a": "both", "b": outcome, "both": "both"},
            regions=["both"],
            means={"half": 0.5},
        )
        for n, (dice, outcome) in enumerate(zip(second, outcomes, strict=True))
    ]


RARE = Evaluation(regions={"both": ["a", "b"]}, means={"half": ["a", "b"]})
FEW = {
    "one patient has it": ([0.137, *[None] * 9], ["both", *["absent"] * 9]),
    "one has it, and it counts as 1 elsewhere": ([0.137, *[1.0] * 9], ["both", *["absent"] * 9]),
    "one has it, and it is predicted everywhere": ([0.74, *[0.0] * 9], ["both", *["spurious"] * 9]),
    "an adapter that finds it in one patient alone": ([0.83, *[0.0] * 9], ["both", *["missed"] * 9]),
}


@pytest.mark.parametrize(("dices", "outcomes"), FEW.values(), ids=FEW)
def test_a_class_of_few_patients_cannot_be_computed_from_what_is_told(dices: list, outcomes: list[str]):
    """Neither it nor a region nor a mean of it is told, and the mean over the classes is that of the others."""
    told = aggregated(two_classes(dices, outcomes), 5, RARE)
    assert told is not None and told.mean is not None
    assert {name for named in told.measures.values() for name in named} == {"a"}
    assert (told.means, told.missed, told.spurious) == ({}, {"a": 0}, {"a": 0})
    assert told.mean.mean == told.measures["dice"]["a"].mean == 0.545
    # With enough of them, all is told.
    told = aggregated(two_classes([0.5] * 10, ["both"] * 10), 5, RARE)
    assert told is not None and set(told.measures["dice"]) == {"a", "b", "both"} and set(told.means) == {"half"}


def test_a_class_that_a_few_lack_does_not_show_their_other_scores():
    """With a mean over the classes of each case, 2n·M − n·A − (n − 1)·B would be the Dice of A in the one who lacks B."""
    told = aggregated(two_classes([None, *[0.7] * 9], ["absent", *["both"] * 9]), 5, RARE)
    assert told is not None and told.mean is not None
    assert (told.means, told.mean.deviation) == ({}, None)
    assert told.mean.mean == pytest.approx((0.545 + 0.7) / 2, abs=1e-3)
    before = two_classes([0.5] * 10, ["both"] * 10)
    told = aggregated(two_classes([None, *[0.7] * 9], ["absent", *["both"] * 9]), 5, RARE, before)
    assert told is not None and told.difference is None


def test_a_patient_with_many_cases_counts_once():
    many = [CaseScores(f"{n}", "site", {"a": 0.2}, {}, outcome={"a": "both"}, subject="one") for n in range(56)]
    others = [CaseScores(f"more {n}", "site", {"a": 0.9}, {}, outcome={"a": "both"}) for n in range(4)]
    told = aggregated([*many, *others], 5, PLAIN)
    assert told is not None and told.measures["dice"]["a"].mean == 0.76


def test_a_run_with_other_label_values_gets_no_scores(config: RunConfig, tmp_path: Path):
    RunFolder(config.output).begin(config)
    Federation(config, tmp_path).train()
    data = config.data.model_copy(update={"labels": {"ball": [1, 2]}})
    other = config.model_copy(update={"output": tmp_path / "other", "data": data})
    RunFolder(other.output).begin(other)
    federation = Federation(other, tmp_path)
    federation.train()
    assert federation.answers == [b"", b""]


def test_a_class_that_nobody_has_tells_nothing_whatever_the_rule():
    """With a Dice of 1 where it is absent, the mean would be 1 − k/n for k patients with a spurious one."""
    told = aggregated(two_classes([0.0, *[1.0] * 9], ["spurious", *["absent"] * 9]), 5, RARE)
    assert told is not None and "b" not in told.measures["dice"] and "b" not in told.spurious
    assert told.mean is not None and told.mean.mean == 0.545


def test_the_difference_leaves_out_classes_that_either_adapter_finds_in_few():
    before = two_classes([0.5] * 10, ["both"] * 10)
    told = aggregated(two_classes([0.9, *[0.0] * 9], ["both", *["missed"] * 9]), 5, RARE, before)
    assert told is not None and told.difference is not None and told.difference.mean == 0


def test_cases_that_one_patient_misses_are_one_miss():
    scores = [CaseScores(f"case {n}", "site", {"a": 0.0}, {}, outcome={"a": "missed"}, subject="one") for n in range(6)] + [
        CaseScores(f"more {n}", "site", {"a": 0.5}, {}, outcome={"a": "both"}) for n in range(5)
    ]
    told = aggregated(scores, 5, PLAIN)
    assert told is not None and told.missed == {"a": None}


@pytest.mark.parametrize(
    ("known", "present", "chosen"),
    [
        ("", "abcdef", "abcdef"),
        ("abcdef", "abcdefg", "abcdef"),
        ("abcdef", "abcdefgh", "abcdef"),
        ("abcdef", "abcdefghi", "abcdefghi"),
        ("abcdef", "abcde", None),
        ("abcdef", "abc", "abc"),
    ],
)
def test_test_patients_come_and_go_in_groups(known: str, present: str, chosen: str | None):
    """The smallest group is three. A single patient who comes or goes could be computed from the two answers."""
    before, now = ([(name, f"case {name}", "0") for name in names] for names in (known, present))
    found = unchanged(before, now, 3)
    assert found == (None if chosen is None else {(name, f"case {name}", "0") for name in chosen})


def test_neither_a_new_case_nor_a_changed_label_map_of_a_known_patient_is_scored_alone():
    known = [(name, f"case {name}", "0") for name in "abcdef"]
    assert unchanged(known, [*known, ("a", "follow-up", "0")], 3) == set(known)
    assert unchanged(known, [*known[1:], ("a", "case a", "1")], 3) is None
    several = [(name, "follow-up", "0") for name in "abc"]
    assert unchanged(known, [*known, *several], 3) == {*known, *several}


def test_cases_of_one_patient_count_as_one():
    assert aggregated(scores_of([0.5] * 6, subject="one"), 2, PLAIN) is None


def test_figures_match_values_by_hand():
    """0.2 … 0.9 in steps of 0.1: mean 0.55, deviation √0.06 = 0.245. The interval takes 10 for the 8 patients:
    0.55 ± 2.262 · 0.245 / √10."""
    told = aggregated(scores_of([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]), 3, PLAIN)
    assert told is not None
    figures = told.measures["dice"]["ball"]
    assert (figures.patients, figures.mean, figures.deviation) == (10, 0.55, 0.245)
    mean = interval_of(figures)
    assert (mean.low, mean.high) == (pytest.approx(0.375, abs=1e-3), pytest.approx(0.725, abs=1e-3))
    # A quarter of eight patients is smaller than three.
    assert figures.quartiles is None


def test_a_quartile_is_nobodys_score():
    """The weights of Harrell and Davis come from the beta distribution, and every patient has one."""
    values = np.sort(np.random.default_rng(0).uniform(0.2, 0.9, 20))
    told = aggregated(scores_of(values.tolist()), 5, PLAIN)
    assert told is not None and told.measures["dice"]["ball"].quartiles is not None
    for share, value in zip((0.25, 0.5, 0.75), told.measures["dice"]["ball"].quartiles, strict=True):
        weights = np.diff(beta.cdf(np.arange(21) / 20, 21 * share, 21 * (1 - share)))
        assert weights.max() < 0.3
        assert value == pytest.approx(float(weights @ values), abs=6e-4)


@pytest.mark.parametrize(("missed", "told"), [(0, 0), (1, None), (4, None), (5, 5), (7, 5), (12, 10)])
def test_a_small_number_of_missed_structures_is_not_told(missed: int, told: int | None):
    """Numbers are rounded to multiples of 5."""
    outcomes = ["missed"] * missed + ["both"] * (12 - missed)
    scores = [
        CaseScores(str(n), "site", {"ball": 0.5}, {"ball": 1.0}, outcome={"ball": outcome})
        for n, outcome in enumerate(outcomes)
    ]
    result = aggregated(scores, 5, PLAIN)
    assert result is not None and result.missed == {"ball": told}


def test_the_mean_over_the_sites_counts_each_by_its_patients():
    figures = {
        "a": Figures(patients=10, mean=0.9, deviation=0.1),
        "b": Figures(patients=30, mean=0.5, deviation=0.2),
        "c": None,
    }
    whole = pooled_dice(figures)
    # √(10 · 0.01 + 30 · 0.04) / 40 · t(38) = 0.0285 · 2.024 = 0.058
    assert whole is not None and (whole.value, whole.patients) == (pytest.approx(0.6), 40)
    assert (whole.low, whole.high) == (pytest.approx(0.542, abs=1e-3), pytest.approx(0.658, abs=1e-3))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data", cases=5), rounds={"count": 1}, aggregator="fedavg")
    return resolve(read_config(path))


def site_config(folder: Path, site: str, **fields: object) -> SiteConfig:
    own = {"data": {"path": folder / "data" / site}, "state": folder / "state" / site, "threads": 1}
    bounds = {"strategies": ["flap"], "bounds": {"min_steps": 1}, "min_test_patients": 1}
    return SiteConfig.model_validate({**own, **bounds, **fields})


class Federation:
    """A server and its sites in one process."""

    def __init__(self, config: RunConfig, folder: Path, **own: object) -> None:
        self.server = ServerSide(config.output)
        self.sides = {site: SiteSide(site, site_config(folder, site, **own)) for site in SITES}
        for site, side in self.sides.items():
            self.server.admit(site, side.join(self.server.proposal))
        self.server.open()
        self.answers: list[bytes] = []

    def carry(self, work: Work) -> Iterator[Answer]:
        for site in self.server.asked(work):
            packets, side = iter(self.server.packets(site, work)), self.sides[site]
            if work == "fit":
                yield Answer(site, 0, fitted=side.fit(packets))
            elif work == "test":
                self.answers.append(side.test(packets))
                yield Answer(site, 0, tested=self.server.read_tested(site, self.answers[-1]))
            else:
                yield Answer(site, 0, scores=self.server.read_scores(side.validate(packets)))

    def train(self) -> None:
        assert self.server.train(self.carry, lambda: False)


def answers_in(folder: Path) -> list[SiteTested]:
    return [event for event in read_ledger(RunFolder(folder).ledger) if isinstance(event, SiteTested)]


def test_the_sites_tell_what_a_simulation_shows_and_no_case(config: RunConfig, tmp_path: Path):
    simulated = simulate(config.model_copy(update={"output": tmp_path / "simulated"})).summaries()["federated"]
    RunFolder(config.output).begin(config)
    federation = Federation(config, tmp_path)
    federation.train()
    tested = {event.site: event.scores for event in answers_in(config.output)}
    for site in SITES:
        scores = tested[site]
        assert scores is not None and scores.mean is not None
        assert scores.mean.mean == pytest.approx(simulated[site].mean_dice, abs=5e-4)
        for measure in ("surface_dice", "hd95", "surface_distance"):
            told = {name: figures.mean for name, figures in scores.measures[measure].items()}
            assert told == pytest.approx(simulated[site].values(measure), abs=0.05)
        # The single scores stay at the site, for its own use.
        (kept,) = (tmp_path / "state" / site / "runs").glob("*/tests/*.json")
        (case,) = json.loads(kept.read_text())
        assert case["case"].startswith(site)
        assert case["case"].encode() not in b"".join(federation.answers)
    page = write_report(config.output).read_text()
    assert "Test scores at the sites" in page and "test Dice at the sites" in page
    card = (config.output / "adapter" / "README.md").read_text()
    assert "The sites scored the adapter on their own test cases" in card
    assert f"{simulated['site_0'].mean_dice:.3f}" in card


@pytest.mark.parametrize("own", [{"metrics": False}, {"min_test_patients": 5}], ids=["metrics stay", "too few patients"])
def test_a_site_can_keep_its_scores_to_itself(own: dict[str, object], config: RunConfig, tmp_path: Path):
    RunFolder(config.output).begin(config)
    federation = Federation(config, tmp_path, **own)
    federation.train()
    assert federation.answers == [b"", b""]
    assert [event.scores for event in answers_in(config.output)] == [None, None]
    assert "No scores were told by site_0, site_1" in write_report(config.output).read_text()


def test_no_test_score_leaves_in_a_private_run(tmp_path: Path):
    fields = {
        "rounds": {"count": 1, "steps": 1, "weights": "uniform"},
        "training": {"window": 1, "batch_size": 8, "warmup_steps": 2, "schedule_epochs": None},
        "privacy": {"epsilon": 8, "delta": 1e-3},
        "aggregator": "fedavg",
    }
    config = resolve(read_config(write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data", cases=5), **fields)))
    RunFolder(config.output).begin(config)
    federation = Federation(config, tmp_path)
    federation.train()
    assert federation.answers == [b"", b""]


def test_the_same_tensors_get_the_same_answer_and_others_are_limited(config: RunConfig, tmp_path: Path):
    RunFolder(config.output).begin(config)
    federation = Federation(config, tmp_path, max_tests=1)
    federation.train()
    side = federation.sides["site_0"]
    assert side.test(iter(federation.server.packets("site_0", "test"))) == federation.answers[0]
    # After a crash, too, the site answers as before.
    again = SiteSide("site_0", site_config(tmp_path, "site_0", max_tests=1))
    again.join(federation.server.proposal)
    assert again.test(iter(federation.server.packets("site_0", "test"))) == federation.answers[0]
    federation.server.server.place({name: tensor + 1 for name, tensor in federation.server.server.tensors.items()})
    with pytest.raises(SiteFailed, match="rounds"):
        side.test(iter(federation.server.packets("site_0", "test")))


INVALID = {
    "no JSON": b"{",
    "a list": b"[]",
    "an unknown class": b'{"cases": 5, "patients": 5, "measures": {"dice": {"spy": FIGURES}}, "mean": null}',
    "an unknown measure": b'{"cases": 5, "patients": 5, "measures": {"spy": {"ball": FIGURES}}, "mean": null}',
    "an unknown field": b'{"cases": 5, "patients": 5, "measures": {}, "mean": null, "case": "knee"}',
    "no number": b'{"cases": 5, "patients": 5, "measures": {"dice": {"ball": NAN}}, "mean": null}',
    "a Dice above 1": b'{"cases": 5, "patients": 5, "measures": {}, "mean": {"patients": 5, "mean": 900, "deviation": 0}}',
    "more cases than it has": b'{"cases": 9999, "patients": 5, "measures": {}, "mean": null}',
    "more patients than cases": b'{"cases": 5, "patients": 5, "measures": {"dice": {"ball": MANY}}, "mean": null}',
    "a negative count": b'{"cases": -5, "patients": 5, "measures": {}, "mean": null}',
    "a fractional count": b'{"cases": 5.5, "patients": 5, "measures": {}, "mean": null}',
    "far too long": b" " * 2**21 + b'{"cases": 5, "patients": 5, "measures": {}, "mean": null}',
}


@pytest.mark.parametrize("answer", INVALID.values(), ids=INVALID)
def test_a_server_does_not_take_test_scores_on_trust(answer: bytes, config: RunConfig, tmp_path: Path):
    figures = b'{"patients": 5, "mean": 0.5, "deviation": 0.1, "quartiles": [0.4, 0.5, 0.6]}'
    RunFolder(config.output).begin(config)
    server = ServerSide(config.output)
    server.admit("site_0", SiteSide("site_0", site_config(tmp_path, "site_0")).join(server.proposal))
    valid = b'{"cases": 5, "patients": 5, "measures": {"dice": {"ball": FIGURES}}, "mean": null}'
    assert server.read_tested("site_0", valid.replace(b"FIGURES", figures)) is not None
    with pytest.raises(ValueError, match=r"invalid|validation error"):
        server.read_tested(
            "site_0",
            answer.replace(b"FIGURES", figures)
            .replace(b"NAN", figures.replace(b"0.5", b"NaN"))
            .replace(b"MANY", figures.replace(b"5,", b"500,", 1)),
        )


@pytest.fixture
def trained(config: RunConfig, tmp_path: Path) -> list[Path]:
    """Two finished runs of the same network."""
    runs = []
    for seed_steps in (1, 3):
        output = tmp_path / f"run {seed_steps}"
        changed = config.model_copy(
            update={"output": output, "training": config.training.model_copy(update={"epochs": seed_steps})}
        )
        simulate(changed)
        runs.append(output)
    return runs


def test_an_evaluation_scores_adapters_and_their_differences_and_trains_nothing(trained: list[Path], tmp_path: Path):
    evaluation = resolve(evaluation_of(trained, tmp_path / "evaluation"))
    begin(trained, evaluation)
    federation = Federation(evaluation, tmp_path)
    federation.train()
    dices = [summary["federated"] for summary in map(summaries_in, trained)]
    tested = answers_in(evaluation.output)
    assert [(event.round, event.site) for event in tested] == [(n, site) for n in (1, 2) for site in SITES]
    for event in tested:
        assert event.scores is not None and event.scores.mean is not None
        assert event.scores.mean.mean == pytest.approx(dices[event.round - 1][event.site], abs=5e-4)
        change = event.scores.difference
        if event.round == 1:
            assert change is None
        else:
            assert change is not None
            assert change.mean == pytest.approx(dices[1][event.site] - dices[0][event.site], abs=6e-4)
    events = read_ledger(RunFolder(evaluation.output).ledger)
    assert {event.event for event in events} == {"site", "site_test", "end"}
    assert "run 1" not in federation.server.proposal.decode()
    assert site_rows(events, ["one", "three"])[1][:2] == ["one", "site_0"]
    assert [entry["adapter"] for entry in site_tests_json(events, ["one", "three"])] == ["one", "three"]
    # A fit is refused, whoever asks for it.
    with pytest.raises(SiteFailed, match="rounds"):
        federation.sides["site_0"].fit(iter(federation.server.packets("site_0", "fit")))


def summaries_in(run: Path) -> dict[str, dict[str, float]]:
    results = json.loads((run / "results.json").read_text())
    return {mode: {site: one["mean_dice"] for site, one in sites.items()} for mode, sites in results["summaries"].items()}


def test_an_evaluation_that_crashes_goes_on_with_the_sites_that_are_left(trained: list[Path], tmp_path: Path):
    evaluation = resolve(evaluation_of(trained, tmp_path / "evaluation"))
    begin(trained, evaluation)
    federation = Federation(evaluation, tmp_path)
    asked: list[str] = []

    def crashing(work: Work) -> Iterator[Answer]:
        for answer in federation.carry(work):
            yield answer
            asked.append(answer.site)
            if len(asked) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.server.train(crashing, lambda: False)
    federation.server._lock.close()
    again = Federation(evaluation, tmp_path)
    again.train()
    assert [(event.round, event.site) for event in answers_in(evaluation.output)] == [(n, s) for n in (1, 2) for s in SITES]
    assert len(again.answers) == 1


def test_a_site_that_requires_privacy_takes_no_part_in_an_evaluation(trained: list[Path], tmp_path: Path):
    evaluation = resolve(evaluation_of(trained[:1], tmp_path / "evaluation"))
    begin(trained[:1], evaluation)
    server = ServerSide(evaluation.output)
    with pytest.raises(SiteFailed, match="privacy"):
        SiteSide("site_0", site_config(tmp_path, "site_0", privacy={"epsilon": 8, "delta": 1e-3})).join(server.proposal)


def test_adapters_of_different_networks_are_evaluated_one_at_a_time(trained: list[Path], config: RunConfig, tmp_path: Path):
    other = config.model_copy(update={"output": tmp_path / "other", "lora": config.lora.model_copy(update={"rank": 3})})
    simulate(other)
    with pytest.raises(FlapsamError, match=r"its lora is not that of .*; evaluate them one at a time"):
        evaluation_of([trained[0], other.output], tmp_path / "evaluation")
    # An adapter that lies in no run is enough.
    alone = tmp_path / "far" / "away" / "alone"
    alone.parent.mkdir(parents=True)
    (other.output / "adapter").rename(alone)
    assert evaluation_of([alone], tmp_path / "evaluation", checkpoint="random").lora.rank == 3


def test_a_summary_of_no_cases_is_empty():
    assert summarise([]).cases == 0
