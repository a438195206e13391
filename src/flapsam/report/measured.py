"""All measures of a set of scores, as rows of text for the terminal and for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flapsam.learning.metrics import MEASURES, Spread, Summary
from flapsam.report.units import NONE, number, with_interval

RULE = (
    "Where only one of the two label maps has a structure, it was missed or is spurious and counts with the worst value: 0, "
    "the image's diagonal as its distances, and a volume error of 1."
)
INTERVALS = "In brackets are 95 % intervals of the mean, from Student's t over patients."
EARLIER = "These scores are from an earlier version, which left missed structures out of the mean distance."


def measure_rows(modes: Mapping[str, Summary], *, intervals: bool = True) -> list[list[str]]:
    """A head, and one row per mode and class, region or mean.

    Args:
        modes: mode → means over its cases. Measures that no mode has get no column.
        intervals: whether every mean has its interval, or Dice alone.
    """
    shown = [name for name in MEASURES if any(name in summary.measures for summary in modes.values())]
    head = ["mode", "class", "cases", "missed", "spurious", *(MEASURES[name].head for name in shown)]
    rows = []
    for mode, summary in modes.items():
        for name, mean in summary.measures["dice"].items():
            known, cases = summary.outcomes[name], mean.cases if mean else 0
            counts = [str(count[name]) if known else NONE for count in (summary.missed, summary.spurious)]
            cells = []
            for measure in shown:
                one = summary.measures.get(measure, {}).get(name)
                if one and not intervals and measure != "dice":
                    one = replace(one, low=None, high=None)
                cells.append(with_interval(one, MEASURES[measure].digits, cases))
            rows.append([mode, name, str(cases), *counts, *cells])
        for name, mean in {**summary.means, **({"mean": summary.mean} if len(summary.dice) > 1 else {})}.items():
            rest = [with_interval(mean)] + [NONE] * (len(shown) - 1)
            rows.append([mode, name, str(mean.cases if mean else 0), NONE, NONE, *rest])
    return [head, *rows]


def rules(summaries: Sequence[Summary]) -> list[str]:
    """Sentences that say what the rows are, as far as it is not plain."""
    unknown = any(summary.cases and not any(summary.outcomes.values()) for summary in summaries)
    return [EARLIER if unknown else RULE, INTERVALS]


def worst_site(spread: Spread | None, mode: str = "") -> str:
    """A sentence about the best and the worst site; empty if there are fewer than two."""
    if spread is None:
        return ""
    best, worst = number(spread.best_dice), number(spread.worst_dice)
    what = f"Worst site, {mode}" if mode else "Worst site"
    return f"{what}: {spread.worst} with {worst}, {number(spread.gap)} below the best, {spread.best} with {best}."
