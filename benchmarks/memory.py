"""Memory of a training step by backbone, image size and number of slices at once: the table in docs/memory.md.

    python benchmarks/memory.py [--strategy flap] [--device cpu] [--precision fp32]

Each backbone is built with random weights, and two small steps are measured, as in `flapsam memory`. ViT-H needs about
12 GiB meanwhile.
"""

import argparse

from flapsam.learning.memory import memory_table

BACKBONES = {
    "sam-tiny": (128, 256),
    "sam-tiny-1": (128, 256),
    "lite-medsam": (112, 256),
    "sam2.1-tiny": (224, 512),
    "sam-vit-b": (224, 512),
    "sam-vit-l": (224, 512),
    "sam-vit-h": (224, 512),
}


def gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="flap")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    counts: list[int] = []
    for backbone, sizes in BACKBONES.items():
        for size in sizes:
            rows = memory_table(
                backbone, image_size=size, strategy=given.strategy, rank=32, device=given.device, precision=given.precision
            )
            if not counts:
                counts = [row.slices for row in rows]
                print("| backbone | pixels | checkpointing | " + " | ".join(f"{count}" for count in counts) + " |")
                print("|---|---:|---|" + "---:|" * len(counts))
            for name in ("straight", "checkpointing"):
                cells = " | ".join(gib(getattr(row, name)) for row in rows)
                print(f"| {backbone} | {size} | {'yes' if name == 'checkpointing' else 'no'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
