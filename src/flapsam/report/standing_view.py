"""Where a run stands, for a terminal and in sentences."""

from collections.abc import Collection, Mapping
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flapsam.report.run import TITLES
from flapsam.report.standing import CohortStanding, SiteStanding, Standing
from flapsam.report.units import NONE, duration, number, size
from flapsam.run.ledger import AnswerMissing, AnswerRefused, Event, JobEnded, RoundClosed, RoundEvent, SiteExcluded

FEW = 12
"""Sites that are shown one by one; more are counted."""
NAMED = 3
"""Sites that are named where all are counted."""
WORKS = {"fit": "fits", "validate": "validates"}
STALE = 3
"""Without an event for so many times what a round takes, a run may have stopped."""


def dice_line(standing: CohortStanding) -> str:
    """The newest validation Dice and the best; empty before there is one."""
    if standing.newest is None or standing.best is None:
        return ""
    (newest, dice), (best, highest) = standing.newest, standing.best
    text = f"validation Dice {dice:.3f} after round {newest}"
    return text if dice >= highest else f"{text}, best {highest:.3f} after round {best}"


def bytes_line(standing: CohortStanding) -> str:
    """What travelled both ways; empty for a cohort of one."""
    if standing.cohort.mode != "federated":
        return ""
    return f"{size(standing.bytes_up)} up, {size(standing.bytes_down)} down"


def event_line(event: Event, standing: CohortStanding | None) -> str:
    """A sentence on an event that deserves one; empty for others.

    Args:
        event: that has just been added.
        standing: the cohort of the event.
    """
    match event:
        case AnswerRefused():
            return f"round {event.round}: the packet of {event.site} is refused: {event.reason}"
        case AnswerMissing():
            return f"round {event.round}: nothing from {event.site}: {event.reason}"
        case SiteExcluded():
            return f"{event.site} does not take part: {event.reason}"
        case JobEnded():
            return event.reason
        case RoundClosed() if standing is not None:
            closed = f"{standing.cohort}: round {event.round} of {standing.planned} in {event.seconds:.0f} s"
            return ", ".join(filter(None, [closed, dice_line(standing), bytes_line(standing)]))
    return ""


def end_line(standing: CohortStanding) -> str:
    """A sentence on a cohort whose rounds are done."""
    rounds = f"{standing.cohort}: {standing.rounds} of {standing.planned} rounds done"
    return ", ".join(filter(None, [rounds, dice_line(standing), bytes_line(standing)]))


def sites_view(standing: CohortStanding, at_work: Mapping[str, str]) -> RenderableType | None:
    """What each site of a federation does in the round under way; only their number where there are many.

    Args:
        standing: the cohort.
        at_work: site → what it does, as far as that is known.
    """
    if len(standing.sites) < 2:
        return None
    if len(standing.sites) > FEW:
        return Text(_counted(standing, at_work), style="dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column("site", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=36)
    table.add_column("loss", justify="right")
    table.add_column("Dice", justify="right")
    for site in sorted(standing.sites.values(), key=lambda site: site.name):
        text, style = _doing(site, standing, at_work)
        table.add_row(Text(site.name), Text(text, style=style), number(site.loss), number(site.dice))
    return table


def standing_view(standing: Standing, title: str, at: datetime, locked: bool) -> RenderableType:
    """All of where a run stands.

    Args:
        standing: of the run.
        title: its folder and id.
        at: the time.
        locked: whether a process is known to be at work on it.
    """
    parts: list[RenderableType] = [Text(title, style="bold"), Text(activity_line(standing, at, locked))]
    if standing.cohorts:
        parts.append(_modes(standing))
    cohort = standing.under_way
    if cohort is not None and not standing.ended and (sites := sites_view(cohort, {})) is not None:
        parts += [Text(f"{cohort.cohort}, round {min(cohort.rounds + 1, cohort.planned)}:"), sites]
    parts += [Text(line) for line in trouble_lines(standing)]
    if standing.stopped and not standing.ended:
        parts.append(Text(f"stopped: {standing.stopped}"))
    left = standing.seconds_left(at)
    if left is not None and not standing.ended:
        parts.append(Text(f"rounds left: about {duration(left)}, if it goes on as before"))
    return Group(*parts)


def activity_line(standing: Standing, at: datetime, locked: bool) -> str:
    """Whether the run goes on, as far as can be told from here."""
    if standing.first is None or standing.last is None:
        return f"begun, no event yet{'; a process is at work on it' if locked else ''}"
    begun = f"begun {standing.first.time:%Y-%m-%d %H:%M:%S} UTC"
    if standing.ended:
        return f"{begun}, ended {standing.last.time:%Y-%m-%d %H:%M:%S} UTC"
    age = max(0.0, (at - standing.last.time).total_seconds())
    event = standing.last
    name = getattr(event, "site", None)
    site = f" of {name}" if name is not None else ""
    round_ = f" in round {event.round}" if isinstance(event, RoundEvent) and not isinstance(event, RoundClosed) else ""
    last = f"last event {duration(age)} ago ({event.event}{site}{round_})"
    if locked:
        return f"{begun}, {last}; a process is at work on it"
    typical = standing.under_way.round_seconds if standing.under_way else None
    if typical is not None and age > STALE * max(typical, 1.0):
        return f"{begun}, {last}; no process is seen at work on it from this machine, so it has probably stopped"
    return f"{begun}, {last}"


def trouble_lines(standing: Standing) -> list[str]:
    """A line on packets that were refused, one on answers that never came, one on sites that took no part."""
    names = {"refused": "packets refused", "missing": "answers missing", "excluded": "times a site took no part"}
    lines = []
    for kind, events in standing.troubles.items():
        if events:
            last = events[-1]
            place = last.site if isinstance(last, SiteExcluded) else f"{last.site} in round {last.round}"
            lines.append(f"{names[kind]}: {len(events)}, the last {place}: {last.reason}")
    return lines


def _modes(standing: Standing) -> Table:
    """A row a mode; sites that train alone are taken together."""
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


def _doing(site: SiteStanding, standing: CohortStanding, at_work: Mapping[str, str]) -> tuple[str, str]:
    """What a site does, and in which style it is written."""
    if site.name in at_work:
        return WORKS[at_work[site.name]], "cyan"
    if site.trouble is not None:
        return f"{site.trouble.event}: {site.trouble.reason}", "red"
    if site.delivered:
        return "has the result", "green"
    if site.round > standing.rounds or (site.round == standing.rounds == standing.planned):
        return f"answered in {duration(site.seconds)}" if site.seconds is not None else "answered", "green"
    # Where nobody says who is at work, all may be.
    return "waits" if at_work else "has not answered yet", "dim"


def _counted(standing: CohortStanding, at_work: Collection[str]) -> str:
    count = len(standing.sites)
    done = sum(site.delivered for site in standing.sites.values()) if standing.over else len(standing.answered)
    parts = [f"{done} of {count} sites have {'the result' if standing.over else 'answered'}"]
    if at_work:
        named = sorted(at_work)[:NAMED]
        more = f" and {len(at_work) - NAMED} more" if len(at_work) > NAMED else ""
        parts.append(f"{', '.join(named)}{more} at work")
    if trouble := sum(site.trouble is not None for site in standing.sites.values()):
        parts.append(f"{trouble} did not answer their last round")
    return "; ".join(parts)
