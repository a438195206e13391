"""Time of other ways to compute the same training step, relative to flapsam's way.

    python benchmarks/step_variants.py [--backbone sam-vit-b] [--strategy flap] [--size 224] [--slices 4] [--threads 2]

A step of a strategy is forward, loss, backward and AdamW. All variants take turns in one process, with the same threads. The
script prints the median over the turns of a variant's time divided by the plain step's time in the same turn. A variant with
a value below 1 is faster.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flapsam.base.device import set_up_torch
from flapsam.learning.training import Learner, segmentation_loss
from flapsam.run.config import RANDOM, Backbone, Lora, Training
from flapsam.sam import Sam, assemble

Step = Callable[[], None]


def made(backbone: str, strategy: str, size: int, slices: int) -> tuple[Sam, Tensor, Tensor]:
    """A network with random weights, images and labels."""
    network = assemble(
        Backbone(name=backbone, weights=RANDOM),
        image_size=size,
        classes=2,
        strategy_name=strategy,
        lora=Lora(rank=32),
        seed=0,
    ).network
    return network, torch.rand(slices, 3, size, size), torch.randint(0, 3, (slices, size, size))


def plain(network: Sam, images: Tensor, labels: Tensor) -> Step:
    learner = Learner(network, Training())
    return lambda: _step(network, learner.optimizer, images, labels)


def autocast(network: Sam, images: Tensor, labels: Tensor) -> Step:
    learner = Learner(network, Training())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            _step(network, learner.optimizer, images, labels)

    return step


def compiled(network: Sam, images: Tensor, labels: Tensor) -> Step:
    learner = Learner(network, Training())
    network.compile()
    return lambda: _step(network, learner.optimizer, images, labels)


def channels_last(network: Sam, images: Tensor, labels: Tensor) -> Step:
    network.mask_decoder.output.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return plain(network, images, labels)


def not_fused(network: Sam, images: Tensor, labels: Tensor) -> Step:
    learner = Learner(network, Training())
    optimizer = torch.optim.AdamW(learner.parameters.values(), fused=False)
    return lambda: _step(network, optimizer, images, labels)


def merged_product(network: Sam, images: Tensor, labels: Tensor) -> Step:
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = _Merged(layer)  # type: ignore[method-assign]
    return plain(network, images, labels)


def kept_features(network: Sam, images: Tensor, labels: Tensor) -> Step:
    if any(parameter.requires_grad for parameter in network.vision_encoder.parameters()):
        raise ValueError("the encoder trains; use a strategy that freezes it")
    learner = Learner(network, Training())
    embedding = network.embed(images)
    return lambda: _step(network.logits, learner.optimizer, embedding, labels)


class _Merged:
    """x ↦ (W + BA) x: one large product of the input, where PEFT has two thin ones beside the layer's own."""

    def __init__(self, layer: LoraLayer) -> None:
        self.base = cast(nn.Linear, layer.get_base_layer())
        self.a, self.b = (cast(nn.Linear, factor["default"]) for factor in (layer.lora_A, layer.lora_B))

    def __call__(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.base.weight + self.b.weight @ self.a.weight, self.base.bias)


VARIANTS: dict[str, Callable[[Sam, Tensor, Tensor], Step]] = {
    "plain": plain,
    "bf16 autocast": autocast,
    "torch.compile": compiled,
    "channels-last upscaling": channels_last,
    "AdamW not fused": not_fused,
    "LoRA as one merged product": merged_product,
    "encoder's features kept": kept_features,
}


def _step(network: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    segmentation_loss(network(images).float(), labels, Training()).total.backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="sam-vit-b")
    parser.add_argument("--strategy", default="flap")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    set_up_torch(arguments.threads, deterministic=True)
    network, images, labels = made(arguments.backbone, arguments.strategy, arguments.size, arguments.slices)
    steps: dict[str, Step] = {}
    for name, variant in VARIANTS.items():
        try:
            step = variant(copy.deepcopy(network), images, labels)
            step()
            steps[name] = step
        except Exception as error:  # that a variant cannot run here is a result, too
            print(f"{name}: does not run here ({type(error).__name__})")
    turns: list[dict[str, float]] = []
    for _ in range(arguments.repeats):
        turn = {}
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            turn[name] = time.perf_counter() - began
        turns.append(turn)
    print(", ".join(f"{name} {value}" for name, value in vars(arguments).items()) + "\n")
    print("| | seconds | × the plain step |\n|---|---:|---:|")
    for name in steps:
        ratio = median(turn[name] / turn["plain"] for turn in turns)
        print(f"| {name} | {median(turn[name] for turn in turns):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
