"""Test scores that hospitals have told, as rows of text for the terminal and for the report."""

from collections.abc import Iterable, Sequence
from typing import Any

from flapsam.federation.hospitals.aggregates import interval_of, pooled_dice
from flapsam.learning.metrics import MEASURES, Spread, spread_of
from flapsam.report.measured import worst_site
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, with_interval
from flapsam.run.ledger import Event, SiteTested
from flapsam.run.site_scores import Figures, SiteScores

FEWER = "few"
"""What stands for a number of cases that is too small to be told."""


def by_round(events: Iterable[Event]) -> dict[int, dict[str, SiteScores | None]]:
    """Round → site → what the site has told of its test cases, for the rounds that were tested."""
    tested: dict[int, dict[str, SiteScores | None]] = {}
    for event in events:
        if isinstance(event, SiteTested):
            tested.setdefault(event.round, {})[event.site] = event.scores
    return {number: dict(sorted(sites.items())) for number, sites in sorted(tested.items())}


def name_of(adapters: Sequence[str], place: int) -> str:
    """The name of the adapter that was tested in this round of an evaluation, or its number."""
    return adapters[place - 1] if place <= len(adapters) else str(place)


def mean_dices(sites: dict[str, SiteScores | None]) -> dict[str, Figures | None]:
    """Site → figures of its mean Dice."""
    return {site: scores.mean if scores else None for site, scores in sites.items()}


def spread_between(sites: dict[str, SiteScores | None]) -> Spread | None:
    """The best and the worst of the sites that have told their Dice."""
    return spread_of({site: mean.mean if mean else None for site, mean in mean_dices(sites).items()})


def site_rows(events: Sequence[Event], adapters: Sequence[str] = ()) -> list[list[str]]:
    """A head, and a row per adapter, site and class, region or mean. Empty if no site was asked to test.

    Args:
        events: the ledger of a run between hospitals.
        adapters: names of the adapters that an evaluation compares. In other runs, only the result is tested.
    """
    tested = by_round(events)
    told = [scores for sites in tested.values() for scores in sites.values() if scores]
    shown = [name for name in MEASURES if any(name in scores.measures for scores in told)] or ["dice"]
    several = len(tested) > 1
    head = ["site", "class", "patients", "missed", "spurious", *(MEASURES[name].head for name in shown)]
    rows: list[list[str]] = []
    for place, sites in tested.items():
        name = name_of(adapters, place)
        for row in _rows_of(sites, shown):
            rows.append([name, *row] if several else row)
    return [["adapter", *head] if several else head, *rows] if tested else []


def difference_rows(events: Sequence[Event], adapters: Sequence[str] = ()) -> list[list[str]]:
    """A head, and a row per adapter and site with its difference from the first adapter. Empty if there is one adapter."""
    tested = by_round(events)
    rows = []
    for place, sites in tested.items():
        for site, scores in sites.items():
            if scores and (change := scores.difference):
                mean = interval_of(change, lowest=-1.0)
                between = NONE if mean.low is None or mean.high is None else f"{mean.low:+.3f} to {mean.high:+.3f}"
                rows.append([name_of(adapters, place), site, str(change.patients), f"{change.mean:+.3f}", between])
    return [["adapter", "site", "patients", "mean Dice, difference from the first", "95 %"], *rows] if rows else []


def about(events: Sequence[Event]) -> str:
    """Sentences about the rows, with the worst site."""
    tested = by_round(events)
    last = next(reversed(tested.values()), {})
    silent = [site for site, scores in last.items() if scores is None]
    few = any(
        count is None for scores in last.values() if scores for count in (*scores.missed.values(), *scores.spurious.values())
    )
    sentences = [
        "The sites scored their own test cases. Only figures over patients left them, with rounded numbers of patients, and "
        "none over fewer patients than the site's min_test_patients. In brackets are 95 % intervals over patients.",
        worst_site(spread_between(last)),
        f"No scores were told by {', '.join(silent)}." if silent else "",
        f"“{FEWER}” stands for a number of patients that is too small to be told." if few else "",
    ]
    return " ".join(filter(None, sentences))


def site_tests(events: Sequence[Event], adapters: Sequence[str] = ()) -> Section | None:
    """The section of a run's page; None if no site was asked to test.

    Args:
        events: the ledger of a run between hospitals.
        adapters: names of the adapters that an evaluation compares.
    """
    rows = site_rows(events, adapters)
    if not rows:
        return None
    several = rows[0][0] == "adapter"
    tables = [Table("site-tests", "Test scores by site", rows[0], rows[1:], 2 + several, opened=True)]
    differences = difference_rows(events, adapters)
    if differences:
        caption = "Differences between adapters on the same cases"
        tables.append(Table("site-differences", caption, differences[0], differences[1:], 2, opened=True))
    return Section("site-tests-section", "Test scores at the sites", about(events), tables=tables)


def _rows_of(sites: dict[str, SiteScores | None], shown: Sequence[str]) -> Iterable[list[str]]:
    for site, scores in sites.items():
        if scores is None:
            yield [site, *[NONE] * (len(shown) + 4)]
            continue
        for name, dice in scores.measures.get("dice", {}).items():
            cells = [_cell(scores.measures.get(measure, {}).get(name), measure) for measure in shown]
            counts = [_count(of, name) for of in (scores.missed, scores.spurious)]
            yield [site, name, str(dice.patients), *counts, *cells]
        for name, figures in {**scores.means, "mean": scores.mean}.items():
            if figures:
                yield [site, name, str(figures.patients), NONE, NONE, _cell(figures), *[NONE] * (len(shown) - 1)]
    whole = pooled_dice(mean_dices(sites))
    if whole and len(sites) > 1:
        yield ["all that told", "mean", str(whole.patients), NONE, NONE, with_interval(whole), *[NONE] * (len(shown) - 1)]


def _cell(figures: Figures | None, measure: str = "dice") -> str:
    if figures is None:
        return NONE
    return with_interval(interval_of(figures, MEASURES[measure].highest), MEASURES[measure].digits)


def _count(counts: dict[str, Any], name: str) -> str:
    if name not in counts:
        return NONE
    return FEWER if counts[name] is None else str(counts[name])
