"""Every aggregator, compared with float64 NumPy and SciPy."""

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.federation.aggregation import AGGREGATORS, Reply, aggregator, flexlora, trimmed_mean
from flapsam.federation.aggregation.aggregator import A, B, lora_layers
from tests.helpers.golden import golden

RANK = 4
LAYERS = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
"""Layer → shape of its weight, (out, in)."""
TRAINED_WEIGHT = "square.weight"
"""The one layer weight that clients train too, as when the whole decoder trains."""
MEANS_OF_FACTORS = [name for name in AGGREGATORS if not name.startswith("flexlora")]
Tensors = dict[str, Tensor]


def globals_before(seed: int = 100) -> Tensors:
    """Global tensors before a round. The factors are balanced, BᵀB = AAᵀ, in a random basis."""
    rng = np.random.default_rng(seed)
    tensors = {"output.bias": rng.normal(size=7), "output.kernel": rng.normal(size=(6, 5, 2, 2))}
    for layer, (rows, columns) in LAYERS.items():
        u, s, vt = np.linalg.svd(rng.normal(size=(rows, columns)))
        rotation = np.linalg.qr(rng.normal(size=(RANK, RANK)))[0]
        tensors[layer + B] = u[:, :RANK] * np.sqrt(s[:RANK]) @ rotation
        tensors[layer + A] = rotation.T @ (np.sqrt(s[:RANK])[:, None] * vt[:RANK])
        tensors[layer + ".weight"] = rng.normal(size=(rows, columns))
    return {name: torch.tensor(tensor, dtype=torch.float32) for name, tensor in tensors.items()}


def client(name: str, previous: Tensors, seed: int, rank: int = RANK, number: int = 1) -> Tensors:
    """The tensors that a client sends in a round: the global ones, cut to its rank and perturbed."""
    generator, method = torch.Generator().manual_seed(seed), aggregator(name, RANK)
    sent = {}
    for tensor_name, tensor in previous.items():
        part = tensor[:rank] if tensor_name.endswith(A) else tensor[:, :rank] if tensor_name.endswith(B) else tensor
        untrained = tensor_name.removesuffix(".weight") in LAYERS and tensor_name != TRAINED_WEIGHT
        if not untrained and method.up(tensor_name, number):
            sent[tensor_name] = part + 0.3 * torch.randn(part.shape, generator=generator)
    return sent


def aggregate(name: str, sent: list[Tensors], weights: list[float], previous: Tensors, number: int = 1) -> Tensors:
    replies = [Reply.of(tensors, weight) for tensors, weight in zip(sent, weights, strict=True)]
    return aggregator(name, RANK).aggregate(replies, previous, number)


def stacked(tensor_name: str, sent: list[Tensors], previous: Tensors) -> np.ndarray:
    """One tensor of all clients, float64. Smaller ranks are padded with zeros, and unsent tensors are the previous ones."""
    stack = np.zeros((len(sent), *previous[tensor_name].shape))
    for target, tensors in zip(stack, sent, strict=True):
        part = tensors.get(tensor_name, previous[tensor_name]).numpy()
        target[tuple(slice(length) for length in part.shape)] = part
    return stack


