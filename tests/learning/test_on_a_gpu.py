"""What a GPU needs of a training step, shown without one.

On the device ``meta``, tensors have shapes and no values. The network takes the same way as on a GPU there, and whoever asks
for a value gets an error, as would a CUDA graph.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flapsam.base.device import describe_device, device_of_worker, on_one_device, sample_device, set_up_torch
from flapsam.learning import cuda_graph
from flapsam.learning.cuda_graph import captured
from flapsam.learning.memory import SHARE, learned_bytes, step_bytes, windows_that_fit
from flapsam.learning.slices import SliceStack, ranges_of
from flapsam.learning.training import Learner, _sizes, backward, batches, default_loaders, fit, segmentation_loss
from flapsam.run.config import Backbone, Lora, Samples, Training
from flapsam.sam import STRATEGIES, Sam, assemble, travelling_state, vit
from flapsam.sam.halving import halved
from flapsam.sam.network import enlarged_by_products
from tests.helpers.families import SMALL

pytestmark = pytest.mark.usefixtures("small_families")

FORBIDDEN = (
    "adaptive_",
    "avg_pool3d_backward",
    "bincount",
    "cumsum",
    "grid_sampler_2d_backward",
    "histc",
    "max_unpool",
    "median",
    "nll_loss",
    "nonzero",
    "put_",
    "reflection_pad",
    "replication_pad",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "_local_scalar_dense",
)
"""Operations without a deterministic kernel on CUDA, and those that wait for the device."""


class Watched(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.__name__)
        return func(*args, **kwargs or {})


def network(strategy: str = "flap", backbone: str = "small-vit") -> Sam:
    return assemble(
        Backbone(name=backbone, weights="random"),
        image_size=48 if backbone == "small-vit" else 64,
        classes=2,
        strategy_name=strategy,
        lora=Lora(rank=2),
        seed=0,
    ).network


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backbone", SMALL)
def test_no_step_takes_an_operation_that_a_gpu_refuses(backbone: str, strategy: str):
    net = network(strategy, backbone).to("meta").train()
    images = torch.rand(6, 1, net.image_size, net.image_size, device="meta")
    labels = torch.zeros(images.shape[0], net.image_size, net.image_size, dtype=torch.int64, device="meta")
    with Watched() as watched:
        segmentation_loss(partial(net, depth=3)(images).float(), labels, Training()).total.backward()
    assert len(watched.names) > 20
    assert not [name for name in watched.names if name.startswith(FORBIDDEN)]


def test_the_list_of_operations_would_find_one():
    with Watched() as watched:
        torch.nn.functional.cross_entropy(torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64))
    assert any(name.startswith(FORBIDDEN) for name in watched.names)


@pytest.mark.parametrize("channels", [64, 80])
@pytest.mark.parametrize("grid", [14, 7, 4])
def test_positions_in_the_products_are_the_same_as_a_mask(grid: int, channels: int):
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 3, grid * grid, channels)] * 3 + [(grid, grid, channels)] * 2
    given = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    answers = []
    for mix in (vit.masked, vit.folded):
        mixed = mix(*given)
        answers.append([mixed.detach(), *torch.autograd.grad(mixed.sin().sum(), given)])
    for found, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("sides", [(14, 56), (12, 48), (8, 20)])
def test_logits_are_enlarged_by_products_as_by_interpolation(sides: tuple[int, int]):
    small, size = sides
    logits = torch.randn(2, 3, small, small, requires_grad=True)
    wanted = torch.nn.functional.interpolate(logits, (size, size), mode="bilinear")
    weights = torch.randn(wanted.shape)
    (expected,) = torch.autograd.grad((wanted * weights).sum(), logits)
    found = enlarged_by_products(logits, size)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_frozen_weights_in_half_precision_change_no_bit_and_come_back():
    net = network().train()
    images = torch.rand(2, 3, net.image_size, net.image_size)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def step() -> list[Tensor]:
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(images)
        logits.float().square().mean().backward()
        return [logits.detach()] + [p.grad.clone() for p in net.parameters() if p.grad is not None]

    wanted = step()
    with halved(net, "bf16"):
        assert any(tensor.dtype == torch.bfloat16 for tensor in net.state_dict().values())
        found = step()
    assert len(found) > 2 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    after = net.state_dict()
    assert all(after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items())
    with halved(net, "fp32"):
        assert all(tensor.dtype != torch.bfloat16 for tensor in net.state_dict().values())


@pytest.mark.parametrize("augment", ["gentle", "paper", "none"])
def test_any_number_of_threads_makes_the_same_batches(cases, augment: Any):
    options = Training(window=1, batch_size=4, augment=augment, warmup_steps=2)
    ends = []
    for loaders in (0, 1, 2, 4):
        net = network()
        fit(net, Learner(net, options), cases, Samples(), seed=3, loaders=loaders)
        ends.append(travelling_state(net))
    assert all(torch.equal(end[name], tensor) for end in ends[1:] for name, tensor in ends[0].items())


def test_a_batch_is_the_same_whatever_came_before(cases):
    options = Training(window=1, batch_size=4, augment="paper")
    one, other = (list(batches(cases, options, Samples(), 32, seed=3)) for _ in range(2))
    forwards = [make() for make in one]
    backwards = [make() for make in reversed(other)][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_network_that_uses_all_cores_has_no_thread_beside_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flapsam.learning.training.default_threads", lambda: torch.get_num_threads())
    assert default_loaders(torch.device("cpu")) == 0
    monkeypatch.setattr("flapsam.learning.training.default_threads", lambda: 64)
    assert default_loaders(torch.device("cpu")) == 1
    assert default_loaders(torch.device("cuda")) > 1


def test_workers_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [device_of_worker("cuda", number) for number in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert [device_of_worker(name, 5) for name in ("cpu", "mps", "cuda:1")] == ["cpu", "mps", "cuda:1"]
    assert [on_one_device("cuda", workers) for workers in (0, 1, 3, 4)] == [1, 1, 1, 2]
    assert on_one_device("cuda:1", 4) == on_one_device("cpu", 4) == 4


def test_ranges_of_slices_set_the_same_scale_as_the_slices_themselves():
    rng = np.random.default_rng(0)
    images = rng.integers(-1000, 2000, (9, 12, 10)).astype(np.int16)
    stack = SliceStack(images, Samples(channels="adjacent"), ranges_of(images), ((-200.0, 900.0),))
    for centre in range(9):
        near = images[np.clip(np.arange(centre - 2, centre + 3), 0, 8)].clip(-200, 900).astype(np.float64)
        wanted = (near[1:4] - near.min()) / (near.max() - near.min() + 1e-8)
        np.testing.assert_allclose(stack.window(centre)[0].numpy(), wanted, atol=1e-6)


def test_the_gpu_check_passes_in_tiny_on_a_cpu(tmp_path: Path):
    """All its sections but those that simulate, which are tested elsewhere."""
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    sections = "machine,steps,fitting,predicting,attention,rules,memory_estimates"
    command = [sys.executable, str(script), "--tiny", "--only", sections, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {word for _, word, _ in found["verdicts"]} == {"PASS", "INFO"}
    assert set(found["seconds"]) == set(sections.split(","))
    assert "| sam-tiny-1 | 64 | flap | 12 | fp32 |" in (tmp_path / "gpu.md").read_text()


def test_tf32_is_allowed_only_where_it_is_asked_for():
    try:
        for precision, allowed in (("fp32", False), ("tf32", True), ("bf16", False)):
            set_up_torch(1, deterministic=True, precision=precision)
            assert torch.backends.cudnn.allow_tf32 is allowed
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
            assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        set_up_torch(1, deterministic=True)


def test_a_run_records_its_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert describe_device("cpu") == {"device": "cpu"}
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n")
    monkeypatch.setattr("flapsam.base.device.DRIVER", version)
    found = describe_device("cuda")
    assert found["driver"] == "580.159.04"
    assert (found["gpu"], found["gpus"], found["gpu_memory_gib"], found["capability"]) == ("NVIDIA H200", 2, 150.0, "9.0")
    version.unlink()
    assert describe_device("cuda")["driver"] is None


def test_workers_on_one_device_share_its_memory():
    net, options = network(), Training(window=1, batch_size=64)
    one, two = (step_bytes(net, slices, options) for slices in (1, 2))
    fixed = learned_bytes(net) + one - (two - one)
    free = int((fixed + 40.5 * (two - one)) / SHARE)
    windows = [windows_that_fit(net, options, free=free, sharing=sharing) for sharing in (1, 2, 3)]
    # Half of the memory, less the other half of what does not depend on the slices.
    assert windows[:2] == [40, int((20.25 * (two - one) - fixed / 2) / (two - one))]
    assert windows[1] > windows[2] >= 1


def test_a_step_in_tf32_is_that_of_full_precision_on_a_cpu(cases):
    options = Training(window=1, batch_size=4, warmup_steps=2)
    ends = []
    for precision in ("fp32", "tf32"):
        net = network()
        fit(net, Learner(net, options), cases, Samples(), seed=3, precision=precision)
        ends.append(travelling_state(net))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


class FakeGraph:
    """A graph that repeats its pass on a CPU, with the same memory for its result and its gradients as at the capture."""

    def __init__(self, work: Callable[[], Tensor], result: Tensor, parameters: Sequence[Tensor]) -> None:
        self.work, self.result, self.parameters = work, result, parameters
        self.gradients = [parameter.grad for parameter in parameters]

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.result.copy_(self.work())
        for parameter, place in zip(self.parameters, self.gradients, strict=True):
            assert place is not None and parameter.grad is not None
            place.copy_(parameter.grad)
            parameter.grad = None


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Any]]:
    """The parameters that graphs know, and the memory that each graph was given. Graphs are faked."""
    parameters: list[Tensor] = []
    pools: list[Any] = []

    def graph_of(work: Callable[[], Tensor], device: torch.device, clear: Any = None, pool: Any = None) -> Any:
        pools.append(pool)
        result = work().clone()
        return FakeGraph(work, result, parameters), result

    monkeypatch.setattr(cuda_graph, "_graph_of", graph_of)
    return parameters, pools


def test_replayed_steps_have_the_gradients_of_their_own_batch(faked: tuple[list[Tensor], list[Any]]):
    net = network().train()
    options = Training(window=1, batch_size=4)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def work(batch: tuple[Tensor, Tensor]) -> Tensor:
        return backward(net, batch, torch.device("cpu"), options, "fp32", 4)

    def batch(slices: int, seed: int) -> tuple[Tensor, Tensor]:
        images = torch.rand(slices, 1, net.image_size, net.image_size, generator=torch.Generator().manual_seed(seed))
        return images, (images[:, 0] * 2.99).long()

    def of(step: Callable[[Any], Tensor], given: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
        for parameter in parameters:
            parameter.grad = None
        loss = step(given)
        return loss, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    work(batch(4, 0))
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    known, pools = faked
    known[:] = parameters
    replay = captured(work, [batch(4, 0), batch(2, 0)], parameters)  # type: ignore[arg-type]
    assert pools == [None, "pool"]
    assert all(parameter.grad is None for parameter in parameters)
    # Shapes that were captured, in any order, and one that was not.
    for slices, seed in ((4, 1), (2, 2), (4, 3), (3, 4)):
        found, wanted = of(replay, batch(slices, seed)), of(work, batch(slices, seed))
        assert torch.equal(found[0], wanted[0])
        assert len(found[1]) == len(parameters)
        assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


def test_a_replayed_prediction_may_have_fewer_rows_and_is_not_overwritten(faked: tuple[list[Tensor], list[Any]]):
    replay = cuda_graph.captured_without_gradients(lambda images: 2 * images, torch.zeros(4, 3))
    assert replay is not None
    first, second = replay(torch.ones(4, 3)), replay(torch.full((2, 3), 5.0))
    assert torch.equal(first, torch.full((4, 3), 2.0))
    assert torch.equal(second, torch.full((2, 3), 10.0))


def test_a_pass_that_cannot_be_captured_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_graph, "_graph_of", lambda *given: None)
    work = lambda batch: batch[0].sum()  # noqa: E731
    assert captured(work, [(torch.zeros(1), torch.zeros(1))], []) is work
    assert cuda_graph.captured_without_gradients(lambda images: images, torch.zeros(1)) is None


def test_both_sizes_of_an_epochs_batches_are_captured():
    options = Training(window=3, batch_size=4)
    assert _sizes(10, options) == [12, 6]
    assert _sizes(8, options) == [12]
    assert _sizes(2, options) == [6]


def test_samples_are_made_where_several_threads_may_work():
    assert [str(sample_device(torch.device(name))) for name in ("cuda:1", "mps", "cpu")] == ["cuda:1", "cpu", "cpu"]
