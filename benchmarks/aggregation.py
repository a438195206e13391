"""Aggregator ``flexlora`` against a dense SVD, and the memory that aggregators need for many clients.

    OMP_NUM_THREADS=1 python benchmarks/aggregation.py [--minutes 15]

Speed: the adapters have the shapes of SAM's ViT-B and ViT-H at rank 32 and come from six clients. The dense way is that of
the paper's code, which forms Σ w·B·A and calls scikit-learn's ``randomized_svd``. Both ways run alternately in one process.
The error is that of the product B·A against the float64 truncated SVD P, ‖B·A − P‖ / ‖P‖ in the Frobenius norm, for each
layer. The factors are synthetic. A is a common normal A₀ plus a tenth as much noise of the client's own. B is a common
normal matrix of rank 8 plus half as much noise of the client's own.

Memory: the replies of strategy ``flap`` on ViT-B lie in files and are read as the server reads them. Each number comes from
a fresh process.

Cells that are missing in ``results/aggregation.json`` are computed until the minutes are over. Then
``results/aggregation.md`` is rewritten.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from cells import HERE, Cells, read_cells, write_cells
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits
from torch import Tensor

from flapsam.base.files import write_text
from flapsam.federation.aggregation import Reply, aggregator
from flapsam.federation.aggregation.aggregator import A, B, lora_layers
from flapsam.federation.state import ServerState
from flapsam.run.config import Lora
from flapsam.sam import apply_strategy, architecture, build, strategy, travelling
from flapsam.sam.sources import source

RESULTS = HERE / "results" / "aggregation.json"
TABLE = HERE / "results" / "aggregation.md"
RANK = 32
WEIGHTS = (0.030, 0.184, 0.153, 0.096, 0.047, 0.490)
"""Shares of Fed-KiTS19's sites."""
REPEATS = 7
PROCESSES = 3
SPEED = [(backbone, threads) for threads in (1, 2) for backbone in ("sam-vit-b", "sam-vit-h")]
MEMORY = [(name, count) for name in ("flexlora", "median", "fedavg") for count in (40, 200)]

Tensors = dict[str, Tensor]


def sizes(backbone: str) -> dict[str, torch.Size]:
    """Shapes of the tensors that travel with strategy ``flap``, from a network without weights."""
    sizes = architecture(source(backbone).architecture)
    with torch.device("meta"):
        network = apply_strategy(build(sizes, image_size=sizes.default_size, classes=2), strategy("flap"), Lora(rank=RANK))
    return {name: parameter.shape for name, parameter in travelling(network).items()}


def client(shapes: Mapping[str, torch.Size], number: int) -> Tensors:
    """Synthetic tensors of a client, which are realistic for low-rank factors."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + number)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(B):
            start = torch.randn(shape[0], 8, generator=common) @ torch.randn(8, shape[1], generator=common) / 8**0.5
            tensors[name] = start + 0.5 * torch.randn(shape, generator=own)
        else:
            tensors[name] = torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=own)
    return tensors


def formed(layer: str, clients: list[Tensors], dtype: torch.dtype) -> Tensor:
    """The mean product Σ w·B·A of a layer."""
    parts = (w * (t[layer + B].to(dtype) @ t[layer + A].to(dtype)) for w, t in zip(WEIGHTS, clients, strict=True))
    return torch.stack(list(parts)).sum(dim=0)


def dense(clients: list[Tensors]) -> Tensors:
    """Form the mean product of each layer and decompose it, as the paper's code does."""
    result = {}
    for layer in lora_layers(clients[0]):
        u, s, vt = randomized_svd(formed(layer, clients, torch.float32).numpy(), n_components=RANK, random_state=0)
        result |= {layer + B: torch.from_numpy(u.copy()), layer + A: torch.from_numpy(s[:, None] * vt)}
    return result


def stacked(clients: list[Tensors]) -> Tensors:
    """Aggregate with flapsam's ``flexlora``."""
    replies = [Reply.of(tensors, weight) for tensors, weight in zip(clients, WEIGHTS, strict=True)]
    return aggregator("flexlora", RANK).aggregate(replies, clients[0], 1)


def errors(results: Mapping[str, Tensors], clients: list[Tensors]) -> dict[str, list[float]]:
    """Errors of each result by layer, against the float64 truncated SVD."""
    by_result: dict[str, list[float]] = {name: [] for name in results}
    for layer in lora_layers(clients[0]):
        u, s, vt = torch.linalg.svd(formed(layer, clients, torch.float64), full_matrices=False)
        best = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        for name, tensors in results.items():
            by_result[name].append(
                float((tensors[layer + B].double() @ tensors[layer + A].double() - best).norm() / best.norm())
            )
    return by_result


