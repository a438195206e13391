"""A small member of every family of backbones, with random weights."""

from pathlib import Path

from flapsam.sam import Architecture
from flapsam.sam.hiera import Hiera
from flapsam.sam.sources import Source
from flapsam.sam.tiny_vit import TinyVit
from flapsam.sam.vit import Vit
from tests.helpers.sites import write_run

SMALL: dict[str, Architecture] = {
    "small-vit": Vit(
        width=32,
        depth=2,
        heads=2,
        global_blocks=(1,),
        window=3,
        decoder_width=32,
        decoder_mlp=32,
        decoder_heads=2,
        upscaling=(16, 8, 8, 4),
        iou_width=16,
    ),
    "small-tiny-vit": TinyVit(
        widths=(8, 32, 64, 96),
        depths=(1, 1, 2, 1),
        depth=4,
        windows=(3, 4, 3),
        stem=(1, 1, 1),
        stride=4,
        decoder_width=32,
        decoder_mlp=32,
        decoder_heads=2,
        upscaling=(8, 4),
        iou_width=16,
    ),
    "small-hiera": Hiera(
        width=16,
        heads=1,
        depth=5,
        depths=(1, 1, 2, 1),
        windows=(8, 4, 3, 2),
        global_blocks=(3,),
        decoder_width=32,
        decoder_mlp=32,
        decoder_heads=2,
        upscaling=(8, 4),
        iou_width=16,
    ),
}
"""Name → sizes. Every family has one."""
SMALL_SOURCES = {name: Source(name, name, "paper", "Apache-2.0") for name in SMALL}


def small_run(path: Path, data: Path, **fields: object) -> Path:
    """Write a run as ``write_run`` does, on a smaller backbone, for tests in one process that use ``small_families``."""
    return write_run(path, data, **{"backbone": {"name": "small-vit", "weights": "random"}, **fields})
