"""Where a run stands, as sentences and as tables for the terminal."""

from collections.abc import Collection, Mapping
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flapsam.base.escaping import one_line
from flapsam.report.run import TITLES
from flapsam.report.standing import CohortStanding, SiteStanding, Standing
from flapsam.report.units import NONE, duration, number, size
from flapsam.run.ledger import (
    AnswerAwaited,
    AnswerLeftOut,
    AnswerMissing,
    AnswerRefused,
    CountBounded,
    Event,
    FalseSitesBorne,
    JobEnded,
    RoundClosed,
    RoundEvent,
    SiteExcluded,
    SiteTested,
    WentBack,
)

FEW = 12
"""Largest number of sites that are shown one by one. If there are more, they are only counted."""
NAMED = 3
"""Number of working sites that are named if sites are only counted."""
WORKS = {
    "fit": "training",
    "agree": "agreeing",
    "validate": "validating",
    "test": "testing",
    "own": "choosing its own adapter",
}
STALE = 3
"""Number of rounds' time without any event after which a run has probably stopped."""


def dice_line(standing: CohortStanding) -> str:
    """The newest and the best validation Dice; empty before the first validation."""
    if standing.newest is None or standing.best is None:
        return ""
    (newest, dice), (best, highest) = standing.newest, standing.best
    text = f"validation Dice {dice:.3f} after round {newest}"
    return text if dice >= highest else f"{text}, best {highest:.3f} after round {best}"


def bytes_line(standing: CohortStanding) -> str:
    """The traffic in both directions; empty for a cohort of one client."""
    if standing.cohort.mode != "federated":
        return ""
    return f"{size(standing.bytes_up)} up, {size(standing.bytes_down)} down"


def event_line(event: Event, standing: CohortStanding | None) -> str:
    """A sentence about an event; empty for events that need none.

    Args:
        event: the newest event.
        standing: the event's cohort, if it has one.
    """
    match event:
        case AnswerRefused():
            return f"round {event.round}: the packet of {event.site} was refused: {event.reason}"
        case AnswerLeftOut():
            return f"round {event.round}: the answer of {event.site} was left out: {event.reason}"
        case AnswerMissing():
            return f"round {event.round}: no answer from {event.site}: {event.reason}"
        case AnswerAwaited():
            return f"round {event.round}: {_awaited(event)}" if event.round else _awaited(event)
        case SiteExcluded():
            return f"{event.site} does not take part: {event.reason}"
        case CountBounded():
            return f"{event.site} claims {event.claimed} {event.unit}, of which {event.counted} count (rounds.max_weight)"
        case FalseSitesBorne():
            text = f"{event.aggregator} bears {event.borne} false of {event.sites} sites"
            fewer = f"; in a round with only {event.least} answers, {event.borne_of_least}"
            return text + (fewer if event.least < event.sites else "")
        case WentBack():
            return f"{event.cohort}: went back to the state before round {event.round}"
        case JobEnded():
            return event.reason
        case SiteTested():
            mean = event.scores.mean if event.scores else None
            return f"{event.site}: test Dice {mean.mean:.3f}" if mean else f"{event.site}: tested, and tells no scores"
        case RoundClosed() if standing is not None:
            closed = f"{standing.cohort}: round {event.round} of {standing.planned} in {event.seconds:.0f} s"
            return ", ".join(filter(None, [closed, dice_line(standing), bytes_line(standing)]))
    return ""


def _awaited(event: AnswerAwaited) -> str:
    whom = f"{event.site} has not answered for {duration(event.seconds)}"
    part = None if event.share is None else f"{event.share:.0%} of the training cases"
    if event.left is not None:
        return f"{whom}; in {duration(event.left)}, the run continues without it{f' and its {part}' if part else ''}"
    return (
        f"{whom}. The run waits for it, because it is required (rounds.require){f' and has {part}' if part else ''}. To "
        "continue without it, run flapsam federation stop, then the same run with --set rounds.require=…"
    )


def end_line(standing: CohortStanding) -> str:
    """A sentence about a cohort whose rounds are done."""
    rounds = f"{standing.cohort}: {standing.rounds} of {standing.planned} rounds done"
    return ", ".join(filter(None, [rounds, dice_line(standing), bytes_line(standing)]))


