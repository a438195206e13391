"""Traffic against Dice: strategies, codecs, aggregators and ranks on the hippocampus, and packets of ViT-B.

    flapsam bench communication --data DATA --set output=benchmarks/results/communication
    python benchmarks/communication.py

The first command computes the missing cells in ``results/communication/cells`` (about six minutes each on one core). The
second writes ``tables.md`` and ``communication.png`` next to them. Bytes are those that the ledger counted, for one site in
all rounds, up and down. The bytes of ViT-B are those of packets with the names and shapes of its tensors and synthetic
numbers.
"""

from collections.abc import Mapping
from pathlib import Path

from cells import HERE
from matplotlib.figure import Figure

from flapsam.base.files import write_text, written_whole
from flapsam.experiments.bench import Bench, Cell, Row, RowSummary, cells_of, read_bench
from flapsam.experiments.settings import read_settings
from flapsam.federation.traffic import RunTraffic, predict_traffic, strategy_table
from flapsam.run.config import RunConfig
from flapsam.run.reading import changed

RESULTS = HERE / "results" / "communication"
MIB = 2**20
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
PAPER_DICE = {"decoder": 50.7, "partial-decoder": 45.4, "lora": 36.9, "lora-decoder": 59.8, "flap": 60.5}
"""Dice on Fed-KiTS19 after 25 rounds, in percent (arXiv 2407.21739, Figure 1)."""
VIT_B = {
    "fp32": {"aggregator": "flexlora", "compression.codec": "fp32"},
    "bf16": {"compression.codec": "bf16"},
    "int8": {"compression.codec": "int8"},
    "int4": {"compression.codec": "int4"},
    "topk-int4, a fifth of the numbers": {"compression.codec": "topk-int4", "compression.density": 0.2},
    "3 bits": {"compression.bits": 3},
    "2 bits": {"compression.bits": 2},
    "1.5 bits, the default": {},
    "1.25 bits": {"compression.bits": 1.25},
    "1 bit": {"compression.bits": 1},
    "1.5 bits, ffa-lora": {"aggregator": "ffa-lora"},
    "1.5 bits, rolora": {"aggregator": "rolora"},
    "1.5 bits, rank 16": {"lora.rank": 16},
    "1.5 bits, rank 8": {"lora.rank": 8},
    "1.5 bits, rank 4": {"lora.rank": 4},
    "1.5 bits, half the rounds": {"rounds.count": 50},
    "1.5 bits, lora-decoder": {"strategy": "lora-decoder"},
    "1.5 bits, full": {"strategy": "full"},
}
"""Name → fields changed in a run of ``flap`` with ViT-B, rank 32, 224 pixels, 2 classes, 100 rounds, preset ``fast``."""


def vit_b() -> dict[str, RunTraffic]:
    """Predicted traffic of each run in ``VIT_B``."""
    data = {"path": "unread", "labels": {"kidney": 1, "tumour": 2}}
    # Where the paper has them, so that the numbers compare with its own.
    lora = {"projections": ["q", "v"]}
    run = RunConfig.model_validate({"data": data, "backbone": {"name": "sam-vit-b"}, "lora": lora, "rounds": {"count": 100}})
    return {name: predict_traffic(changed(run, changes))[0] for name, changes in VIT_B.items()}


def predictions(cells: dict[Cell, RunConfig]) -> dict[Row, RunTraffic]:
    """Row of the hippocampus → the traffic that ``flapsam traffic`` predicts."""
    # The cells of a row differ only in their seeds, so the first is enough.
    configs = {cell.row: config for cell, config in reversed(cells.items())}
    return {row: predict_traffic(config)[0] for row, config in configs.items()}


def hippocampus_table(bench: Bench, predicted: Mapping[Row, RunTraffic]) -> list[str]:
    rows = bench.rows
    flap = next(2 * traffic.rounds * 4 * traffic.parameters for row, traffic in predicted.items() if row == rows[0].row)
    lines = [
        "| | seeds | Dice | difference to the first (95 %) | MiB | "
        f"× fewer than `flap` as fp32 ({flap / MIB:.1f} MiB) | × fewer than `full` | predicted |",
        "|---|" + "---:|" * 7,
    ]
    for row in rows:
        name = row.row.name.replace(", federated", "")
        if not row.done:
            lines.append(f"| {name} | – | missing | | | | | |")
            continue
        sent, traffic = total(row), predicted[row.row]
        deviation = (traffic.up + traffic.down) / sent - 1
        lines.append(
            f"| {name} | {row.done} | {row.mean_dice:.4f} | {difference(row)} | {sent / MIB:.2f} | {flap / sent:.1f} | "
            f"{traffic.full / sent:.0f} | {deviation:+.1%} |"
        )
    return lines


