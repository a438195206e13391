"""Speed of segmenting a volume with every slice once, compared with the paper's way, and memory for large CTs.

    python benchmarks/inference.py [--slices 40] [--threads 2] [--repeats 3]
    python benchmarks/inference.py --memory 250 1000

The network is ViT-B with random weights, strategy ``flap``, 224 pixels, and three classes including the background. Two ways
run alternately in one process, with the same weights and threads. (a) In the paper's way, every position of the volume is a
window of five adjacent slices that passes through the network by itself, adapters run beside their layers, and a slice's
probabilities are averaged over the five windows that contain it. (b) ``predict_volume`` runs the fused network, in fp32 and
in bf16. Every slice contains the minimum and the maximum of the volume, so that both ways scale slices alike. The script
prints the share of voxels where the label maps agree. Then it compares the encoder's time per slice with that of the matrix
products of its linear layers alone, as ``step_time.py`` does.

With ``--memory``, ``flapsam predict`` segments CTs of 512 × 512 voxels with the given numbers of slices, each in a separate
process. The script prints the peak of that process's resident memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from step_time import seconds, shapes
from torch.utils.flop_counter import FlopCounterMode

from flapsam.adapters.store import AdapterCard, BackboneCard, save_adapter
from flapsam.base.device import set_up_torch
from flapsam.learning.inference import Precision, predict_volume
from flapsam.learning.slices import from_square, stack_of, to_square
from flapsam.run.config import RANDOM, Backbone, Lora, Samples
from flapsam.sam import Assembled, Sam, assemble, fuse, travelling, travelling_state
from flapsam.volumes import Volume

WINDOW = 5
SIZE = 224
BACKBONE = Backbone(name="sam-vit-b", weights=RANDOM)
BATCH = 16


def made() -> Assembled:
    """ViT-B whose adapters and output part differ from their initial values."""
    assembled = assemble(BACKBONE, image_size=SIZE, classes=2, strategy_name="flap", lora=Lora(), seed=0)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for parameter in travelling(assembled.network).values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    assembled.network.eval()
    return assembled


def volume(slices: int) -> Volume:
    """Smooth noise on 256 × 256 × ``slices`` voxels of 1 × 1 × 3 mm. Two voxels of every slice are 0 and 1."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(0).normal(size=(256, 256, slices)), (4, 4, 1))
    array = np.clip(0.5 + noise / noise.std() / 6, 0, 1).astype(np.float32)
    array[0, 0], array[-1, -1] = 0, 1
    return Volume(array, np.diag([1.0, 1.0, 3.0, 1.0]))