def sites_view(standing: CohortStanding, working: Mapping[str, str]) -> RenderableType | None:
    """What each site of a cohort does in the current round, or a count if there are many sites.

    Args:
        standing: the cohort.
        working: site → its work, ``fit`` or ``validate``, for the sites that are known to be working.

    Returns:
        A table or a sentence; None for a cohort of one site.
    """
    if len(standing.sites) < 2:
        return None
    if len(standing.sites) > FEW:
        return Text(_counted(standing, working), style="dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column("site", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=36)
    table.add_column("loss", justify="right")
    table.add_column("Dice", justify="right")
    for site in sorted(standing.sites.values(), key=lambda site: site.name):
        text, style = _activity(site, standing, working)
        table.add_row(Text(site.name), Text(one_line(text), style=style), number(site.loss), number(site.dice))
    return table


def standing_view(standing: Standing, title: str, at: datetime, locked: bool) -> RenderableType:
    """The whole view of ``flapsam status``.

    Args:
        standing: where the run stands.
        title: the run's folder and id.
        at: the current time.
        locked: whether a process is known to be running it.
    """
    parts: list[RenderableType] = [Text(one_line(title), style="bold"), Text(activity_line(standing, at, locked))]
    if standing.cohorts:
        parts.append(_modes(standing))
    cohort = standing.under_way
    if cohort is not None and not standing.ended and (sites := sites_view(cohort, {})) is not None:
        parts += [Text(f"{cohort.cohort}, round {min(cohort.rounds + 1, cohort.planned)}:"), sites]
    parts += [Text(one_line(line)) for line in trouble_lines(standing)]
    if standing.stopped and not standing.ended:
        parts.append(Text(one_line(f"stopped: {standing.stopped}")))
    left = standing.seconds_left(at)
    if left is not None and not standing.ended:
        parts.append(Text(f"time left for the rounds: about {duration(left)} at the current pace"))
    return Group(*parts)


def activity_line(standing: Standing, at: datetime, locked: bool) -> str:
    """A sentence that says since when a run exists, and whether it is still running as far as this machine can see.

    Args:
        standing: where the run stands.
        at: the current time.
        locked: whether a process is known to be running it.
    """
    if standing.first is None or standing.last is None:
        return f"started, no event yet{'; a process is running it' if locked else ''}"
    started = f"started {standing.first.time:%Y-%m-%d %H:%M:%S} UTC"
    if standing.ended:
        return f"{started}, ended {standing.last.time:%Y-%m-%d %H:%M:%S} UTC"
    age = max(0.0, (at - standing.last.time).total_seconds())
    event = standing.last
    name = getattr(event, "site", None)
    site = f" of {name}" if name is not None else ""
    round_ = f" in round {event.round}" if isinstance(event, RoundEvent) and not isinstance(event, RoundClosed) else ""
    last = f"last event {duration(age)} ago ({event.event}{site}{round_})"
    if locked:
        return f"{started}, {last}; a process is running it"
    typical = standing.under_way.round_seconds if standing.under_way else None
    if typical is not None and age > STALE * max(typical, 1.0):
        return f"{started}, {last}; this machine sees no process that runs it, so it has probably stopped"
    return f"{started}, {last}"


def trouble_lines(standing: Standing) -> list[str]:
    """One line each about refused packets, missing answers and excluded sites, if there are any."""
    names = {
        "refused": "packets refused",
        "left_out": "answers left out",
        "missing": "answers missing",
        "excluded": "site exclusions",
    }
    lines = []
    for kind, events in standing.troubles.items():
        if events:
            last = events[-1]
            place = last.site if isinstance(last, SiteExcluded) else f"{last.site} in round {last.round}"
            lines.append(f"{names[kind]}: {len(events)}, most recently {place}: {last.reason}")
    return lines


def _modes(standing: Standing) -> Table:
    """A table with one row per mode. Local-only training is one row for all sites."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for column in ("rounds", "Dice", "best", "in round", "up", "down"):
        table.add_column(column, justify="right")
    for mode in standing.config.modes:
        group = standing.of_mode(mode)
        if not group:
            continue
        rounds = f"{sum(cohort.rounds for cohort in group)} of {sum(cohort.planned for cohort in group)}"
        newest = [cohort.newest[1] for cohort in group if cohort.newest]
        best = [cohort.best for cohort in group if cohort.best]
        table.add_row(
            TITLES[mode],
            rounds,
            number(sum(newest) / len(newest) if newest else None),
            number(sum(value for _, value in best) / len(best) if best else None),
            str(best[0][0]) if len(group) == 1 and best else NONE,
            *([size(group[0].bytes_up), size(group[0].bytes_down)] if mode == "federated" else [NONE, NONE]),
        )
    return table


def _activity(site: SiteStanding, standing: CohortStanding, working: Mapping[str, str]) -> tuple[str, str]:
    """What a site does, and the style of this text."""
    if site.name in working:
        return WORKS[working[site.name]], "cyan"
    if site.trouble is not None:
        return f"{site.trouble.event.replace('_', ' ')}: {site.trouble.reason}", "red"
    if site.delivered:
        return "has the result", "green"
    if site.round > standing.rounds or (site.round == standing.rounds == standing.planned):
        return f"answered in {duration(site.seconds)}" if site.seconds is not None else "answered", "green"
    # Without any report of working sites, as in `flapsam status`, every site may be working.
    return "waiting" if working else "has not answered yet", "dim"


def _counted(standing: CohortStanding, working: Collection[str]) -> str:
    count = len(standing.sites)
    done = sum(site.delivered for site in standing.sites.values()) if standing.over else len(standing.answered)
    parts = [f"{done} of {count} sites have {'the result' if standing.over else 'answered'}"]
    if working:
        named = sorted(working)[:NAMED]
        more = f" and {len(working) - NAMED} more" if len(working) > NAMED else ""
        parts.append(f"{', '.join(named)}{more} working")
    if absent := sum(site.trouble is not None for site in standing.sites.values()):
        parts.append(f"{absent} dropped out of their last round")
    return "; ".join(parts)
