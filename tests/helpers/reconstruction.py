"""The attack of a server that chooses a run's settings, so that a site's answer reveals a training slice.

With strategy ``full``, the gradient of the position embeddings is the gradient at each token, so that of the patch
projection is a linear system for the patches. With one step on one slice, moments that do not average and a tiny loss,
Adam's step is g / (|g| + ε), from which g follows.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from flapsam.federation.agreement import SERVER
from flapsam.federation.hospitals.handshake import Proposal
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.federation.packets import Header, decode, encode
from flapsam.learning.prepared import PreparedCase
from flapsam.learning.slices import to_square
from flapsam.run.config import RunConfig, Samples
from flapsam.run.reading import validated

SIZE, EPSILON = 128, 1e-8
ATTACK: dict[str, Any] = {
    "strategy": "full",
    "validation_fraction": 0.999,
    "labels": {"background": 1, "lesion": 2, "organ": 99},
    "learning_rate": 1e5,
    "betas": (0.0, 0.0),
    "cross_entropy": 1e-8,
    "dice": 0.0,
    "empty_slices": 0.0,
    "schedule_power": 1e9,
    "batch_size": 1,
}
"""The settings of the attack that succeeded: correlation 1.000."""


def make_volumes(folder: Path, cases: int, seed: int = 0) -> Path:
    """Write one site's volumes with a ball and a small bright cube, on one slice each."""
    rng = np.random.default_rng(seed)
    for case in range(cases):
        grid = np.mgrid[:24, :24, :8]
        volume, label = rng.normal(0, 20, (24, 24, 8)), np.zeros((24, 24, 8), np.uint8)
        x, y = rng.integers(7, 17, 2)
        ball = (grid[0] - x) ** 2 + (grid[1] - y) ** 2 + (3 * (grid[2] - 4)) ** 2 < 36
        volume[ball] += 150
        label[ball] = 1
        z = int(rng.integers(3, 6))
        label[x - 1 : x + 2, y - 1 : y + 2, z] = 2
        volume[x - 1 : x + 2, y - 1 : y + 2, z] += 120
        for kind, voxels in (("images", volume.astype(np.int16)), ("labels", label)):
            (folder / "site_1" / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(
                nibabel.Nifti1Image(voxels, np.diag([2, 2, 5, 1])), folder / "site_1" / kind / f"case_{case}.nii.gz"
            )
    return folder


def proposal_of(settings: dict[str, Any]) -> bytes:
    """The server's proposal with these settings."""
    training = {"window": 1, "augment": "none", "weight_decay": 0.0, "warmup_steps": 1, "schedule_epochs": 1}
    fields = ("batch_size", "betas", "cross_entropy", "dice", "learning_rate", "empty_slices", "schedule_power")
    tree = {
        "data": {"path": "/x", "labels": {"organ": 1, "lesion": 2}, "validation_fraction": settings["validation_fraction"]},
        "backbone": {"name": "sam-tiny-1"},
        "samples": {"size": SIZE, "resize": "stretch"},
        "strategy": settings["strategy"],
        "aggregator": "fedavg",
        "compression": {"codec": "fp32"},
        "threads": 1,
        "rounds": {"count": 1},
        "training": {**training, **{name: settings[name] for name in fields}},
    }
    proposal = json.loads(Proposal.of("a" * 32, validated(tree, RunConfig, "the attack")).model_dump_json())
    proposal["config"]["data"]["labels"] = settings["labels"]
    return json.dumps(proposal).encode()


def reconstructions(site: SiteSide, rate: float) -> Iterator[torch.Tensor]:
    """Take part in round 1, and reconstruct a slice from the answer in two ways: (128, 128) each."""
    agreement = site.client.agreement
    start = {name: tensor.double() for name, tensor in agreement.start.items()}
    header = Header(run=agreement.run, round=0, base=0, sender=SERVER)
    nothing = encode(header, agreement.nothing(site.client.rank), {})
    _, got = decode(site.fit(iter([nothing])), lambda header: agreement.up("site_1", 1), 1 << 40)

    def gradient(name: str) -> torch.Tensor:
        step = (-(got[name].double() - start[name]) / rate).clamp(-0.999999, 0.999999)
        return EPSILON * step / (1 - step.abs())

    # The system is solved with the gradient that follows from Adam's rule, and with the step itself.
    for of in (gradient, lambda name: got[name].double() - start[name]):
        at_tokens = of("vision_encoder.pos_embed")
        width = at_tokens.shape[-1]
        weights = of("vision_encoder.patch_embed.projection.weight").reshape(width, -1)
        patches = torch.linalg.lstsq(at_tokens.reshape(-1, width).T, weights).solution
        side = SIZE // 16
        yield patches.reshape(side, side, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, SIZE, SIZE)[1]


def correlation(images: Sequence[torch.Tensor], cases: Iterable[PreparedCase], samples: Samples) -> float:
    """The highest absolute correlation of one of the images with a slice of the cases."""
    best = 0.0
    for case in cases:
        for slice_ in range(case.slices):
            true = to_square(case.stack(samples).window(slice_, 1), SIZE, "stretch")[0, 1].double()
            for image in images:
                value = torch.corrcoef(torch.stack([image.flatten(), true.flatten()]))[0, 1].abs()
                best = max(best, float(torch.nan_to_num(value)))
    return best


def site_of(folder: Path, state: Path, **own: Any) -> SiteSide:
    """The site that is attacked."""
    tree = {"data": {"path": folder, "site": "site_1"}, "state": state, "threads": 1, **own}
    return SiteSide("site_1", SiteConfig.model_validate(tree))
