"""Parameters that stay at the sites, and the adapter that each site keeps for its own use."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file
from torch import Tensor, nn

from flapsam.adapters.store import read_tensors
from flapsam.experiments.simulation import simulate
from flapsam.federation import client as client_module
from flapsam.federation.aggregation import AGGREGATORS, Reply, aggregator
from flapsam.federation.client import PERSONAL, SHARED, TRAINED_ON, Client
from flapsam.report.page import report_page
from flapsam.report.run import read_run
from flapsam.run.reading import read_config
from flapsam.sam import assemble_run, load_tensors, trained_state
from tests.helpers.command import flapsam
from tests.helpers.families import small_run
from tests.helpers.ledgers import read_events
from tests.helpers.sites import make_sites

pytestmark = pytest.mark.usefixtures("no_report", "small_families")

SITES = ("site_0", "site_1", "site_2")
PATTERNS = {"one factor": "*.lora_B.weight", "the output": "mask_decoder.output.*", "norms": "*layer_norm*"}
"""What FedSA-LoRA keeps at the sites, what FedPer does, and what FedBN does. The strategy itself does not train norms."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("data"), sites=3, cases=4)


@dataclass
class Seen:
    """What sites received, sent and trained while a test ran."""

    packets: list[bytes] = field(default_factory=list)
    """All packets, unpacked."""
    sent: list[Tensor] = field(default_factory=list)
    """Tensors of a site that travel."""
    personal: list[Tensor] = field(default_factory=list)
    """Tensors of a site that do not."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether a packet has the tensor's numbers, row by row or column by column."""
        orders = [order.contiguous().numpy().tobytes() for order in (tensor, tensor.T if tensor.ndim == 2 else tensor)]
        return any(order in packet for packet in self.packets for order in orders)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watches every fit."""
    result, fit = Seen(), Client.fit

    def watched(client: Client, received: list[bytes], *rest) -> bytes:
        answer = fit(client, received, *rest)
        for packet in (*received, answer):
            result.packets.append(zstandard.ZstdDecompressor().decompress(packet[40:], 1 << 24))
        for name, tensor in trained_state(client.network).items():
            (result.personal if name in client.agreement.personal else result.sent).append(tensor)
        return answer

    monkeypatch.setattr(Client, "fit", watched)
    return result


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=list(PATTERNS))
def test_nothing_personal_stands_in_a_packet(pattern: str, data: Path, tmp_path: Path, seen: Seen):
    fields = {"aggregator": "fedavg", "compression": {"codec": "fp32"}, "personal": [pattern]}
    config, run = read_config(small_run(tmp_path / "run.yaml", data, **fields)), tmp_path / "run"
    simulate(config)
    assert len(seen.packets) == 12
    # The search finds the numbers that a site sends, so it would find the others.
    assert seen.sent and all(map(seen.holds, seen.sent))
    assert seen.personal and not any(map(seen.holds, seen.personal))
    start, word = trained_state(assemble_run(config).network), pattern.strip("*.").removesuffix(".weight")
    shared = read_tensors(run / "adapter")
    assert shared.keys() == start.keys() and any(word in name for name in start)
    for name, tensor in shared.items():
        # Sites may have trained anything, but of what is personal the server knows only where it started.
        assert torch.equal(tensor, start[name]) == (word in name or start[name].numel() == 0), name


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_averages_a_factor_whose_other_one_is_personal(name: str):
    factor, values = "layer.lora_B.weight", [1.0, 2.0, 3.0, 9.0, 5.0]
    method, number = aggregator(name, 1), 1
    previous = {factor: torch.zeros(2, 1)}
    replies = [Reply.of({factor: torch.full((2, 1), value)}, 1.0) for value in values]
    expected = {"median": 3.0, "trimmed-mean": 10 / 3}.get(name, 4.0)
    assert torch.equal(method.aggregate(replies, previous, number)[factor], torch.full((2, 1), expected))


def test_every_site_keeps_an_adapter_that_is_tested_at_all_sites(data: Path, tmp_path: Path, capfd):
    fields = {"rounds": {"count": 1, "last_epochs": 2}, "modes": ["federated", "local"]}
    path, run = small_run(tmp_path / "run.yaml", data, **fields), tmp_path / "run"
    outcome = flapsam(capfd, "simulate", path, "--set", "data.unseen=[site_2]")
    assert outcome.code == 0, outcome.err
    assert "Each site's own adapter" in outcome.out
    kept = {event["site"]: event for event in read_events(run, "kept")}
    assert kept.keys() == {"site_0", "site_1"}
    page = report_page(read_run(run), images=False)
    assert page.count('id="own-table"') == 1 and all(f">{event['kept']}</td>" in page for event in kept.values())
    results = json.loads((run / "results.json").read_text())
    assert results["crossed"].keys() == {"federated", "personal/site_0", "personal/site_1"}
    assert all(sites.keys() == set(SITES) for sites in results["crossed"].values())
    tested = {(case["site"], case["case"]) for case in results["cases"]["personal"]}
    assert tested == {(site, case) for site, case in tested if site != "site_2"} and len(tested) == 2
    shared = read_tensors(run / "adapter")
    for site, event in kept.items():
        best = max(event["dice"], key=lambda name: (event["dice"][name], name == SHARED))
        assert event["dice"].keys() == {SHARED, TRAINED_ON} and event["kept"] == best
        own = read_tensors(run / "adapter-personal" / site)
        assert all(torch.equal(own[name], shared[name]) for name in shared) == (best == SHARED)
        mean = np.mean([list(case["dice"].values()) for case in results["cases"]["personal"] if case["site"] == site])
        assert results["crossed"][f"personal/{site}"][site] == pytest.approx(mean)
    out = tmp_path / "out"
    own = run / "adapter-personal" / "site_1"
    outcome = flapsam(capfd, "predict", own, data, "--split", "test", "-o", out, "--threads", "1", "--json")
    assert outcome.code == 0, outcome.err
    for label_map in (run / "predictions" / "personal" / "site_1").iterdir():
        assert (out / "site_1" / label_map.name).read_bytes() == label_map.read_bytes()


@pytest.mark.parametrize(
    ("has_personal", "epochs", "dice", "kept"),
    [
        (False, 1, [0.5, 0.6], TRAINED_ON),
        (False, 1, [0.5, 0.5], SHARED),
        (False, 1, [None, None], SHARED),
        (True, 0, [0.5, 0.6], PERSONAL),
        (True, 0, [0.7, 0.6], SHARED),
        (True, 1, [0.6, 0.6, 0.6], PERSONAL),
        (True, 1, [0.6, 0.5, 0.7], TRAINED_ON),
        (True, 1, [None, None, None], PERSONAL),
    ],
)
def test_validation_cases_decide_what_a_site_keeps(
    has_personal: bool, epochs: int, dice: list[float | None], kept: str, monkeypatch: pytest.MonkeyPatch
):
    """The network is two numbers, one shared and one personal. The scores are given, the rest is the client's own code."""
    network = nn.ParameterDict({"shared": torch.tensor([1.0]), "own": torch.tensor([0.0])})
    start = {"own": torch.tensor([5.0])} if has_personal else {}
    scored: list[dict[str, float]] = []
    scores = iter(dice)

    def score(*_: object) -> SimpleNamespace:
        scored.append({name: float(value.detach()) for name, value in network.items()})
        return SimpleNamespace(mean_dice=next(scores))

    def received(packets: object) -> tuple[int, dict]:
        load_tensors(network, {"shared": torch.tensor([2.0]), "own": torch.tensor([3.0])})
        return 3, {}

    this = SimpleNamespace(
        agreement=SimpleNamespace(personal=start, contract=SimpleNamespace(shapes={"shared": (1,)})),
        network=network,
        personal_start=start,
        data=SimpleNamespace(val=[]),
        config=SimpleNamespace(rounds=SimpleNamespace(last_epochs=epochs)),
        _receive=received,
        _fit_once_more=lambda number, epochs: load_tensors(network, {"shared": torch.tensor([4.0])}),
    )
    monkeypatch.setattr(client_module, "score_cases", lambda *_: None)
    monkeypatch.setattr(client_module, "summarise", score)
    own = Client.own(this, [])  # type: ignore[arg-type]
    assert (own.kept, list(own.dice.values())) == (kept, dice)
    seen = dict(zip(own.dice, scored, strict=True))
    assert seen[SHARED] == {"shared": 2.0, "own": 5.0 if has_personal else 3.0}
    assert seen.get(PERSONAL) == ({"shared": 2.0, "own": 3.0} if has_personal else None)
    assert seen.get(TRAINED_ON) == ({"shared": 4.0, "own": 3.0} if epochs else None)
    # What is kept is what was scored.
    assert {name: float(value) for name, value in own.tensors.items()}.items() <= seen[kept].items()


