"""Throughput of ViT-B at 224 pixels against the machine's matrix products: encoder forward, and a training step of ``flap``.

    python benchmarks/step_time.py [--slices 4] [--threads 2] [--repeats 5]

The encoder's forward pass, a whole step (forward, loss, backward, AdamW), and the products of the encoder's linear layers
alone (``torch.mm`` of the same shapes) take turns in one process, with the same threads. ``FlopCounterMode`` counts
floating-point operations, and a rate is operations divided by the shortest time. The script prints the rates, their ratio to
that of the products alone, and the operations other than matrix products with their share of the time.
"""

import argparse
import time
from collections.abc import Callable

import torch
from step_variants import made, plain
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from flapsam.base.device import set_up_torch
from flapsam.sam import Sam

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution", "aten::_scaled_dot_product")


def shapes(network: Sam, images: Tensor) -> list[tuple[int, int, int]]:
    """Rows, inner size and columns of every product of the encoder's linear layers in a forward pass."""
    sizes: list[tuple[int, int, int]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        sizes.append((inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features))

    linear = [layer for layer in network.vision_encoder.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in linear]
    network.embed(images)
    for hook in hooks:
        hook.remove()
    return sizes


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    set_up_torch(arguments.threads, deterministic=True)
    network, images, labels = made("sam-vit-b", "flap", 224, arguments.slices)
    step = plain(network, images, labels)

    @torch.no_grad()
    def forward() -> None:
        network.embed(images)

    with torch.no_grad():
        pairs = [(torch.rand(m, k), torch.rand(k, n)) for m, k, n in shapes(network, images)]
    operations = {"products alone": sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairs)}

    def products() -> None:
        for a, b in pairs:
            torch.mm(a, b)

    work: dict[str, Callable[[], None]] = {"products alone": products, "encoder forward": forward, "flap step": step}
    for name in ("encoder forward", "flap step"):
        with FlopCounterMode(display=False) as counter:
            work[name]()
        operations[name] = counter.get_total_flops()
    turns = [{name: seconds(run) for name, run in work.items()} for _ in range(arguments.repeats)]
    times = {name: min(turn[name] for turn in turns) for name in work}
    rates = {name: operations[name] / times[name] for name in work}
    print(f"ViT-B at 224, {arguments.slices} slices, {arguments.threads} threads, shortest of {arguments.repeats}\n")
    print("| | GFLOP | seconds | GFLOP/s | share of the products' rate |\n|---|---:|---:|---:|---:|")
    for name, rate in rates.items():
        share = rate / rates["products alone"]
        print(f"| {name} | {operations[name] / 1e9:.1f} | {times[name]:.3f} | {rate / 1e9:.0f} | {share:.0%} |")
    for name in ("encoder forward", "flap step"):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            work[name]()
        events = profiler.key_averages()
        whole = sum(event.self_cpu_time_total for event in events)
        rest = sorted(
            (event for event in events if not event.key.startswith(PRODUCTS)), key=lambda e: -e.self_cpu_time_total
        )
        print(f"\n{name}, without matrix products: ", end="")
        print(", ".join(f"{event.key} {event.self_cpu_time_total / whole:.1%}" for event in rest[:8]))


if __name__ == "__main__":
    main()
