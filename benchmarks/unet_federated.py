"""The likely alternative: a 3-D U-Net from scratch, by FedAvg and on pooled data, compared with FLAP-SAM's cells.

    python benchmarks/unet_federated.py DATA [--minutes 30]

DATA is the Medical Segmentation Decathlon's hippocampus with one folder per site. MONAI's residual UNet receives whole,
z-scored volumes of 48 × 64 × 48 voxels with small affine changes and noise. It is trained with AdamW, a falling learning
rate, Dice and cross-entropy, for six minutes on one thread, as FLAP-SAM's cells are (``benchmarks/results/hippocampus``).
FedAvg runs for 8 rounds, and for 2, which send about as many bytes as FLAP-SAM's 8. Test cases are scored by 3-D Dice on
their own grid. Cells that are missing in ``results/unet_federated.json`` are computed until the minutes are over.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from cells import HERE, Cells, arguments, hippocampus, paired, prepared, read_cells, write_cells
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from monai.transforms.spatial.array import RandAffine
from torch import Tensor

from flapsam.base.device import set_up_torch
from flapsam.learning.metrics import score_case
from flapsam.learning.prepared import PreparedCase

RESULTS = HERE / "results" / "unet_federated.json"
FLAP = HERE / "results" / "hippocampus" / "cells" / "flap--federated--flexlora--seed_0.json"
SHAPE = (48, 64, 48)
SECONDS, BATCH, RATE = 360, 2, 2e-3
KINDS = {"FedAvg, 8 rounds": 8, "FedAvg, 2 rounds": 2, "centralised": 0}
"""Name → number of rounds, where 0 means pooled data."""


class Site:
    """Training cases of one client, and their random augmentation."""

    def __init__(self, cases: Sequence[PreparedCase], seed: int) -> None:
        self.images = torch.stack([volume(case)[None] for case in cases])
        self.labels = torch.stack([fitted(torch.from_numpy(np.array(case.labels())).long()) for case in cases])
        self.rng = np.random.default_rng(seed)
        self.affine = RandAffine(0.7, [0.2] * 3, [0.1] * 3, [4] * 3, [0.15] * 3, padding_mode="border")
        self.affine.set_random_state(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw random cases, and augment them."""
        chosen = self.rng.choice(len(self.images), min(BATCH, len(self.images)), replace=False)
        images, labels = [], []
        for index in chosen:
            both = self.affine(torch.cat([self.images[index], self.labels[index][None].float()]), mode=("bilinear"))
            images.append(both[:1] + float(self.rng.uniform(0, 0.1)) * torch.randn(1, *SHAPE))
            labels.append(both[1:].round())
        return torch.stack(images).as_subclass(Tensor), torch.stack(labels).as_subclass(Tensor)


def volume(case: PreparedCase) -> Tensor:
    """A case's image, z-scored."""
    image = torch.from_numpy(np.array(np.load(case.folder / f"{case.name}.image.npy"), np.float32))
    return fitted((image - image.mean()) / image.std())


def fitted(array: Tensor) -> Tensor:
    """Cut or pad an array to ``SHAPE`` at the far ends."""
    padded = torch.zeros(SHAPE, dtype=array.dtype)
    part = tuple(slice(0, min(a, b)) for a, b in zip(array.shape, SHAPE, strict=True))
    padded[part] = array[part]
    return padded


def fit(network: UNet, optimizer: torch.optim.Optimizer, site: Site, seconds: float, progress: tuple[float, float]) -> int:
    """Train for a time, and return the number of steps. ``progress`` is the share of the whole run at the start and end."""
    loss_of, began, steps = DiceCELoss(to_onehot_y=True, softmax=True), time.perf_counter(), 0
    network.train()
    while (spent := time.perf_counter() - began) < seconds:
        done = progress[0] + (progress[1] - progress[0]) * spent / seconds
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - done)
        images, labels = site.batch()
        optimizer.zero_grad()
        loss_of(network(images), labels).backward()
        optimizer.step()
        steps += 1
    return steps


def compute(data: Path, rounds: int) -> dict[str, Any]:
    """Train in this number of rounds. Returns the costs, and the Dice of every test case."""
    config = hippocampus(data, {})
    set_up_torch(1, deterministic=False)
    torch.manual_seed(0)
    network = UNet(3, 1, 3, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="INSTANCE")
    with tempfile.TemporaryDirectory() as folder:
        names = [f"site_{number}" for number in range(1, 7)]
        train = [prepared(config, Path(folder), "train", [name]) for name in names]
        sites = (
            [Site([case for part in train for case in part], 0)] if not rounds else [Site(p, i) for i, p in enumerate(train)]
        )
        weights = [sum(case.slices for case in part) for part in train]
        state, steps = {name: tensor.clone() for name, tensor in network.state_dict().items()}, 0
        moments: list[dict[str, Any] | None] = [None] * len(sites)
        for number in range(max(rounds, 1)):
            answers = []
            progress = (number / max(rounds, 1), (number + 1) / max(rounds, 1))
            for index, site in enumerate(sites):
                network.load_state_dict(state)
                optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
                if moments[index]:
                    optimizer.load_state_dict(moments[index] or {})
                steps += fit(network, optimizer, site, SECONDS / max(rounds, 1) / len(sites), progress)
                moments[index] = optimizer.state_dict()
                answers.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
            shares = [1.0] if not rounds else [weight / sum(weights) for weight in weights]
            state = {n: sum((s * a[n] for s, a in zip(shares, answers, strict=True)), torch.zeros(())) for n in state}
        network.load_state_dict(state)
        network.eval()
        dice = {}
        for case in prepared(config, Path(folder), "test"):
            truth = np.array(case.labels())
            with torch.inference_mode():
                labels = network(volume(case)[None, None]).argmax(dim=1)[0].numpy()
            box = tuple(slice(0, min(a, b)) for a, b in zip(truth.shape, SHAPE, strict=True))
            predicted = np.zeros(truth.shape, np.uint8)
            predicted[box] = labels[box]
            score = score_case(case.name, case.site, predicted, truth, None, config.data.classes)
            dice[f"{case.site}/{case.name}"] = mean(value or 0.0 for value in score.dice.values())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {
        "steps": steps,
        "seconds": SECONDS,
        "parameters": parameters,
        "mib": 2 * rounds * parameters * 4 / 2**20,
        "dice": dice,
    }


def table(cells: Cells) -> str:
    """The cells as Markdown, with their differences to FLAP-SAM's cell of the first seed."""
    flap = json.loads(FLAP.read_text()) if FLAP.exists() else {"scores": []}
    ours = {f"{s['site']}/{s['case']}": mean(s["dice"].values()) for s in flap["scores"]}
    lines = [
        "| 3-D U-Net | steps | parameters | MiB per site | Dice | difference to `flap`, federated |",
        "|---" + "|---:" * 5 + "|",
    ]
    for kind in KINDS:
        cell = cells.get(kind)
        if cell is None:
            lines.append(f"| {kind} |" + " missing |" * 5)
            continue
        difference = paired(cell["dice"], ours)[0] if ours else "missing"
        numbers = f"{cell['steps']} | {cell['parameters']:,} | {cell['mib']:.0f} | {mean(cell['dice'].values()):.3f}"
        lines.append(f"| {kind} | {numbers} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    cells = read_cells(RESULTS)
    end = time.monotonic() + 60 * given.minutes
    for kind, rounds in KINDS.items():
        if kind not in cells and time.monotonic() < end:
            cells[kind] = compute(given.data, rounds)
            write_cells(RESULTS, cells)
    print(table(cells))


if __name__ == "__main__":
    main()
