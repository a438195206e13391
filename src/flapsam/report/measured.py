"""All measures of a set of scores, as rows of text for the terminal and for the report."""

from collections.abc import Mapping, Sequence

from flapsam.learning.metrics import MEASURES, Spread, Summary
from flapsam.report.units import NONE, number, with_interval


def measure_rows(modes: Mapping[str, Summary]) -> list[list[str]]:
    """A head, and one row per mode and class, region or mean.

    Args:
        modes: mode → means over its cases. Measures that no mode has get no column.
    """
    shown = [name for name in MEASURES if any(name in summary.measures for summary in modes.values())]
    head = ["mode", "class", "cases", *(MEASURES[name].head for name in shown), "missed", "spurious"]
    rows = []
    for mode, summary in modes.items():
        for name, mean in summary.measures["dice"].items():
            means = {measure: summary.measures.get(measure, {}).get(name) for measure in shown}
            cells = [with_interval(means[one], MEASURES[one].digits, mean.cases if mean else 0) for one in shown]
            known = summary.outcomes[name]
            counts = [str(count[name]) if known else NONE for count in (summary.missed, summary.spurious)]
            rows.append([mode, name, str(mean.cases if mean else 0), *cells, *counts])
        named = {**summary.means, **({"mean": summary.mean} if len(summary.dice) > 1 else {})}
        for name, mean in named.items():
            rest = [NONE] * (len(shown) + 1)
            rows.append([mode, name, str(mean.cases if mean else 0), with_interval(mean), *rest])
    return [head, *rows]


def rules(summaries: Sequence[Summary]) -> list[str]:
    """Sentences that say what the columns are, as far as it is not plain."""
    shown = [name for name in MEASURES if any(name in summary.measures for summary in summaries)]
    told = [f"{MEASURES[name].title[0].upper()}{MEASURES[name].title[1:]}: {MEASURES[name].text}." for name in shown]
    unknown = any(summary.cases and not any(summary.outcomes.values()) for summary in summaries)
    if unknown:
        told.append("These scores are from an earlier version, which left missed structures out of the mean distance.")
    return [
        *told,
        "Missed: in the truth alone. Spurious: in the prediction alone. In brackets are 95 % intervals of the mean, from "
        "Student's t over patients.",
    ]


def worst_site(spread: Spread | None) -> str:
    """A sentence about the best and the worst site; empty if there are fewer than two."""
    if spread is None:
        return ""
    best, worst = number(spread.best_dice), number(spread.worst_dice)
    return f"Worst site: {spread.worst} with {worst}, {number(spread.gap)} below the best, {spread.best} with {best}."