def factors(layer: str, sent: list[Tensors], previous: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """B (clients, out, rank) and A (clients, rank, in) of all clients."""
    return stacked(layer + B, sent, previous), stacked(layer + A, sent, previous)


def product(tensors: Tensors, layer: str) -> np.ndarray:
    return tensors[layer + B].double().numpy() @ tensors[layer + A].double().numpy()


def best_rank(matrix: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]


Weights = list[float]


def mean(stack: np.ndarray, weights: Weights) -> np.ndarray:
    return np.average(stack, axis=0, weights=weights)


def median(stack: np.ndarray, weights: Weights) -> np.ndarray:
    return np.median(stack[np.array(weights) > 0], axis=0)


def trimmed(stack: np.ndarray, weights: Weights) -> np.ndarray:
    return trim_mean(stack[np.array(weights) > 0], 0.2, axis=0)


def mean_product(b: np.ndarray, a: np.ndarray, weights: Weights) -> np.ndarray:
    return mean(b @ a, weights)


def cut_product(b: np.ndarray, a: np.ndarray, weights: Weights) -> np.ndarray:
    return best_rank(mean_product(b, a, weights))


def ridge_product(b: np.ndarray, a: np.ndarray, weights: Weights) -> np.ndarray:
    b_mean, a_mean = mean(b, weights), mean(a, weights)
    root = np.sqrt(0.01 * np.mean(np.diag(a_mean @ a_mean.T)))
    target = (mean_product(b, a, weights) - b_mean @ a_mean).T
    system = np.vstack([a_mean.T, root * np.eye(len(a_mean))])
    change = np.linalg.lstsq(system, np.vstack([target, np.zeros((len(a_mean), target.shape[1]))]), rcond=None)[0]
    return (b_mean + change.T) @ a_mean


def of_factors(average: Callable) -> Callable:
    return lambda b, a, weights: average(b, weights) @ average(a, weights)


EXPECTED: dict[str, tuple[Callable, Callable]] = {
    "fedavg": (mean, of_factors(mean)),
    "flexlora": (mean, cut_product),
    "flexlora-aligned": (mean, cut_product),
    "ffa-lora": (mean, mean_product),
    "rolora": (mean, mean_product),
    "fedex-lora": (mean, mean_product),
    "lora-fair": (mean, ridge_product),
    "median": (median, of_factors(median)),
    "trimmed-mean": (trimmed, of_factors(trimmed)),
}
"""Name → expected aggregate of a single tensor, and of a layer's product. Every aggregator needs an entry here."""

WEIGHTS = {
    "equal": [1.0] * 12,
    "unequal, one of 0": [0.5, 0.2, 0.0, 0.3, 0.1, 0.1, 0.05, 0.4, 0.3, 0.2, 0.1, 0.2],
    "not normalised": [5.0, 2.0, 3.0, 7.0, 1.0, 1.0, 2.0, 4.0, 9.0, 1.0, 1.0, 6.0],
}


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("ranks", [[4], [2, 4, 3]], ids=["equal ranks", "mixed ranks"])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_aggregators_match_numpy(name: str, count: int, ranks: list[int], weights: list[float]):
    average, layer_product = EXPECTED[name]
    previous, weights = globals_before(), weights[:count]
    for number in (1, 2):
        sent = [client(name, previous, seed, ranks[seed % len(ranks)], number) for seed in range(count)]
        result = aggregate(name, sent, weights, previous, number)
        assert {n: (t.shape, t.dtype) for n, t in result.items()} == {n: (t.shape, t.dtype) for n, t in previous.items()}
        assert all(tensor.is_contiguous() for tensor in result.values())
        for tensor_name in ("output.bias", "output.kernel"):
            expected = average(stacked(tensor_name, sent, previous), weights)
            np.testing.assert_allclose(result[tensor_name], expected, atol=1e-6)
        for layer in LAYERS:
            base_weight = average(stacked(f"{layer}.weight", sent, previous), weights)
            expected = base_weight + layer_product(*factors(layer, sent, previous), weights)
            np.testing.assert_allclose(result[f"{layer}.weight"].numpy() + product(result, layer), expected, atol=1e-5)
        method = aggregator(name, RANK)
        for tensor_name, tensor in result.items():
            may_change = method.base_weights and tensor_name.removesuffix(".weight") in LAYERS
            if tensor_name not in sent[0] and not may_change:
                assert torch.equal(tensor, previous[tensor_name])
            assert method.down(tensor_name, number) or torch.equal(tensor, previous[tensor_name])


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_client_of_weight_0_is_ignored(name: str):
    previous = globals_before()
    sent = [client(name, previous, seed) for seed in range(4)]
    with_client = aggregate(name, sent, [1, 2, 3, 0], previous)
    without_client = aggregate(name, sent[:3], [1, 2, 3], previous)
    assert all(torch.equal(with_client[n], without_client[n]) for n in previous)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_total_weight_of_0_is_an_error(name: str):
    previous = globals_before()
    for sent in ([client(name, previous, 0)], []):
        with pytest.raises(ValueError, match="no client"):
            aggregate(name, sent, [0.0] * len(sent), previous)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("count", [1, 3, 10, 12])
def test_the_aggregate_of_equal_clients_is_their_tensors(name: str, count: int):
    previous = globals_before()
    sent = client(name, previous, seed=0)
    result = aggregate(name, [sent] * count, WEIGHTS["not normalised"][:count], previous)
    for tensor_name, tensor in sent.items():
        if name in MEANS_OF_FACTORS or not tensor_name.endswith((A, B)):
            assert torch.equal(result[tensor_name], tensor)
    for layer in LAYERS:
        np.testing.assert_allclose(product(result, layer), product({**previous, **sent}, layer), atol=2e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_unchanged_factors_are_returned_if_the_basis_is_kept(name: str):
    previous = globals_before()
    result = aggregate(name, [previous] * 3, [1, 2, 3], previous)
    for layer in LAYERS:
        same = all(torch.allclose(result[layer + part], previous[layer + part], atol=1e-4) for part in (A, B))
        assert same == aggregator(name, RANK).keeps_basis


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_product_stays_0_while_b_is_0(name: str):
    previous = globals_before()
    previous |= {layer + B: torch.zeros_like(previous[layer + B]) for layer in LAYERS}
    result = aggregate(name, [previous] * 3, [1, 1, 1], previous)
    for layer in LAYERS:
        np.testing.assert_array_equal(product(result, layer), 0)
        assert result[layer + A].isfinite().all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregation_is_deterministic(name: str):
    previous = globals_before()
    sent = [client(name, previous, seed) for seed in range(3)]
    first, second = (aggregate(name, sent, [1, 2, 3], previous) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_memory_does_not_grow_with_the_number_of_clients(name: str):
    alive = peak = 0

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    def read(tensors: Tensors, tensor_name: str, rows: slice) -> Tensor:
        nonlocal alive, peak
        tensor = tensors[tensor_name][rows].clone()
        weakref.finalize(tensor, release, tensor.numel())
        alive += tensor.numel()
        peak = max(peak, alive)
        return tensor

    peaks = []
    for count in (10, 60):
        previous = globals_before()
        sent = client(name, previous, seed=0)
        peak = 0
        replies = [Reply(1.0, frozenset(sent), lambda n, rows, sent=sent: read(sent, n, rows))] * count
        aggregator(name, RANK).aggregate(replies, previous, 1)
        peaks.append(peak)
    assert peaks[1] <= peaks[0]


def test_only_the_expected_tensors_travel():
    names = list(globals_before())
    unsent = {"ffa-lora": (A, A), "rolora": (A, B)}
    for name in AGGREGATORS:
        method = aggregator(name, RANK)
        for number in (1, 2, 3, 4):
            frozen = unsent[name][(number - 1) % 2] if name in unsent else None
            expected = [n for n in names if frozen is None or not n.endswith(frozen)]
            assert [n for n in names if method.up(n, number)] == expected
            assert [n for n in names if method.down(n, number)] == expected


@pytest.mark.parametrize("count", [1, 5, 40])
def test_flexlora_puts_the_singular_values_into_a(count: int):
    previous, weights = globals_before(), [1.0 + i % 5 for i in range(count)]
    sent = [client("flexlora", previous, seed) for seed in range(count)]
    result = aggregate("flexlora", sent, weights, previous)
    for layer in LAYERS:
        mean_ba = mean_product(*factors(layer, sent, previous), weights)
        s = np.linalg.svd(mean_ba, compute_uv=False)[:RANK]
        b, a = result[layer + B].double().numpy(), result[layer + A].double().numpy()
        np.testing.assert_allclose(b.T @ b, np.eye(RANK), atol=1e-4)
        np.testing.assert_allclose(a @ a.T, np.diag(s**2), rtol=1e-5, atol=1e-3)


def test_flexlora_keeps_no_factors_wider_than_the_layer(monkeypatch: pytest.MonkeyPatch):
    widths, previous, real = [], globals_before(), flexlora.left_vectors

    def watched(left: Tensor, right: Tensor, rank: int) -> Tensor:
        widths.append((left.shape[1], min(left.shape[0], right.shape[1])))
        return real(left, right, rank)

    monkeypatch.setattr(flexlora, "left_vectors", watched)
    for count in (1, 6, 7, 60):
        aggregate("flexlora", [client("flexlora", previous, seed=0)] * count, [1.0] * count, previous)
    assert widths and all(width <= smaller for width, smaller in widths)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_equal_clients_of_half_the_rank_keep_their_product(name: str, count: int):
    previous = globals_before()
    sent = [client(name, previous, seed=0, rank=2)] * count
    result = aggregate(name, sent, [1.0] * count, previous)
    for layer in LAYERS:
        np.testing.assert_allclose(product(result, layer), np.matmul(*factors(layer, sent, previous))[0], atol=2e-5)
        if name == "flexlora":
            assert not result[layer + A][2:].any()


def test_flexlora_reproduces_the_reference():
    tensors = golden("aggregation")
    replies = [
        Reply.of({"layer" + A: a, "layer" + B: b}, weight)
        for a, b, weight in zip(tensors["A"], tensors["B"], tensors["weights"].tolist(), strict=True)
    ]
    previous = {"layer" + A: tensors["A"][0], "layer" + B: tensors["B"][0]}
    result = aggregator("flexlora", 8).aggregate(replies, previous, 1)
    torch.testing.assert_close(result["layer" + B] @ result["layer" + A], tensors["product_rank_r"], atol=1e-5, rtol=0)


def test_flexlora_aligned_projects_the_mean_a_onto_the_products_row_space():
    previous, weights = globals_before(), [1.0, 2.0, 3.0]
    sent = [client("flexlora", previous, seed) for seed in range(3)]
    result = aggregate("flexlora-aligned", sent, weights, previous)
    for layer in LAYERS:
        b, a = factors(layer, sent, previous)
        cut = cut_product(b, a, weights)
        expected = mean(a, weights) @ np.linalg.pinv(cut, rcond=1e-9) @ cut
        np.testing.assert_allclose(result[layer + A], expected, atol=1e-5)
        np.testing.assert_allclose(result[layer + B], cut @ np.linalg.pinv(expected), atol=1e-4)


@pytest.mark.parametrize("name", MEANS_OF_FACTORS)
def test_factors_are_averaged_separately(name: str):
    previous, weights = globals_before(), WEIGHTS["unequal, one of 0"][:5]
    sent = [client(name, previous, seed, [2, 4, 3][seed % 3]) for seed in range(5)]
    result = aggregate(name, sent, weights, previous)
    for layer in LAYERS:
        for part in (A,) if name == "lora-fair" else (A, B):
            expected = EXPECTED[name][0](stacked(layer + part, sent, previous), weights)
            np.testing.assert_allclose(result[layer + part], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
@pytest.mark.parametrize("values", [1, 300])
def test_aggregating_in_blocks_of_rows_changes_nothing(name: str, values: int, monkeypatch: pytest.MonkeyPatch):
    previous = globals_before()
    sent = [client(name, previous, seed, rank=2 + seed % 3) for seed in range(6)]
    at_once = aggregate(name, sent, [1.0] * 6, previous)
    monkeypatch.setattr(trimmed_mean, "VALUES", values)
    read = []
    replies = [
        Reply(1.0, frozenset(tensors), lambda n, rows, t=tensors: read.append((n, rows)) or t[n][rows]) for tensors in sent
    ]
    in_blocks = aggregator(name, RANK).aggregate(replies, previous, 1)
    assert all(torch.equal(in_blocks[n], at_once[n]) for n in previous)
    for tensor_name, rows in read:
        row = previous[tensor_name][0].numel()
        assert (rows.stop - rows.start) * row * len(sent) <= max(values, row * len(sent))


@pytest.mark.parametrize(("name", "liars", "count"), [("median", 2, 5), ("trimmed-mean", 1, 5)])
def test_malicious_clients_cannot_move_a_tensor_beyond_the_honest_range(name: str, liars: int, count: int):
    previous = globals_before()
    sent = [client(name, previous, seed) for seed in range(count)]
    lies = [{n: torch.full_like(t, 1e9) for n, t in tensors.items()} for tensors in sent[:liars]]
    result = aggregate(name, lies + sent[liars:], [1e6] * liars + [1.0] * (count - liars), previous)
    for tensor_name in sent[0]:
        honest = torch.stack([tensors[tensor_name] for tensors in sent[liars:]])
        assert (result[tensor_name] <= honest.amax(dim=0)).all() and (result[tensor_name] >= honest.amin(dim=0)).all()


BORNE = {
    # A fifth at either end, rounded down.
    "trimmed-mean": {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 9: 1, 10: 2, 14: 2, 15: 3},
    # All but the middle one or two.
    "median": {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 7: 3},
}
"""Aggregator → number of sites → number of false ones among them that it bears."""


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_robust_aggregator_bears_as_many_false_sites_as_it_says_and_not_one_more(name: str):
    """The false sites claim a thousand times the weight, and send all the same large number."""
    previous = {"w": torch.zeros(3)}
    assert name in BORNE or all(aggregator(name, RANK).bears(count) is None for count in range(1, 20))
    for count, borne in BORNE.get(name, {}).items():
        assert aggregator(name, RANK).bears(count) == borne
        for liars in (borne, borne + 1):
            sent = [{"w": torch.full((3,), 1e9)}] * liars + [{"w": torch.ones(3)}] * (count - liars)
            result = aggregate(name, sent, [1000.0] * liars + [1.0] * (count - liars), previous)
            assert bool((result["w"] == 1).all()) == (liars == borne)


def test_lora_fair_keeps_all_tensors_if_a_is_0():
    previous = {n: torch.zeros_like(t) if n.endswith(A) else t for n, t in globals_before().items()}
    result = aggregate("lora-fair", [previous] * 2, [1, 1], previous)
    assert all(torch.equal(result[n], previous[n]) for n in previous)


def test_lora_layers_are_found_by_their_factors():
    assert lora_layers(globals_before()) == sorted(LAYERS)


def test_an_unknown_aggregator_is_an_error():
    with pytest.raises(FlapsamError, match="aggregator 'krum' is unknown; choose one of fedavg, flexlora"):
        aggregator("krum", 4)
