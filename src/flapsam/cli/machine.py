"""Commands about resources: ``traffic``, ``memory``, ``doctor``, ``pretrain``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from flapsam.cli.console import (
    Assignments,
    Device,
    Json,
    Quiet,
    Rank,
    Size,
    Threads,
    interruptible,
    out,
    print_json,
    say,
)

app = typer.Typer()

BackboneName = Annotated[str, typer.Option(help="A name from `flapsam backbone list`.")]


@app.command()
def traffic(
    config: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="Configuration of the run whose traffic to predict.")
    ] = None,
    assignments: Assignments = None,
    backbone: BackboneName = "sam-vit-b",
    size: Size = None,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes, without background.")] = 2,
    rank: Rank = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 100,
    as_json: Json = False,
) -> None:
    """Predict the traffic of a run. Without a run, show what each strategy trains and sends, uncompressed."""
    from dataclasses import asdict

    from flapsam.federation.traffic import predict_traffic, strategy_table
    from flapsam.report import tables

    if config is not None:
        from flapsam.run.reading import read_config

        predicted = predict_traffic(read_config(config, assignments or []))
        if as_json:
            return print_json([{**asdict(row), "ratio": row.ratio} for row in predicted])
        return out.print(tables.prediction_table(predicted))
    rows = strategy_table(backbone, image_size=size, classes=classes, rank=rank, rounds=rounds)
    if as_json:
        return print_json([asdict(row) for row in rows])
    say(f"{backbone}, {classes} classes, rank {rank}, {rounds} rounds, one site, both directions")
    out.print(tables.strategy_table(rows))


@app.command()
def memory(
    backbone: BackboneName = "sam-vit-b",
    size: Size = None,
    strategy: Annotated[str, typer.Option(help="Strategy that selects the parameters to train.")] = "flap",
    rank: Rank = 32,
    device: Device = "cpu",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of the network's arithmetic.")] = "fp32",
    as_json: Json = False,
) -> None:
    """Measure the memory of a training step by number of slices, with and without gradient checkpointing."""
    from dataclasses import asdict

    from flapsam.learning.memory import memory_table
    from flapsam.report import tables

    rows = memory_table(backbone, image_size=size, strategy=strategy, rank=rank, device=device, precision=precision)
    if as_json:
        return print_json([asdict(row) for row in rows])
    out.print(tables.memory_table(rows))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show this machine's software versions, devices, memory and disk space."""
    from flapsam.base.device import inspect_machine

    machine = inspect_machine()
    if as_json:
        return print_json(machine)
    for name, value in machine.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        say(f"{name.replace('_', ' '):>16}  {text or 'none'}")


@app.command()
def pretrain(
    folder: Annotated[Path, typer.Argument(help="Folder for weights, log and state.")],
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Number of scenes per step.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed for every random choice.")] = 0,
    backbone: Annotated[str, typer.Option(help="Backbone to train.")] = "sam-tiny",
    size: Annotated[int, typer.Option(min=1, help="Side of the scenes in pixels.")] = 128,
    teacher: Annotated[
        str, typer.Option(help="Backbone whose embeddings it learns, too, such as lite-medsam.", show_default=False)
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Train for 20 steps only, to check that it works.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last state in the folder.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a small backbone on synthetic images. docs/backbones.md says how the weights that ship were trained."""
    from flapsam.experiments.pretraining import Recipe
    from flapsam.experiments.pretraining import pretrain as run

    recipe = Recipe(steps=steps, batch=batch, seed=seed, backbone=backbone, size=size, teacher=teacher)
    if quick:
        recipe = replace(recipe, steps=20, batch=4, warmup=5)
    given = {"backbone": backbone, "size": size, "teacher": teacher}
    length = "--quick" if quick else f"--steps {steps} --batch {batch}"
    further = "".join(f" --{name} {value}" for name, value in given.items() if value != getattr(Recipe(), name))
    command = f"flapsam pretrain {length} --seed {seed}{further}"
    with interruptible(f"The last state is in {folder}; add --resume to continue.") as observer:
        scores = run(folder, recipe, command=command, threads=threads, resume=resume, observer=observer)
    if as_json:
        return print_json(scores)
    for task, value in scores.items():
        say(f"{task:>16}  held-out IoU {value:.3f}")