def speed(backbone: str, threads: int) -> dict[str, Any]:
    """Time both ways alternately, and compute their errors."""
    torch.set_num_threads(threads)
    shapes = {name: shape for name, shape in sizes(backbone).items() if name.endswith((A, B))}
    clients = [client(shapes, number) for number in range(len(WEIGHTS))]
    ways = {"flexlora": stacked, "dense": dense}
    with threadpool_limits(threads):
        results = {name: way(clients) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                began = time.perf_counter()
                way(clients)
                seconds[name].append(time.perf_counter() - began)
        error = errors(results, clients)
    return {"layers": len(lora_layers(shapes)), "seconds": seconds, "errors": error}


def write_replies(folder: Path, count: int) -> None:
    """Write one reply per client, as the server keeps them."""
    shapes = sizes("sam-vit-b")
    state = ServerState(folder)
    for number in range(count):
        state.keep_reply(f"{number:03d}", client(shapes, number), {})


def status(field: str) -> float:
    """One of this process's sizes in MiB, from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(name: str, count: int, folder: Path) -> dict[str, float]:
    """Peak MiB above the start while an aggregator runs, with and without pages of mapped files, and its seconds."""
    state = ServerState(folder)
    previous = client(sizes("sam-vit-b"), 0)
    small = {"x" + A: torch.ones(2, 8), "x" + B: torch.ones(8, 2), "y": torch.ones(3)}
    for clients in (1, 10):  # loads the libraries' code for both branches of flexlora
        aggregator(name, 2).aggregate([Reply.of(small, 1.0)] * clients, small, 1)
    done, anonymous = threading.Event(), [status("RssAnon")]

    def watch() -> None:
        while not done.wait(0.002):
            anonymous.append(status("RssAnon"))

    watcher = threading.Thread(target=watch)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = status("VmRSS")
    watcher.start()
    began = time.perf_counter()
    replies = [state.reply(site, 1.0)[0] for site in list(state.replied())[:count]]
    aggregator(name, RANK).aggregate(replies, previous, 1)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"all": status("VmHWM") - start, "anonymous": max(anonymous) - anonymous[0], "seconds": seconds}


def memory(name: str, count: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Run ``peak`` in fresh processes, with both settings of the C library's allocator."""
    command = [sys.executable, __file__, "--peak", name, str(count), str(folder)]
    runs: dict[str, list[dict[str, float]]] = {"returned": [], "default": []}
    for _ in range(PROCESSES):
        for allocator, setting in (("returned", {"MALLOC_MMAP_THRESHOLD_": "131072"}), ("default", {})):
            run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **setting})
            runs[allocator].append(json.loads(run.stdout))
    return runs


def table(cells: Cells) -> str:
    """The cells as Markdown."""
    lines = [
        "# Aggregation",
        "",
        "Written by `OMP_NUM_THREADS=1 python benchmarks/aggregation.py`. The script's docstring describes the",
        "measurements.",
        "",
        "## `flexlora` against a dense SVD",
        "",
        f"Six clients, rank {RANK}. Seconds are medians of {REPEATS} turns. The ratio is the median of dense / `flexlora`",
        "in the same turn. Errors are the mean over the layers, with the worst layer in brackets. On the two virtual cores",
        "of this measurement, `randomized_svd` is slower with two threads than with one.",
        "",
        "| backbone | layers | threads | `flexlora`, s | dense, s | ratio | error of `flexlora` | error of dense |",
        "|---|" + "---:|" * 7,
    ]
    for backbone, threads in SPEED:
        cell = cells.get(f"speed {backbone} {threads}")
        if cell is None:
            lines.append(f"| {backbone} | | {threads} |" + " missing |" * 5)
            continue
        ours, theirs = cell["seconds"]["flexlora"], cell["seconds"]["dense"]
        ratio = median(slow / fast for slow, fast in zip(theirs, ours, strict=True))
        error = " | ".join(f"{mean(e):.1e} ({max(e):.1e})" for e in (cell["errors"]["flexlora"], cell["errors"]["dense"]))
        times = f"{median(ours):.3f} | {median(theirs):.3f} | {ratio:.1f}"
        lines.append(f"| {backbone} | {cell['layers']} | {threads} | {times} | {error} |")
    lines += [
        "",
        "## Memory",
        "",
        "Peak memory in MiB above that at the start, with ViT-B, strategy `flap` and one thread. Figures are medians of",
        f"{PROCESSES} processes. Anonymous memory excludes pages of mapped files. By default, the C library keeps a varying",
        "amount of freed memory. The first two figures were therefore measured with the setting that returns it",
        "(`MALLOC_MMAP_THRESHOLD_=131072`), and the last two without it.",
        "",
        "| aggregator | clients | total | anonymous | total, by default | seconds, by default |",
        "|---|" + "---:|" * 5,
    ]
    for name, count in MEMORY:
        cell = cells.get(f"memory {name} {count}")
        row = " missing |" * 4
        if cell:
            shown = [("returned", "all"), ("returned", "anonymous"), ("default", "all"), ("default", "seconds")]
            row = "".join(f" {median(run[field] for run in cell[runs]):.1f} |" for runs, field in shown)
        lines.append(f"| {name} | {count} |{row}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="minutes after which no further cell is started")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        name, count, folder = given.peak
        print(json.dumps(peak(name, int(count), Path(folder))))
        return
    cells = read_cells(RESULTS)
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        work = {f"speed {backbone} {threads}": partial(speed, backbone, threads) for backbone, threads in SPEED}
        work |= {f"memory {name} {count}": partial(memory, name, count, Path(folder)) for name, count in MEMORY}
        missing = [cell for cell in work if cell not in cells]
        if any(cell.startswith("memory") for cell in missing):
            write_replies(Path(folder), max(count for _, count in MEMORY))
        for cell in missing:
            if time.monotonic() < end:
                cells[cell] = work[cell]()
                write_cells(RESULTS, cells)
    write_text(TABLE, table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
