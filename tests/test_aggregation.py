"""Every aggregator against float64 NumPy."""

import numpy as np
import pytest
import torch
from conftest import golden
from torch import Tensor

from flapsam.errors import FlapsamError
from flapsam.federation.aggregation import AGGREGATORS, aggregator

LAYERS = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}
"""Name → (out, in), of which none but one is square."""


def client(ranks: dict[str, int], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tensors = {"output.bias": torch.randn(7, generator=draw)}
    for name, (rows, columns) in LAYERS.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(ranks[name], columns, generator=draw)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, ranks[name], generator=draw)
    return tensors


def clients(count: int, ranks: list[int]) -> list[dict[str, Tensor]]:
    return [client(dict.fromkeys(LAYERS, ranks[i % len(ranks)]), seed=i) for i in range(count)]


def product(tensors: dict[str, Tensor], layer: str) -> np.ndarray:
    return (tensors[f"{layer}.lora_B.weight"].double() @ tensors[f"{layer}.lora_A.weight"].double()).numpy()


def aggregate(name: str, sent: list[dict[str, Tensor]], weights: list[float], rank: int) -> dict[str, Tensor]:
    method = aggregator(name, rank)
    for tensors, weight in zip(sent, weights, strict=True):
        method.add(tensors, weight)
    return method.result()


def mean(arrays: list[np.ndarray], weights: list[float]) -> np.ndarray:
    return np.average(np.stack(arrays).astype(np.float64), axis=0, weights=weights)


def best_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


WEIGHTS = {
    "unequal": [0.5, 0.2, 0.3],
    "not normalised": [5.0, 2.0, 3.0],
    "one of weight 0": [0.5, 0.0, 0.5],
}


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_everything_but_adapters_is_the_weighted_mean(name: str, weights: list[float]):
    sent = clients(3, [4])
    result = aggregate(name, sent, weights, rank=4)
    expected = mean([tensors["output.bias"].numpy() for tensors in sent], weights)
    np.testing.assert_allclose(result["output.bias"], expected, atol=1e-6)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_names_shapes_and_dtypes_stay(name: str):
    sent = clients(3, [4])
    result = aggregate(name, sent, [1, 1, 1], rank=4)
    assert {n: (t.shape, t.dtype) for n, t in result.items()} == {n: (t.shape, t.dtype) for n, t in sent[0].items()}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_equal_clients_give_themselves(name: str):
    sent = clients(1, [4]) * 3
    result = aggregate(name, sent, [0.2, 0.3, 0.5], rank=4)
    torch.testing.assert_close(result["output.bias"], sent[0]["output.bias"], atol=0, rtol=0)
    for layer in LAYERS:
        np.testing.assert_allclose(product(result, layer), product(sent[0], layer), atol=2e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_order_of_arithmetic_is_the_order_given(name: str):
    sent = clients(3, [4])
    first, second = (aggregate(name, sent, [1, 2, 3], rank=4) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_without_weight_there_is_no_mean(name: str):
    with pytest.raises(ValueError, match="no client"):
        aggregate(name, clients(1, [4]), [0.0], rank=4)


def test_fedavg_averages_the_factors():
    sent, weights = clients(3, [4]), [0.5, 0.2, 0.3]
    result = aggregate("fedavg", sent, weights, rank=4)
    for name, tensor in result.items():
        np.testing.assert_allclose(tensor, mean([t[name].numpy() for t in sent], weights), atol=1e-6)


def test_fedavg_of_one_client_is_that_client_bit_for_bit():
    sent = clients(1, [4])
    result = aggregate("fedavg", sent, [0.3], rank=4)
    assert all(torch.equal(result[name], sent[0][name]) for name in sent[0])


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("ranks", [[4], [2, 4, 8]], ids=["equal ranks", "mixed ranks"])
def test_flexlora_is_the_dense_svd_of_the_mean_product(count: int, ranks: list[int]):
    sent = clients(count, ranks)
    weights = [1.0 + i % 5 for i in range(count)]
    rank = 4
    result = aggregate("flexlora", sent, weights, rank)
    for layer, (rows, columns) in LAYERS.items():
        expected = best_rank(mean([product(t, layer) for t in sent], weights), rank)
        np.testing.assert_allclose(product(result, layer), expected, atol=1e-5)
        assert result[f"{layer}.lora_B.weight"].shape == (rows, rank)
        assert result[f"{layer}.lora_A.weight"].shape == (rank, columns)


def test_flexlora_holds_no_more_than_one_dense_layer_however_many_clients():
    method = AGGREGATORS["flexlora"](4)
    for tensors in clients(60, [4]):
        method.add(tensors, 1.0)
    for layer, (rows, columns) in LAYERS.items():
        assert method.left[layer].shape[1] <= min(rows, columns)  # type: ignore[attr-defined]


def test_flexlora_puts_the_singular_values_into_a():
    result = aggregate("flexlora", clients(3, [4]), [1, 1, 1], rank=4)
    for layer in LAYERS:
        b = result[f"{layer}.lora_B.weight"]
        torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)


def test_flexlora_fills_a_missing_rank_with_zeros():
    sent = clients(1, [2])
    result = aggregate("flexlora", sent, [1.0], rank=4)
    for layer in LAYERS:
        assert result[f"{layer}.lora_A.weight"].shape[0] == 4
        np.testing.assert_allclose(product(result, layer), product(sent[0], layer), atol=1e-5)


def test_flexlora_reproduces_the_reference():
    tensors = golden("aggregation")
    method = AGGREGATORS["flexlora"](8)
    for a, b, weight in zip(tensors["A"], tensors["B"], tensors["weights"].tolist(), strict=True):
        method.add({"layer.lora_A.weight": a, "layer.lora_B.weight": b}, weight)
    result = method.result()
    torch.testing.assert_close(
        result["layer.lora_B.weight"] @ result["layer.lora_A.weight"], tensors["product_rank_r"], atol=1e-5, rtol=0
    )


def test_unknown_name():
    with pytest.raises(FlapsamError, match="aggregator 'krum' is unknown; choose one of fedavg, flexlora"):
        aggregator("krum", 4)
