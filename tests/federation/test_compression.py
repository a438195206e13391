"""Every codec: errors within its bound, feedback that sends every change in the end, and refusal of invalid entries."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import entropy, norm
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.federation.compression import CODECS, codec
from flapsam.federation.compression.codec import as_rows, from_rows
from flapsam.federation.compression.topk import from_gaps, to_gaps
from flapsam.run.config import Compression

DENSITY, BITS = 0.2, 2.5


def options(name: str) -> Compression:
    return Compression(codec=name, density=DENSITY, bits=BITS)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 60), "b": (50, 4), "conv": (8, 6, 2, 2), "norm": (31,), "one": (1,), "zero": (3, 9)}
    result = {
        name: torch.randn(shape, generator=generator) * 10.0 ** (index - 3)
        for index, (name, shape) in enumerate(shapes.items())
    }
    return {**result, "zero": torch.zeros(3, 9)}


SHAPES = {name: tuple(tensor.shape) for name, tensor in tensors().items()}


def rows(tensor: Tensor) -> np.ndarray:
    """A tensor as a matrix, computed by hand. A low-rank factor has one row for each rank."""
    array = tensor.double().numpy()
    matrix = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def round_trip(name: str, sent: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    coder = codec(options(name))
    entries = coder.encode(sent, seed)
    coder.check(entries, SHAPES)
    return coder.read(entries, SHAPES)


def kept(matrix: np.ndarray) -> np.ndarray:
    """Mask of the largest magnitudes, as many as the density asks for."""
    if not matrix.any():
        return np.zeros(matrix.shape, bool)
    count = max(1, int(np.ceil(DENSITY * matrix.size)))
    return np.abs(matrix) >= np.sort(np.abs(matrix), axis=None)[-count]


BOUNDS = {
    "fp32": lambda matrix: np.zeros_like(matrix),
    "bf16": lambda matrix: np.abs(matrix) / 256,
    "int8": lambda matrix: np.broadcast_to(1.01 * np.abs(matrix).max(axis=1, keepdims=True) / 127, matrix.shape),
    "int4": lambda matrix: np.broadcast_to(1.01 * np.abs(matrix).max(axis=1, keepdims=True) / 7, matrix.shape),
}
"""Encoding of the values → largest error of each value. The error of ``steps`` is bounded only for whole rows."""


@pytest.mark.parametrize("name", [name for name in CODECS if name != "steps"])
def test_round_trips_stay_within_the_error_bound(name: str):
    sent = tensors()
    received = round_trip(name, sent)
    values = name.removeprefix("topk").removeprefix("-") or "fp32"
    for key, tensor in sent.items():
        assert received[key].dtype == torch.float32
        assert received[key].shape == tensor.shape
        matrix, result = rows(tensor), rows(received[key])
        mask = kept(matrix) if name.startswith("topk") else np.ones(matrix.shape, bool)
        assert (np.abs(result - matrix)[mask] <= BOUNDS[values](matrix * mask)[mask] + 1e-12).all(), key
        assert (result[~mask] == 0).all(), key


@pytest.mark.parametrize("bits", [1.0, 1.25, 1.5, 2.0, 2.5])
def test_steps_match_the_quantiser_with_the_configured_entropy(bits: float):
    """SciPy quantises the normal distribution to the same entropy. Rows of 60,000 values come close to it."""
    sizes = np.array([[1e-6], [1.0], [30.0]])
    sent = {
        "w": torch.randn(3, 60_000, generator=torch.Generator().manual_seed(0)) * torch.tensor(sizes, dtype=torch.float32)
    }
    coder = codec(Compression(codec="steps", bits=bits))
    entries = coder.encode(sent, 0)
    matrix, received = rows(sent["w"]), rows(coder.read(entries, {"w": (3, 60_000)})["w"])

    def bits_of(step: float) -> float:
        return float(entropy(np.diff([0, *norm.cdf(np.arange(-6.5, 7.0) * step), 1]), base=2))

    step = float(brentq(lambda step: bits_of(step) - bits, 0.5, 16))  # type: ignore[arg-type]
    levels = np.clip(np.round(matrix / (step * sizes)), -7, 7)
    scale = (matrix * levels).sum(axis=1, keepdims=True) / (levels**2).sum(axis=1, keepdims=True)
    errors = np.linalg.norm(matrix - received, axis=1)
    np.testing.assert_allclose(errors, np.linalg.norm(matrix - scale * levels, axis=1), rtol=0.01)
    assert (errors < np.linalg.norm(matrix, axis=1)).all()
    assert (errors < step / 2 * sizes[:, 0] * 60_000**0.5).all()
    # A Huffman code needs slightly more than the entropy.
    assert bits <= 8 * len(entries["values"]) / 180_000 < bits + 0.06


@pytest.mark.parametrize("name", CODECS)
def test_the_same_seed_gives_the_same_entries(name: str):
    coder = codec(options(name))
    first, second = (coder.encode(dict(order), 7) for order in (tensors().items(), reversed(tensors().items())))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["int8", "int4", "topk-int4"])
def test_rounding_is_unbiased(name: str):
    """Over many seeds, the mean of a kept value approaches the value itself."""
    sent = tensors()
    mean = torch.stack([round_trip(name, sent, seed)["a"] for seed in range(400)]).mean(dim=0)
    mask = kept(rows(sent["a"])) if name.startswith("topk") else np.ones((4, 60), bool)
    matrix = rows(sent["a"])
    step = 1.01 * np.abs(matrix).max(axis=1, keepdims=True) / (127 if name == "int8" else 7)
    # The standard deviation of the mean is at most step / 2 / 20. Chance alone does not exceed five of these.
    assert (np.abs(rows(mean) - matrix) <= step / 8)[mask].all()


@pytest.mark.parametrize("name", CODECS)
def test_with_feedback_the_mean_of_many_sends_approaches_the_tensor(name: str):
    """An error is added to the next send. After n sends, their sum is n times the tensor minus the last error."""
    sent = tensors()
    unsent = {key: torch.zeros_like(tensor) for key, tensor in sent.items()}
    total = {key: torch.zeros_like(tensor) for key, tensor in sent.items()}
    errors = []
    for number in range(1, 101):
        change = {key: sent[key] + unsent[key] for key in sent}
        received = round_trip(name, change, seed=number)
        unsent = {key: change[key] - received[key] for key in sent}
        total = {key: total[key] + received[key] for key in sent}
        errors.append(max(float((total[key] / number - sent[key]).norm() / (sent[key].norm() + 1e-30)) for key in sent))
    assert errors[99] <= 0.06  # at a density of 0.2, a value waits for about five sends
    assert errors[99] <= errors[9] / 3 + 1e-5


@pytest.mark.parametrize("name", CODECS)
def test_an_empty_set_of_tensors_round_trips(name: str):
    coder = codec(options(name))
    entries = coder.encode({}, 0)
    coder.check(entries, {})
    assert coder.read(entries, {}) == {}


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 3, 2, 2), (40, 3, 2, 2), (7,), (1, 1)])
def test_rows_are_the_shorter_axis(shape: tuple[int, ...]):
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    np.testing.assert_array_equal(as_rows(tensor).numpy(), rows(tensor))
    assert torch.equal(from_rows(as_rows(tensor), shape), tensor)


def test_gaps_match_hand_calculations():
    places = torch.tensor([0, 1, 257, 767])
    # 1 follows 0 without a gap. 257 follows after 255 places, a skip and 0. 767 follows after 509, a skip and 254.
    assert to_gaps(places).tolist() == [0, 0, 255, 0, 255, 254]
    assert torch.equal(from_gaps(to_gaps(places)), places)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 1.0])
def test_gaps_round_trip_at_any_density(density: float):
    places = np.flatnonzero(np.random.default_rng(0).random(20_000) < density)
    assert from_gaps(to_gaps(torch.tensor(places))).tolist() == places.tolist()


def tampered(name: str, entry: str, value: Tensor | None) -> dict[str, Tensor]:
    entries = codec(options(name)).encode(tensors(), 0)
    if value is None:
        del entries[entry]
        return entries
    return {**entries, entry: value}


def entry(name: str, which: str) -> Tensor:
    return codec(options(name)).encode(tensors(), 0)[which].clone()


INVALID = {
    "entry missing": ("int8", "scales", None, "'scales'"),
    "entry too many": ("int8", "more", torch.zeros(1), "'more'"),
    "longer": ("fp32", "values", torch.zeros(10_000), "was agreed"),
    "shorter": ("int4", "values", torch.zeros(3, dtype=torch.uint8), "was agreed"),
    "other dtype": ("int8", "values", entry("int8", "values").to(torch.int16), "was agreed"),
    "two axes": ("fp32", "values", entry("fp32", "values")[None], "was agreed"),
    "value not a number": ("fp32", "values", entry("fp32", "values") * torch.nan, "NaN or infinity"),
    "scale infinite": ("int4", "scales", entry("int4", "scales") * torch.inf, "NaN or infinity"),
    "too few places": ("topk", "gaps", entry("topk", "gaps")[1:], "places agreed"),
    "too many places": ("topk", "gaps", torch.zeros(10_000, dtype=torch.uint8), "places agreed"),
    "only skips": ("topk", "gaps", torch.full((50,), 255, dtype=torch.uint8), "places agreed"),
    "beyond the end": ("topk", "gaps", torch.full_like(entry("topk", "gaps"), 254), "beyond the last place"),
}


@pytest.mark.parametrize(("name", "which", "value", "reason"), INVALID.values(), ids=INVALID)
def test_entries_that_violate_the_contract_are_refused(name: str, which: str, value: Tensor | None, reason: str):
    with pytest.raises(ValueError, match=reason):
        codec(options(name)).check(tampered(name, which, value), SHAPES)


def test_non_finite_values_are_refused():
    sent = {**tensors(), "a": torch.full((4, 60), torch.nan)}
    for name in CODECS:
        coder = codec(options(name))
        with pytest.raises(ValueError, match="NaN"):
            coder.check(coder.encode(sent, 0), SHAPES)


def test_an_unknown_codec_is_an_error():
    with pytest.raises(FlapsamError, match=r"compression\.codec 'zip' is unknown; choose one of fp32, bf16, int8"):
        codec(options("zip"))