def test_an_adapter_of_a_smaller_rank_trains_no_more_than_it_has(data: Path, tmp_path: Path):
    fields = {"personal": ["*.lora_A.weight"], "site_ranks": {"site_1": 1}, "rounds": {"count": 2}}
    simulate(read_config(small_run(tmp_path / "run.yaml", data, **fields)))
    path = max((tmp_path / "run/state/federated/sites/site_1").glob("personal-*"))
    factors = load_file(path)
    assert factors and all(not tensor[1:].any() and tensor[0].any() for tensor in factors.values())


def test_going_back_also_repeats_what_sites_keep_for_themselves(data: Path, tmp_path: Path):
    fields = {"rounds": {"count": 2, "last_epochs": 1}, "personal": ["*.lora_B.weight"]}
    config, run = read_config(small_run(tmp_path / "run.yaml", data, **fields)), tmp_path / "run"
    simulate(config)
    before = [read_events(run, kind) for kind in ("kept", "test")]
    kept = {site: read_tensors(run / "adapter-personal" / site) for site in SITES}
    simulate(config, from_round=2)
    moved = read_events(run, "test")
    dropped = [json.loads(line) for line in (run / "events-dropped.jsonl").read_text().splitlines()]
    assert len([event for event in dropped if event["event"] == "test"]) == len(moved) == len(before[1])
    assert [{**event, "time": ""} for event in read_events(run, "kept")] == [{**event, "time": ""} for event in before[0]]
    for site in SITES:
        again = read_tensors(run / "adapter-personal" / site)
        assert all(torch.equal(again[name], kept[site][name]) for name in again)


@pytest.mark.parametrize("fields", [{"strategy": "lora", "personal": ["*.lora_*"]}, {"personal": ["*"]}])
def test_sites_that_would_share_nothing_are_refused(fields: dict, data: Path, tmp_path: Path, capfd):
    outcome = flapsam(capfd, "simulate", small_run(tmp_path / "run.yaml", data, **fields))
    assert outcome.code == 2
    assert "personal: nothing is left that the sites share" in outcome.err and "Traceback" not in outcome.err


def test_a_pattern_that_fits_no_parameter_is_refused(data: Path, tmp_path: Path, capfd):
    config = small_run(tmp_path / "run.yaml", data, personal=["*.nothing"])
    outcome = flapsam(capfd, "simulate", config)
    assert outcome.code == 2
    assert "personal: no parameter outside frozen matches '*.nothing'" in outcome.err and "Traceback" not in outcome.err
