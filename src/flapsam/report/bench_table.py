"""Tables of a bench: for the terminal, and as Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from flapsam.base.escaping import csv_cell, markdown
from flapsam.base.files import write_text
from flapsam.experiments.bench import Bench, RowSummary
from flapsam.learning.metrics import MEASURES
from flapsam.report.measured import EARLIER
from flapsam.report.tables import as_text
from flapsam.report.units import NONE, between, interval, number, p_value

MISSING = "missing"


def write_tables(bench: Bench) -> None:
    """Write ``bench.md``, ``bench.csv`` and ``bench.json`` into the bench's folder."""
    rows = bench.rows
    parts = [_markdown(_main(rows, bench.classes))]
    if any(row.sites for row in rows):
        parts.append(_markdown(_sites(rows)))
    measured = [row for row in rows if row.measures]
    if measured:
        parts.append(_markdown([_measures(row, bench.classes) for row in measured]))
    if any(row.done and not row.counts_missed for row in rows):
        parts.append(EARLIER)
    rules = dict.fromkeys(row.absent for row in rows if row.done)
    parts += [
        f"{rule} The column `cases` counts the cases of all seeds, and those with a Dice for a class." for rule in rules
    ]
    if any(row.p is not None for row in rows):
        parts.append(
            "The column `p (Holm)` is Wilcoxon's signed-rank test of the difference from the first row, over patients, "
            "corrected for the number of rows. Intervals are not corrected."
        )
    write_text(bench.folder / "bench.md", "\n\n".join(parts) + "\n")
    write_text(bench.folder / "bench.csv", _csv(_main(rows, bench.classes)))
    write_text(bench.folder / "bench.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def bench_table(bench: Bench) -> Table:
    """A short table for the terminal."""
    shown = ("", "seeds", "Dice", "gain over local", "difference to the first", "seconds")
    table = Table()
    rows = _main(bench.rows, bench.classes)
    for column in shown:
        table.add_column(column, justify="right" if column else "left", min_width=0 if column else 24)
    for row in rows:
        table.add_row(*(as_text(row[column]) for column in shown))
    return table


def _main(rows: Sequence[RowSummary], classes: Sequence[str]) -> list[dict[str, str]]:
    """One line per row of the bench, as column → text."""
    return [_line(row, classes) for row in rows]


def _line(row: RowSummary, classes: Sequence[str]) -> dict[str, str]:
    def if_done(text: str) -> str:
        return text if row.done else MISSING

    return {
        "": row.row.name,
        "seeds": if_done(f"{row.done}" if row.done == row.planned else f"{row.done} of {row.planned}"),
        "cases": if_done(_cases(row)),
        **{name: if_done(number(row.dice.get(name))) for name in classes},
        "Dice": if_done(number(row.mean_dice)),
        "95 %": if_done(between(row.mean) or NONE),
        **{f"HD95 {name} (mm)": if_done(number(row.hd95.get(name), 1)) for name in classes},
        "gain over local": if_done(interval(row.gain)),
        "difference to the first": if_done(interval(row.difference)),
        "p (Holm)": p_value(row.p),
        "worst site": if_done(_worst(row)),
        "unseen site": number(row.unseen_dice),
        "parameters": NONE if row.parameters is None else f"{row.parameters:,}",
        "MiB up": if_done(_mib(row.bytes_up)),
        "MiB down": if_done(_mib(row.bytes_down)),
        "MiB to 95 %": if_done(_mib(row.bytes_95)),
        "seconds": if_done(number(row.seconds, 0)),
        "peak GiB": if_done(number(row.peak_bytes / 2**30 if row.peak_bytes else None, 2)),
    }


def _cases(row: RowSummary) -> str:
    """Number of scored cases over all seeds, and of those with a Dice for a class that some have not."""
    fewer = [f"{name} {count}" for name, count in row.dice_cases.items() if count != row.cases]
    return f"{row.cases} ({', '.join(fewer)})" if fewer else str(row.cases)


def _worst(row: RowSummary) -> str:
    """The site with the lowest Dice, its Dice, and how much that is below the best."""
    if row.spread is None:
        return NONE
    return f"{row.spread.worst} {number(row.spread.worst_dice)} (−{number(row.spread.gap)})"


def _measures(row: RowSummary, classes: Sequence[str]) -> dict[str, str]:
    """A line with the measures other than Dice and HD95, and how often a class was missed."""
    line = {"all measures": row.row.name}
    for name in classes:
        for measure, values in row.measures.items():
            line[f"{MEASURES[measure].head}, {name}"] = number(values.get(name), MEASURES[measure].digits)
        for what, counts in (("missed", row.missed), ("spurious", row.spurious)):
            line[f"{what}, {name}"] = str(counts[name]) if row.counts_missed else NONE
    return line


def _sites(rows: Sequence[RowSummary]) -> list[dict[str, str]]:
    """Lines with mean Dice by site: one per row of the bench, then one per row with sites left out of training."""
    sites = sorted({site for row in rows for site in (*row.sites, *row.unseen)})
    lines = [
        {"Dice by site": row.row.name, **{site: number(row.sites.get(site)) if row.done else MISSING for site in sites}}
        for row in rows
        if row.planned
    ]
    return lines + [
        {
            "Dice by site": f"{row.row.name}, each without the site",
            **{site: number(row.unseen[site]) if site in row.unseen else MISSING for site in sites},
        }
        for row in rows
        if row.unseen
    ]


def _mib(count: float | None) -> str:
    return f"{count / 2**20:.2f}" if count else NONE


def _markdown(lines: Sequence[dict[str, str]]) -> str:
    columns = list(lines[0])
    rows = [f"| {' | '.join(map(markdown, cells))} |" for cells in (columns, *(line.values() for line in lines))]
    return "\n".join([rows[0], "|---" + "|---:" * (len(columns) - 1) + "|", *rows[1:]])


def _csv(lines: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(map(csv_cell, lines[0]))
    # Only the first column holds names. The others hold numbers, some with a sign and an interval.
    writer.writerows([csv_cell(name), *values] for name, *values in (line.values() for line in lines))
    return text.getvalue()
