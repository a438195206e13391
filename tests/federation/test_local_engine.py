"""Aggregators, codecs, ranks and early stopping in complete runs that take seconds, configured as by a user."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flapsam.adapters.store import read_card, read_tensors
from flapsam.experiments.simulation import simulate
from flapsam.federation.aggregation import AGGREGATORS
from flapsam.federation.compression import CODECS
from flapsam.federation.preparation import resolve
from flapsam.federation.server_optimizers import SERVER_OPTIMIZERS
from flapsam.federation.traffic import predict_traffic
from flapsam.run.reading import read_config
from flapsam.sam import assemble_run, travelling_state
from tests.helpers.command import flapsam
from tests.helpers.families import small_run
from tests.helpers.ledgers import read_events
from tests.helpers.sites import make_site, make_sites

pytestmark = pytest.mark.usefixtures("no_report", "small_families")

ENOUGH = {"median": 3, "trimmed-mean": 5}
"""Aggregator → number of sites that it needs; two are enough for the others."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("data"), sites=2, cases=4)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("many"), sites=5, cases=4)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_runs_with_mixed_ranks_and_saves_a_complete_adapter(name: str, many: Path, tmp_path: Path, capfd):
    """``predict`` rebuilds the network from the adapter's folder and returns the same label maps as the run."""
    sites = [f"site_{number}" for number in range(ENOUGH.get(name, 2))]
    config = small_run(tmp_path / "run.yaml", many, aggregator=name, site_ranks={"site_1": 1}, rounds={"count": 2})
    outcome = flapsam(capfd, "simulate", config, "--set", f"data.sites={sites}", "--json")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    assert [event["site"] for event in read_events(run, "fit")] == sites * 2
    borne = [(event["sites"], event["borne"]) for event in read_events(run, "borne")]
    assert borne == ([(len(sites), 1)] if name in ENOUGH else [])
    assert not read_events(run, "refused")
    outcome = flapsam(capfd, "predict", run, many, "--split", "test", "-o", tmp_path / "out", "--threads", "1", "--json")
    assert outcome.code == 0, outcome.err
    for path in map(Path, json.loads(outcome.out)["written"]):
        assert path.read_bytes() == (run / "predictions/federated" / path.relative_to(tmp_path / "out")).read_bytes()
    # An adapter contains the base weights of adapted layers only if the aggregator changes them.
    changed = [key for key in read_tensors(run / "adapter") if key.endswith("q_proj.weight")]
    assert bool(changed) == (name == "fedex-lora")
    # PEFT would load only part of such an adapter, so there must be no configuration for it.
    assert (run / "adapter" / "adapter_config.json").exists() == (name != "fedex-lora")


def test_a_site_whose_only_case_is_for_training_counts_in_every_round(tmp_path: Path):
    data = make_sites(tmp_path / "data", sites=2, cases=4)
    make_site(data / "single", 1, seed=2)
    simulate(read_config(small_run(tmp_path / "run.yaml", data, rounds={"count": 3, "validate_every": 1})))
    cases = {event["site"]: event["cases"] for event in read_events(tmp_path / "run", "site")}
    assert cases["single"] == {"train": 1, "val": 0, "test": 0}
    assert [event["round"] for event in read_events(tmp_path / "run", "fit") if event["site"] == "single"] == [1, 2, 3]
    assert not read_events(tmp_path / "run", "refused")


@pytest.mark.parametrize("codec", CODECS)
def test_predicted_traffic_is_close_to_the_measured_traffic(codec: str, data: Path, tmp_path: Path):
    """The few steps of this run move all values alike. ``benchmarks/communication.py`` has runs that learn.

    With adapters on keys and outputs, too, bf16 takes 7.5 % less than predicted.
    """
    fields = {"compression": {"codec": codec, "density": 0.2}, "rounds": {"count": 3}, "site_ranks": {"site_1": 1}}
    fields["lora"] = {"rank": 2, "projections": ["q", "v"]}
    config = read_config(small_run(tmp_path / "run.yaml", data, **fields))
    simulate(config)
    predicted = predict_traffic(resolve(config))
    assert [row.rank for row in predicted] == [2, 1]
    for site, row in zip(("site_0", "site_1"), predicted, strict=True):
        events = [event for event in read_events(tmp_path / "run") if event.get("site") == site]
        up, down = (sum(event.get(key, 0) for event in events) for key in ("bytes_up", "bytes_down"))
        # Large values next to each other make small gaps, which the prediction's synthetic values do not have.
        minimum = 0.65 if codec.startswith("topk") else 0.93
        assert minimum < up / row.up < 1.06, (site, up, row)
        assert minimum < down / row.down < 1.06, (site, down, row)


