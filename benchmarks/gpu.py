"""What only a GPU can tell, in one command of at most eight minutes: is it right, how fast is it, does it repeat.

    python benchmarks/gpu.py                  on a machine with a GPU
    python benchmarks/gpu.py --tiny           the same code on a CPU with tiny sizes: does the script itself work?
    python benchmarks/gpu.py --only rules,steps

Sections come in the order of their worth. Each is guarded, and none begins after ``--minutes``. Every question ends with
PASS, FAIL or INFO. Figures go to ``gpu.json`` and a table to ``gpu.md``, in the folder ``--out``.

Random weights show errors, equality, memory and time, which do not depend on the values. How well a network learns in half
precision is tried with the backbone that ships.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from torch import Tensor

from flapsam.base.device import describe_device, find_device, set_up_torch
from flapsam.base.environment import default_threads, environment
from flapsam.experiments.phantom import make_phantom
from flapsam.experiments.simulation import simulate
from flapsam.learning import memory
from flapsam.learning.cuda_graph import captured
from flapsam.learning.inference import predict_volume, usual_precision
from flapsam.learning.prepared import PreparedCase
from flapsam.learning.slices import ranges_of
from flapsam.learning.training import Learner, backward, fit
from flapsam.run.config import RANDOM, Backbone, Lora, RunConfig, Samples, Training
from flapsam.run.observer import Observer
from flapsam.run.reading import validated
from flapsam.sam import STRATEGIES, Sam, assemble, fuse, travelling, vit
from flapsam.sam.halving import halved
from flapsam.volumes import Volume, read_image

GIGA = {
    ("sam-vit-b", 224, "flap"): 73.1,
    ("sam-vit-b", 224, "full"): 107.0,
    ("sam-vit-h", 224, "flap"): 518.0,
    ("sam-vit-b", 512, "flap"): 481.0,
}
"""GFLOP of a slice in a step, forward and backward, as FlopCounterMode counts them with rank 32 and three masks."""
FORWARD = 36.1
"""GFLOP of a slice in a prediction with ViT-B at 224 px."""
DENSE = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}
"""Dense bfloat16 TFLOP/s of a card by its data sheet."""


@dataclass
class Check:
    """What was asked and found."""

    device: torch.device
    tiny: bool
    found: dict[str, Any] = field(default_factory=dict)
    verdicts: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def big(self) -> tuple[str, int]:
        """The backbone that is measured, and its image size."""
        return ("sam-tiny-1", 64) if self.tiny else ("sam-vit-b", 224)

    def verdict(self, what: str, good: bool | None, figures: object = "") -> None:
        word = "INFO" if good is None else "PASS" if good else "FAIL"
        self.verdicts.append((what, word, str(figures)))
        print(f"  [{word}] {what}: {figures}", flush=True)

    def row(self, section: str, **figures: Any) -> None:
        self.found.setdefault(section, []).append(figures)
        print("  ", figures, flush=True)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], object], repeats: int = 7, warm: int = 2) -> float:
        """Median seconds of a call, the device's work included."""
        times = []
        for index in range(warm + (2 if self.tiny else repeats)):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if index >= warm:
                times.append(time.perf_counter() - began)
        return median(times)

    def forget(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def made(name: str, size: int, strategy: str, device: torch.device, rank: int = 32) -> Sam:
    """Random weights in which every part matters: positions and adapters have left their zeros."""
    network = assemble(
        Backbone(name=name, weights=RANDOM), image_size=size, classes=2, strategy_name=strategy, lora=Lora(rank=rank), seed=0
    ).network
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "rel_pos" in key or "lora_B" in key or "biases" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return network.to(device)


def batch_of(slices: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images, and labels that depend on them."""
    images = torch.rand(slices, 1, size, size, generator=torch.Generator().manual_seed(0))
    return images.to(device), (images[:, 0] * 2.99).long().to(device)


def passes(network: Sam, options: Training, precision: str, depth: int) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    forward = partial(network, depth=depth)
    return lambda batch: backward(forward, batch, network.pixel_mean.device, options, precision, options.batch_size)


def gradients(network: Sam) -> dict[str, Tensor]:
    return {name: p.grad.double().cpu() for name, p in travelling(network).items() if p.grad is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to the norm of the wanted ones."""
    difference = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (difference / sum(float(tensor.square().sum()) for tensor in wanted.values())) ** 0.5


# --- sections -----------------------------------------------------------------------------------------------------------


def machine(check: Check) -> None:
    """The card's own ceilings."""
    side = 256 if check.tiny else 8192
    ceilings = {}
    for name in ("bf16", "tf32", "fp32"):
        kind, precision = (torch.bfloat16 if name == "bf16" else torch.float32), name
        set_up_torch(check.found["threads"], deterministic=True, precision=precision)
        a, b = (torch.randn(side, side, device=check.device, dtype=kind) for _ in range(2))
        ceilings[name] = round(2 * side**3 / check.timed(partial(torch.mm, a, b)) / 1e12, 1)
    set_up_torch(check.found["threads"], deterministic=True)
    check.found["TFLOP/s"] = ceilings
    check.verdict("products of 8192³, TFLOP/s", None, ceilings)


def rules(check: Check) -> None:
    """A step of every strategy on every family: no exception, and the gradients of a CPU."""
    few = ("full", "flap", "flap-volume")
    plan = {("sam-tiny-1", 96): STRATEGIES, ("lite-medsam", 56): few, ("sam2.1-tiny", 96): few}
    options = Training(window=3, batch_size=2)
    for (name, size), strategies in {("sam-tiny-1", 64): few}.items() if check.tiny else plan.items():
        for strategy in strategies:
            batch = batch_of(6, size, torch.device("cpu"))
            wanted = made(name, size, strategy, torch.device("cpu"), rank=4).train()
            passes(wanted, options, "fp32", 3)(batch)
            expected = gradients(wanted)
            for precision, most in (("fp32", 1e-3), ("bf16", 0.2)):
                what = f"{strategy} on {name}, {precision}"
                try:
                    network = made(name, size, strategy, check.device, rank=4).train()
                    moved = batch[0].to(check.device), batch[1].to(check.device)
                    work = passes(network, options, precision, 3)
                    with halved(network, precision):
                        work(moved)
                        off = distance(gradients(network), expected)
                        if check.cuda:
                            replay = captured(work, [moved], list(travelling(network).values()))
                            replay(moved)
                            again = distance(gradients(network), expected)
                            good = replay is not work and abs(again - off) < 1e-4
                            check.verdict(f"{what}, as a graph", good, f"{again:.1e}")
                    check.verdict(what, off < most, f"gradients differ by {off:.1e}")
                except Exception as error:
                    check.verdict(what, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def attention(check: Check) -> None:
    """Positions in the products against positions as a mask."""
    grids = (8,) if check.tiny else (14, 32, 64)
    for grid in grids:
        batch, heads, channels = (2 if grid > 32 else 12), 12, 64
        draw = partial(torch.randn, device=check.device)
        query, key, value = (draw(batch, heads, grid * grid, channels).to(torch.bfloat16).requires_grad_() for _ in range(3))
        along = [draw(grid, grid, channels).to(torch.bfloat16).requires_grad_() for _ in range(2)]
        exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value, *along)]

        def whole(given: list[Tensor], mix: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            mixed = mix(*given)
            return mixed.detach(), *torch.autograd.grad(mixed.sin().sum(), given)

        reference = whole(exact, vit.masked) if grid <= 32 else None
        for name, mix in (("masked", vit.masked), ("folded", vit.folded)):
            given = [query, key, value, *along]
            errors = None
            if reference:
                errors = [
                    float((found.double() - wanted).norm() / wanted.norm())
                    for found, wanted in zip(whole(given, mix), reference, strict=True)
                ]
                check.verdict(f"attention of {grid}² tokens, {name}", max(errors) < 0.1, f"largest error {max(errors):.1e}")
            check.forget()
            took = check.timed(partial(whole, given, mix))
            peak = round(torch.cuda.max_memory_allocated() / 2**20) if check.cuda else None
            check.row("attention", grid=grid, way=name, ms=round(1e3 * took, 2), peak_mib=peak)


@contextmanager
def unfolded() -> Iterator[None]:
    kept, vit.folded = vit.folded, vit.masked
    try:
        yield
    finally:
        vit.folded = kept


def steps(check: Check) -> None:
    """Training steps of slices that lie on the device already: how near the floor."""
    name, size = check.big
    plan = [(name, size, "flap", 12)]
    if not check.tiny:
        plan += [(name, size, "flap", 64), (name, size, "full", 12)]
        plan += [("sam-vit-h", 224, "flap", 12), ("sam-vit-b", 512, "flap", 12), ("lite-medsam", 256, "flap", 12)]
    ceiling = check.found.get("TFLOP/s", {}).get("bf16")
    for number, (name, size, strategy, slices) in enumerate(plan):
        network = made(name, size, strategy, check.device).train()
        variants: dict[str, tuple[str, bool, bool]] = {"bf16, graph": ("bf16", True, True), "bf16": ("bf16", False, True)}
        if number == 0:
            variants |= {
                "bf16, graph, weights not halved": ("bf16", True, False),
                "bf16, graph, masked": ("bf16", True, True),
            }
            variants |= {"fp32, graph": ("fp32", True, False), "tf32, graph": ("tf32", True, False)}
        if check.tiny:
            # Processors without bfloat16 take seven times as long in it.
            variants = {"fp32": ("fp32", False, True), "tf32, masked": ("tf32", False, True)}
        for variant, (precision, graph, half) in variants.items():
            options = Training(window=1, batch_size=slices)
            set_up_torch(check.found["threads"], deterministic=True, precision=precision)
            batch = batch_of(slices, size, check.device)
            learner = Learner(network, options)
            work = passes(network, options, precision, 1)
            check.forget()
            with halved(network, precision if half else "fp32"), unfolded() if "masked" in variant else nullcontext():
                once = captured(work, [batch], list(learner.parameters.values())) if graph and check.cuda else work

                def step(once: Any = once, learner: Learner = learner, batch: Any = batch) -> None:
                    learner.optimizer.zero_grad(set_to_none=True)
                    once(batch)
                    learner.optimizer.step()

                took = check.timed(step)
                began = time.perf_counter()
                step()
                host = time.perf_counter() - began
                check.wait()
            flops = GIGA.get((name, size, strategy))
            rate = flops * slices / took / 1e3 if flops else None
            dense = DENSE.get(check.found["device"].get("gpu", ""))
            check.row(
                "steps",
                backbone=name,
                size=size,
                strategy=strategy,
                slices=slices,
                variant=variant,
                ms=round(1e3 * took, 2),
                host_ms=round(1e3 * host, 2),
                slices_per_s=round(slices / took),
                tflops=round(rate, 1) if rate else None,
                of_data_sheet=round(rate / dense, 3) if rate and dense else None,
                of_products=round(rate / ceiling, 3) if rate and ceiling else None,
                peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if check.cuda else None,
            )
        network.zero_grad(set_to_none=True)
    first = check.found["steps"][0]
    if check.cuda and first["of_data_sheet"]:
        check.verdict("a step of ViT-B at 224 px, bf16, takes 25 % of the dense rate", first["of_data_sheet"] >= 0.25, first)
    set_up_torch(check.found["threads"], deterministic=True)


def written_case(folder: Path, side: int, slices: int, name: str = "case") -> PreparedCase:
    """An unpacked case with smooth random values."""
    rng = np.random.default_rng(side)
    coarse = rng.normal(0, 300, (slices, side // 8, side // 8)).repeat(8, 1).repeat(8, 2)
    images = (coarse + rng.normal(0, 20, coarse.shape)).astype(np.int16)
    labels = (images > 200).astype(np.int8) + (images > 400).astype(np.int8)
    np.save(folder / f"{name}.image.npy", images)
    np.save(folder / f"{name}.label.npy", labels)
    return PreparedCase(
        name=name,
        site="site",
        annotated=frozenset({1, 2}),
        slices=slices,
        occupied=frozenset(range(slices)),
        ranges=tuple(ranges_of(images)),
        ceiling=None,
        folder=folder,
    )


def fitting(check: Check) -> None:
    """The real fit with its samples: does the network wait?"""
    name, size = check.big
    for side in (96,) if check.tiny else (256, 512):
        with tempfile.TemporaryDirectory() as folder:
            number, slices, epochs = (1, 12, 1) if check.tiny else (5, 96, 4)
            cases = [written_case(Path(folder), side, slices, f"case {index}") for index in range(number)]
            network = made(name, size, "flap", check.device)
            precision = "fp32" if check.tiny else "bf16"
            plan: list[tuple[Any, int, int]] = [
                ("gentle", 12, 1),
                ("gentle", 12, 2),
                ("gentle", 12, 4),
                ("none", 12, 2),
                ("gentle", 48, 2),
            ]
            for augment, batch, loaders in plan:
                options = Training(window=1, batch_size=batch, augment=augment, epochs=epochs)
                samples = Samples(channels="adjacent")
                learner = Learner(network, options)
                set_up_torch(check.found["threads"], deterministic=True, precision=precision)
                report = fit(network, learner, cases, samples, seed=1, precision=precision, loaders=loaders)
                check.row(
                    "fitting",
                    side=side,
                    augment=augment,
                    batch=batch,
                    loaders=loaders,
                    slices_per_s=round(report.slices / report.seconds),
                    seconds=round(report.seconds, 2),
                    waiting=round(report.waiting / report.seconds, 2),
                )
    rows = [row for row in check.found["fitting"] if row["side"] == (96 if check.tiny else 256) and row["batch"] == 12]
    best = max(row["slices_per_s"] for row in rows if row["augment"] == "gentle")
    check.verdict("fit from 256² volumes, slices a second", best >= 1000 if check.cuda else None, best)
    set_up_torch(check.found["threads"], deterministic=True)


def predicting(check: Check) -> None:
    """A volume's prediction."""
    name, size = check.big
    network = fuse(made(name, size, "flap", check.device))
    rng = np.random.default_rng(0)
    for side in (64,) if check.tiny else (256, 512):
        slices = 16 if check.tiny else 384
        array = rng.integers(-1000, 1000, (side, side, slices)).astype(np.int16)
        volume = Volume(np.asfortranarray(array), np.diag([1.0, 1.0, 3.0, 1.0]))
        samples = Samples(size=size, axis="axial", channels="adjacent")
        precision = usual_precision(check.device)
        took = check.timed(partial(predict_volume, network, volume, samples, precision=precision), repeats=3, warm=1)
        check.row("predicting", side=side, slices=slices, precision=precision, slices_per_s=round(slices / took))
    rate = check.found["predicting"][0]["slices_per_s"]
    check.verdict("prediction of 256² volumes, slices a second", rate >= 3000 if check.cuda else None, rate)


def repeats(check: Check) -> None:
    """Twice the same bits: a fit, and whole simulations, one of them interrupted and resumed."""
    name, size = check.big
    with tempfile.TemporaryDirectory() as folder:
        cases = [written_case(Path(folder), 96, 12 if check.tiny else 60, f"case {n}") for n in range(2)]
        for precision in ("fp32",) if check.tiny else ("fp32", "bf16"):
            ends = []
            for loaders in (1, 4):
                network = made(name, size, "flap", check.device)
                learner = Learner(network, Training(window=1, batch_size=12, augment="gentle", epochs=2))
                fit(network, learner, cases, Samples(channels="adjacent"), seed=3, precision=precision, loaders=loaders)
                ends.append({key: p.detach().cpu() for key, p in travelling(network).items()})
            same = all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
            check.verdict(f"two fits of {name} have the same bits, {precision}", same)
    with tempfile.TemporaryDirectory() as folder:
        make_phantom(Path(folder) / "sites", sites=2, cases=3, seed=0)
        precision = "fp32" if check.tiny else "bf16"
        first, second = (simulated(check, Path(folder), output, precision) for output in "ab")
        check.verdict(f"two simulations have the same bits, {precision}", first == second, first)
        third = simulated(check, Path(folder), "c", precision, observer=Stop(), resumed=True)
        check.verdict(f"a resumed one has the same bits, {precision}", first == third)
        if check.cuda:
            fourth = simulated(check, Path(folder), "workers", precision, workers=2)
            check.verdict("two workers on one GPU: the same bits", fourth == first)


class Stop(Observer):
    """Interrupts a run after its first round."""

    def event(self, event: Any) -> None:
        if type(event).__name__ == "RoundClosed":
            raise KeyboardInterrupt


def run_config(check: Check, folder: Path, output: str, precision: str, rounds: int = 2, device: str = "") -> RunConfig:
    tree = {
        "data": {"path": str(folder / "sites"), "labels": {"kidney": 1, "tumour": 2}},
        "samples": {"size": 64 if check.tiny else 128, "clip": [-150, 300]},
        "training": {"batch_size": 8, "warmup_steps": 20, "foreground_weight": 2},
        "rounds": {"count": rounds, "validate_every": max(rounds // 2, 1)},
        "device": device or str(check.device),
        "precision": precision,
        "threads": check.found["threads"],
        "output": str(folder / output),
    }
    return validated(tree, RunConfig, "gpu.py")


def simulated(
    check: Check,
    folder: Path,
    output: str,
    precision: str,
    *,
    observer: Observer | None = None,
    resumed: bool = False,
    workers: int = 1,
) -> str:
    """Simulate, and return the checksum of the adapter."""
    config = run_config(check, folder, output, precision)
    try:
        simulate(config, observer=observer, workers=workers)
    except KeyboardInterrupt:
        assert resumed
    if resumed:
        simulate(config, resume=True)
    return hashlib.sha256((config.output / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()[:16]


def learning(check: Check) -> None:
    """Does half precision learn as well? The backbone that ships, on phantoms; then its label maps in each precision."""
    import flapsam

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_phantom(folder / "sites", sites=2 if check.tiny else 4, cases=3 if check.tiny else 8, seed=0)
        dices = {}
        precisions: tuple[Any, ...] = ("fp32",) if check.tiny else ("fp32", "bf16")
        for precision in precisions:
            began = time.perf_counter()
            config = run_config(check, folder, precision, precision, rounds=1 if check.tiny else 8)
            results = simulate(config)
            dices[precision] = round(results.summaries()["federated"]["pooled"].mean_dice or 0.0, 3)
            check.row("learning", precision=precision, dice=dices[precision], seconds=round(time.perf_counter() - began))
        gap = dices[precisions[-1]] - dices["fp32"]
        check.verdict("Dice of bf16 is within 0.03 of that of fp32", abs(gap) < 0.03, f"{gap:+.3f}")
        image = read_image(next((folder / "sites" / "site_01" / "images").glob("*.nii.gz")))
        wanted = flapsam.load(folder / "fp32", device="cpu", precision="fp32").predict(image.array, image.affine)
        halves: tuple[Any, ...] = ("bf16", "fp16") if check.cuda else ("bf16",)
        for precision in ("fp32", *halves):
            model = flapsam.load(folder / "fp32", device=str(check.device), precision=precision)
            same = float((model.predict(image.array, image.affine) == wanted).mean())
            check.verdict(f"label map, {precision}", same > 0.995, f"{same:.4%} of the voxels as on a CPU")


def memory_estimates(check: Check) -> None:
    """What ``flapsam memory`` says against the peak of a real step."""
    name, size = check.big
    plan = [(name, size, 4)] if check.tiny else [("sam-vit-b", 224, 32), ("sam-vit-b", 512, 8), ("sam-vit-h", 224, 16)]
    for name, size, slices in plan:
        network = made(name, size, "flap", check.device)
        for precision in ("fp32", "bf16"):
            options = Training(window=1, batch_size=512)
            check.forget()
            constant, a_slice = memory._line(network, options, precision)
            predicted = memory.learned_bytes(network) + constant + a_slice * slices
            learner = Learner(network, options)
            before = torch.cuda.memory_allocated() if check.cuda else 0
            check.forget()
            passes(network, options, precision, 1)(batch_of(slices, size, check.device))
            learner.optimizer.step()
            peak = torch.cuda.max_memory_allocated() - before if check.cuda else predicted
            network.zero_grad(set_to_none=True)
            mib, share = [predicted >> 20, peak >> 20], predicted / peak
            check.row("memory", backbone=name, size=size, precision=precision, slices=slices, mib=mib)
            check.verdict(f"memory of {slices} slices, {name} {size} px, {precision}", 0.9 < share < 1.4, f"{share:.2f}")


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    device = found["device"]
    card = device.get("gpu", "a CPU")
    about = f"torch {found['packages']['torch']}, transformers {found['packages']['transformers']}"
    if "driver" in device:
        about += f", CUDA {device['cuda']}, driver {device['driver']}"
    lines = [f"# The GPU check on {card}", "", f"Measured by `benchmarks/gpu.py` with {about}.", ""]
    if "TFLOP/s" in found:
        lines += ["Products of 8192³: " + ", ".join(f"{kind} {rate} TFLOP/s" for kind, rate in found["TFLOP/s"].items()), ""]
    for section in ("steps", "fitting", "predicting", "attention", "memory", "learning"):
        lines += [f"## {section}", ""]
        rows = found.get(section)
        if not rows:
            lines += ["Not measured.", ""]
            continue
        columns = list(rows[0])
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
        lines.append("")
    words = [word for _, word, _ in found["verdicts"]]
    lines += ["## Verdicts", "", f"{words.count('PASS')} passed, {words.count('FAIL')} failed.", ""]
    lines += [f"- {word}: {what}{_after(figures)}" for what, word, figures in found["verdicts"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "–" if value is None else " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def _after(figures: str) -> str:
    return f" ({figures})" if figures and not figures.startswith("{") else ""


SECTIONS = (machine, steps, fitting, predicting, attention, rules, repeats, memory_estimates, learning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", default="", help="names of sections, separated by commas")
    parser.add_argument("--minutes", type=float, default=7, help="minutes after which no further section begins")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu")
    given = parser.parse_args()
    device = find_device("cpu" if given.tiny else given.device)
    check = Check(device, given.tiny)
    about = environment()
    check.found |= {"threads": 1 if given.tiny else default_threads(), "device": describe_device(str(device))}
    check.found |= {key: about[key] for key in ("flapsam", "python", "cores", "packages")}
    set_up_torch(check.found["threads"], deterministic=True)
    print(check.found["device"], flush=True)
    started = time.perf_counter()
    given.out.mkdir(parents=True, exist_ok=True)
    for section in SECTIONS:
        began = time.perf_counter()
        if given.only and section.__name__ not in given.only.split(","):
            continue
        if began - started > 60 * given.minutes:
            check.verdict(section.__name__, None, "left out, because the time is over")
            continue
        print(f"\n== {section.__name__} ({began - started:.0f} s)", flush=True)
        try:
            section(check)
        except Exception as error:
            traceback.print_exc()
            check.verdict(section.__name__, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        check.forget()
        check.found.setdefault("seconds", {})[section.__name__] = round(time.perf_counter() - began, 1)
        # An interrupted check leaves what it has found so far.
        (given.out / "gpu.json").write_text(json.dumps({**check.found, "verdicts": check.verdicts}, indent=1) + "\n")
        (given.out / "gpu.md").write_text(table(json.loads((given.out / "gpu.json").read_text())))
    for what, word, figures in check.verdicts:
        if word != "PASS":
            print(f"{word}  {what}: {figures}")
    words = [word for _, word, _ in check.verdicts]
    print(f"{words.count('PASS')} passed, {words.count('FAIL')} failed, {time.perf_counter() - started:.0f} s")
    sys.exit(1 if "FAIL" in words else 0)


if __name__ == "__main__":
    main()