@torch.inference_mode()
def five_windows(network: Sam, image: Volume) -> NDArray[np.uint8]:
    """Segment the paper's way, with one window per position and probabilities averaged over the windows."""
    stack = stack_of(image, Samples())
    count, height, width = stack.shape
    sums, weights = torch.zeros(count, len(network.mask_decoder.output.hypernetworks), height, width), torch.zeros(count)
    for centre in range(count):
        window = to_square(stack.window(centre, WINDOW), SIZE, "stretch")
        probabilities = from_square(network(window).softmax(1), (height, width), "stretch")
        for place, index in enumerate(range(centre - WINDOW // 2, centre + WINDOW // 2 + 1)):
            if 0 <= index < count:
                sums[index] += probabilities[place]
                weights[index] += 1
    labels = (sums / weights[:, None, None, None]).argmax(1).numpy().astype(np.uint8)
    return np.moveaxis(labels, 0, 2)


def speed(slices: int, repeats: int) -> None:
    plain = made().network
    fused = fuse(deepcopy(plain))
    image = volume(slices)

    def once(precision: Precision) -> NDArray[np.uint8]:
        return predict_volume(fused, image, Samples(), precision=precision).labels

    ways: dict[str, Callable[[], NDArray[np.uint8]]] = {
        "five windows a slice": lambda: five_windows(plain, image),
        "every slice once": lambda: once("fp32"),
        "every slice once, bf16": lambda: once("bf16"),
    }
    label_maps = {name: way() for name, way in ways.items()}
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    times = {name: min(turn[name] for turn in turns) for name in ways}
    reference = label_maps["five windows a slice"]
    shares = ", ".join(f"{share:.0%}" for share in np.bincount(reference.ravel(), minlength=3) / reference.size)
    print(f"{slices} slices, {torch.get_num_threads()} threads, shortest of {repeats}. Shares of the classes: {shares}\n")
    print("| | seconds | ms per slice | × faster | same label |\n|---|---:|---:|---:|---:|")
    for name, took in times.items():
        same = (label_maps[name] == reference).mean()
        ratio = times["five windows a slice"] / took
        print(f"| {name} | {took:.1f} | {1000 * took / slices:.0f} | {ratio:.2f} | {same:.4%} |")
    encoder(fused, repeats)


@torch.inference_mode()
def encoder(network: Sam, repeats: int) -> None:
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    pairs = [(torch.rand(m, k), torch.rand(k, n)) for m, k, n in shapes(network, images)]
    operations = {"products alone": sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairs)}
    with FlopCounterMode(display=False) as counter:
        network.embed(images)
    operations["encoder"] = counter.get_total_flops()
    work = {"products alone": lambda: [torch.mm(a, b) for a, b in pairs], "encoder": lambda: network.embed(images)}
    turns = [{name: seconds(run) for name, run in work.items()} for _ in range(repeats + 1)][1:]
    times = {name: min(turn[name] for turn in turns) for name in work}
    rates = {name: operations[name] / times[name] for name in work}
    print(f"\n{BATCH} slices at once\n")
    print("| | GFLOP per slice | ms per slice | GFLOP/s | share of the products' rate |\n|---|---:|---:|---:|---:|")
    for name, took in times.items():
        share = rates[name] / rates["products alone"]
        figures = f"{operations[name] / 1e9 / BATCH:.1f} | {1000 * took / BATCH:.0f} | {rates[name] / 1e9:.0f}"
        print(f"| {name} | {figures} | {share:.0%} |")


def save(folder: Path) -> Path:
    """Save the network's adapter to ``folder``."""
    assembled = made()
    metadata = {**BACKBONE.model_dump(), "seed": 0, "checksum": assembled.origin.checksum}
    card = AdapterCard(
        run="benchmark",
        mode="federated",
        rounds=1,
        strategy="flap",
        lora=Lora(),
        frozen=[],
        backbone=BackboneCard.model_validate(metadata),
        samples=Samples(size=SIZE),
        classes=["organ", "lesion"],
        labels={"organ": 1, "lesion": 2},
        licence="Apache-2.0",
    )
    save_adapter(folder, card, travelling_state(assembled.network))
    return folder


def ct(slices: int, path: Path) -> Path:
    """Write a CT of noise in Hounsfield units, with 512 × 512 × ``slices`` voxels of int16."""
    draw = np.random.default_rng(0)
    array = np.empty((512, 512, slices), np.int16, order="F")
    for index in range(slices):
        array[:, :, index] = draw.normal(0, 300, (512, 512))
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.7, 0.7, 1.0, 1.0])), path)
    return path


def memory(slices: list[int], threads: int) -> None:
    print("| slices | voxels, MiB | label map, MiB | peak, MiB | seconds |\n|---:|---:|---:|---:|---:|")
    for count in slices:
        with tempfile.TemporaryDirectory() as folder:
            image, adapter = ct(count, Path(folder) / "ct.nii.gz"), save(Path(folder) / "adapter")
            command = [Path(sys.executable).with_name("flapsam"), "predict", adapter, image, "-o", f"{folder}/out"]
            began = time.perf_counter()
            process = subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"flapsam predict failed with wait status {status}")
            peak, took = usage.ru_maxrss / 1024, time.perf_counter() - began
        print(f"| {count} | {count / 2:.0f} | {count / 4:.0f} | {peak:.0f} | {took:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--memory", type=int, nargs="+", metavar="SLICES", help="segment CTs with these numbers of slices instead"
    )
    arguments = parser.parse_args()
    set_up_torch(arguments.threads, deterministic=True)
    if arguments.memory:
        memory(arguments.memory, arguments.threads)
    else:
        speed(arguments.slices, arguments.repeats)


if __name__ == "__main__":
    main()
