"""Test scores that hospitals have told, as rows of text for the terminal and for the report."""

from collections.abc import Iterable, Sequence
from typing import Any

from flapsam.federation.hospitals.aggregates import pooled_dice
from flapsam.learning.metrics import MEASURES, Spread, spread_of
from flapsam.report.measured import worst_site
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE, number, with_interval
from flapsam.run.ledger import Event, SiteTested
from flapsam.run.site_scores import Figures, SiteScores

FEWER = "few"
"""What stands for a number of cases that is too small to be told."""


def latest(events: Iterable[Event]) -> dict[int, dict[str, SiteScores | None]]:
    """Round → site → what the site has told of its test cases, for the rounds that were tested."""
    tested: dict[int, dict[str, SiteScores | None]] = {}
    for event in events:
        if isinstance(event, SiteTested):
            tested.setdefault(event.round, {})[event.site] = event.scores
    return {number: dict(sorted(sites.items())) for number, sites in sorted(tested.items())}


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
    tested = latest(events)
    told = [scores for sites in tested.values() for scores in sites.values() if scores]
    shown = [name for name in MEASURES if any(name in scores.measures for scores in told)] or ["dice"]
    several = len(tested) > 1
    head = ["site", "class", "patients", *(MEASURES[name].head for name in shown), "missed", "spurious"]
    rows: list[list[str]] = []
    for place, sites in enumerate(tested.values()):
        name = adapters[place] if place < len(adapters) else str(place + 1)
        for row in _rows_of(sites, shown):
            rows.append([name, *row] if several else row)
    return [["adapter", *head] if several else head, *rows] if tested else []


def difference_rows(events: Sequence[Event], adapters: Sequence[str] = ()) -> list[list[str]]:
    """A head, and a row per adapter and site with its difference from the first adapter. Empty if there is one adapter."""
    tested = latest(events)
    rows = []
    for place, sites in enumerate(tested.values()):
        for site, scores in sites.items():
            if place and scores and (change := scores.difference):
                between = NONE if change.low is None or change.high is None else f"{change.low:+.3f} to {change.high:+.3f}"
                name = adapters[place] if place < len(adapters) else str(place + 1)
                rows.append([name, site, str(change.patients), f"{change.mean:+.3f}", between])
    return [["adapter", "site", "patients", "mean Dice, difference from the first", "95 %"], *rows] if rows else []


def about(events: Sequence[Event]) -> str:
    """Sentences about the rows, with the worst site."""
    tested = latest(events)
    last = next(reversed(tested.values()), {})
    silent = [site for site, scores in last.items() if scores is None]
    sentences = [
        "Each site has scored its own test cases. Only figures over its patients left it, with rounded numbers of patients, "
        "and none over fewer patients than the site's `min_test_patients`. In brackets are 95 % intervals over patients.",
        worst_site(spread_between(last)),
        f"No scores were told by {', '.join(silent)}." if silent else "",
        f"“{FEWER}” stands for a number of cases that is too small to be told.",
    ]
    return " ".join(filter(None, sentences))


def site_tests(events: Sequence[Event]) -> Section | None:
    """The section of a run's page; None if no site was asked to test.

    Args:
        events: the ledger of a run between hospitals.
    """
    rows = site_rows(events)
    if not rows:
        return None
    several = rows[0][0] == "adapter"
    tables = [Table("site-tests", "Test scores by site", rows[0], rows[1:], 2 + several, opened=True)]
    differences = difference_rows(events)
    if differences:
        caption = "Differences between adapters on the same cases"
        tables.append(Table("site-differences", caption, differences[0], differences[1:], 2, opened=True))
    return Section("site-tests-section", "Test scores at the sites", about(events), tables=tables)


def _rows_of(sites: dict[str, SiteScores | None], shown: Sequence[str]) -> Iterable[list[str]]:
    for site, scores in sites.items():
        if scores is None:
            yield [site, NONE, NONE, *[NONE] * len(shown), NONE, NONE]
            continue
        for name, dice in scores.measures.get("dice", {}).items():
            figures = [(scores.measures.get(measure, {}).get(name), MEASURES[measure].digits) for measure in shown]
            cells = [_cell(one, digits) for one, digits in figures]
            yield [site, name, str(dice.patients), *cells, *(_count(of, name) for of in (scores.missed, scores.spurious))]
        for name, figures in {**scores.means, "mean": scores.mean}.items():
            if figures:
                yield [site, name, str(figures.patients), _cell(figures, 3), *[NONE] * (len(shown) + 1)]
    whole = pooled_dice(mean_dices(sites))
    if whole and len(sites) > 1:
        yield ["all sites", "mean", str(whole.patients), with_interval(whole), *[NONE] * (len(shown) + 1)]


def _cell(figures: Figures | None, digits: int) -> str:
    if figures is None:
        return NONE
    text = number(figures.mean, digits)
    if figures.low is not None and figures.high is not None:
        text += f" ({figures.low:.{digits}f} to {figures.high:.{digits}f})"
    return text


def _count(counts: dict[str, Any], name: str) -> str:
    if name not in counts:
        return NONE
    return FEWER if counts[name] is None else str(counts[name])