def total(row: RowSummary) -> float:
    """Bytes of one site in all rounds, up and down."""
    return (row.bytes_up or 0.0) + (row.bytes_down or 0.0)


def difference(row: RowSummary) -> str:
    if row.difference is None:
        return "–"
    return f"{row.difference.mean:+.4f} ({row.difference.low:+.4f} to {row.difference.high:+.4f})"


def vit_b_table(runs: dict[str, RunTraffic]) -> list[str]:
    lines = [
        "| | parameters | KiB per round, up | KiB per round, down | MiB in 100 rounds | × fewer than `full` as fp32 |",
        "|---|" + "---:|" * 5,
    ]
    for name, run in runs.items():
        sides = [f"{side / run.rounds / 1024:,.0f}" for side in (run.up, run.down)]
        # Full fine-tuning always counts with 100 rounds, however many the run has.
        factor = run.full * 100 / run.rounds / (run.up + run.down)
        lines.append(
            f"| {name} | {run.parameters:,} | {sides[0]} | {sides[1]} | {(run.up + run.down) / MIB:,.1f} | {factor:,.0f} |"
        )
    return lines


def draw(bench: Bench, runs: dict[str, RunTraffic], path: Path) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [row for row in bench.rows if row.done]
    for number, row in enumerate(sorted(shown, key=total), start=1):
        colour = BLUE if row.row.strategy == "flap" else ORANGE
        name = ", ".join(part for part in row.row.name.split(", ") if part not in ("federated", "flap", "flexlora-aligned"))
        change = row.difference
        place = (total(row) / MIB, change.mean if change else 0.0)
        spread = [[place[1] - (change.low or 0)], [(change.high or 0) - place[1]]] if change else None
        left.errorbar(*place, yerr=spread, fmt="o", color=colour, elinewidth=0.8, label=f"{number}  {name or 'fp32'}")
        # Numbers alternate between the two sides, because many points have the same bytes.
        offset = (6, -3) if number % 2 else (-6, -3)
        align = "left" if number % 2 else "right"
        left.annotate(str(number), place, offset, textcoords="offset points", color=colour, fontsize=8, ha=align)
    left.set_title("sam-tiny-1 on the hippocampus, 8 rounds: measured", fontsize=10)
    left.set_xlabel("MiB of one site, up and down, all rounds")
    left.set_ylabel("difference of test Dice to fp32, by case (95 %)")
    left.legend(fontsize=7, frameon=False, loc="best")
    counts = {row.strategy: row for row in strategy_table("sam-vit-b")}
    for name, dice in PAPER_DICE.items():
        place = (counts[name].gib * 1024, dice)
        right.plot(*place, "s", color=BLUE if name == "flap" else GREY)
        right.annotate(counts[name].paper_name, place, (6, 4), textcoords="offset points", fontsize=8)
    default = runs["1.5 bits, the default"]
    right.axvline((default.up + default.down) / MIB, color=BLUE, linestyle="--")
    right.annotate(
        "FLAP-SAM in 1.5 bits,\nbytes of ViT-B's packets\n(its Dice is not known here)",
        ((default.up + default.down) / MIB, 52),
        (5, 0),
        textcoords="offset points",
        fontsize=8,
        color=BLUE,
    )
    right.axvline(counts["full"].gib * 1024, color=GREY, linestyle=":")
    right.annotate("FullFT", (counts["full"].gib * 1024, 38), (-34, 0), textcoords="offset points", fontsize=8)
    right.set_title("ViT-B, the paper's points: Fed-KiTS19, bytes by the formula, 100 rounds", fontsize=10)
    right.set_xlabel("MiB of one client, up and down, 100 rounds")
    right.set_ylabel("Dice (%)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Software": None})


def main() -> None:
    config = read_settings("communication", Path("unread"), [f"output={RESULTS}"])
    cells = cells_of(config)
    bench = read_bench(config, cells)
    runs = vit_b()
    lines = [
        "# Communication: tables",
        "",
        "Written by `python benchmarks/communication.py`. The script's docstring describes the measurements, and",
        "`../communication.md` discusses the results.",
        "",
        "## Hippocampus, `sam-tiny-1`, rank 16, 8 rounds: measured",
        "",
        "`predicted` is the deviation of the prediction by `flapsam traffic` from the measured bytes.",
        "",
        *hippocampus_table(bench, predictions(cells)),
        "",
        "## ViT-B, rank 32, 100 rounds",
        "",
        *vit_b_table(runs),
        "",
        "![Dice against bytes](communication.png)",
    ]
    write_text(RESULTS / "tables.md", "\n".join(lines) + "\n")
    draw(bench, runs, RESULTS / "communication.png")


if __name__ == "__main__":
    main()