def test_traffic_prints_the_prediction_for_a_run(data: Path, tmp_path: Path, capfd):
    config = small_run(tmp_path / "run.yaml", data, site_ranks={"site_1": 1})
    outcome = flapsam(capfd, "traffic", config)
    assert outcome.code == 0, outcome.err
    assert "Predicted traffic of a site in 2 rounds" in outcome.out
    rows = json.loads(flapsam(capfd, "traffic", config, "--json").out)
    assert [row["rank"] for row in rows] == [2, 1]
    assert rows[0]["ratio"] == pytest.approx(rows[0]["full"] / (rows[0]["up"] + rows[0]["down"]))
    finer = json.loads(flapsam(capfd, "traffic", config, "--json", "--set", "compression.bits=3").out)
    assert finer[0]["up"] > 1.5 * rows[0]["up"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_every_server_optimizer_moves_the_tensors_about_as_far(optimizer: str, data: Path, tmp_path: Path):
    config = read_config(small_run(tmp_path / "run.yaml", data, server={"optimizer": optimizer}, rounds={"count": 3}))
    simulate(config)
    start = travelling_state(assemble_run(config).network)
    ended = read_tensors(tmp_path / "run" / "adapter")
    moved = sum(float((ended[name] - start[name]).square().sum()) for name in start) ** 0.5
    # Without a server optimizer, three rounds move the tensors by 1.5.
    assert 0.2 < moved < 5


def test_a_settled_run_ends(data: Path, tmp_path: Path):
    # No Dice rises by more than 1, so the run settles at the second validation, whose scores arrive during round 3.
    settings = {"count": 9, "patience": 1, "settled": 1.0}
    simulate(read_config(small_run(tmp_path / "run.yaml", data, rounds=settings)))
    run = tmp_path / "run"
    assert [event["round"] for event in read_events(run, "round")] == [1, 2, 3]
    assert [(event["site"], event["round"]) for event in read_events(run, "delivery")] == [("site_0", 3), ("site_1", 3)]
    assert read_card(run / "adapter").rounds == 3


def test_a_run_that_goes_back_ends_with_the_same_bits(data: Path, tmp_path: Path, capfd):
    """With packets that lose bits, so what earlier rounds left unsent counts, too."""
    fields = {"rounds": {"count": 3, "keep": 1}, "compression": {"codec": "steps"}}
    path = small_run(tmp_path / "run.yaml", data, **fields)
    config, run = read_config(path), tmp_path / "run"
    simulate(config)
    outcome = flapsam(capfd, "simulate", path, "--from-round", "2")
    assert outcome.code == 2 and "possible rounds: 3, 4" in outcome.err
    before, events = read_tensors(run / "adapter"), read_events(run)
    simulate(config, from_round=3)
    after = read_tensors(run / "adapter")
    assert all(torch.equal(after[name], before[name]) for name in before)
    (back,) = read_events(run, "went_back")
    assert (back["round"], back["federation"]) == (3, "federated")

    def told(events: list[dict]) -> list[tuple]:
        fields = ("event", "round", "site", "case", "loss", "dice")
        return [tuple(str(event.get(field)) for field in fields) for event in events if event["event"] != "went_back"]

    assert sorted(told(read_events(run))) == sorted(told(events))


def test_rounds_of_steps_are_equally_long_at_every_site_and_in_sum_on_pooled_data(tmp_path: Path):
    data = make_sites(tmp_path / "data", sites=2, cases=4)
    make_site(data / "large", 8, seed=2)
    fields = {"rounds": {"count": 2, "steps": 3}, "modes": ["federated", "local", "centralised"]}
    simulate(read_config(small_run(tmp_path / "run.yaml", data, **fields)))
    steps = {(event["federation"].split("/")[0], event["steps"]) for event in read_events(tmp_path / "run", "fit")}
    assert steps == {("federated", 3), ("local", 3), ("centralised", 9)}


def test_a_run_with_few_labelled_cases_trains_on_these_alone(tmp_path: Path):
    data = make_sites(tmp_path / "data", sites=2, cases=8)
    config = small_run(tmp_path / "run.yaml", data, rounds={"count": 1})
    simulate(read_config(config, ["data.training_cases=2", "training.empty_slices=1"]))
    cases = [event["cases"] for event in read_events(tmp_path / "run", "site")]
    # Of eight cases, two are for testing and one for validation.
    assert cases == [{"train": 2, "val": 1, "test": 2}] * 2
    # Two cases of six slices each.
    assert {event["slices"] for event in read_events(tmp_path / "run", "fit")} == {12}


def test_an_aggregator_that_bears_no_false_site_is_refused(data: Path, tmp_path: Path, capfd):
    outcome = flapsam(capfd, "simulate", small_run(tmp_path / "run.yaml", data, aggregator="median"))
    assert outcome.code == 2
    assert "median bears no false site among 2 sites; use at least 3 sites" in outcome.err
    assert not (tmp_path / "run").exists()


def test_fedprox_stays_closer_to_the_start_of_the_round(data: Path, tmp_path: Path):
    moved = []
    for strength in (0.0, 10.0):
        folder = tmp_path / str(strength)
        training = {"window": 1, "batch_size": 8, "warmup_steps": 2, "proximal": strength}
        fields = {"training": training, "rounds": {"count": 1}, "aggregator": "ffa-lora", "compression": {"codec": "fp32"}}
        simulate(read_config(small_run(folder / "run.yaml", data, **fields)))
        # With ffa-lora, only B of the factors trains. It starts at zero, so its norm is how far it moved.
        tensors = read_tensors(folder / "run" / "adapter")
        moved.append(np.sqrt(sum(float((tensor**2).sum()) for name, tensor in tensors.items() if ".lora_B" in name)))
    assert 0 < moved[1] < 0.9 * moved[0]
