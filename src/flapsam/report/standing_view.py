"""Where a run stands, for a terminal and in sentences."""

from collections.abc import Collection, Mapping
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flapsam.federation.ledger import Event
from flapsam.report.run import TITLES
from flapsam.report.standing import FederationStanding, SiteStanding, Standing, moment
from flapsam.report.units import NONE, duration, number, size

FEW = 12
"""Sites that are shown one by one; more are counted."""
NAMED = 3
"""Sites that are named where all are counted."""
WORKS = {"fit": "fits", "validate": "validates"}
STALE = 3
"""Without an event for so many times what a round takes, a run may have stopped."""


def dice_line(one: FederationStanding) -> str:
    """The newest validation Dice and the best; nothing before there is one."""
    if one.newest is None or one.best is None:
        return ""
    text = f"validation Dice {one.newest[1]:.3f} after round {one.newest[0]}"
    return text if one.newest[1] >= one.best[1] else f"{text}, best {one.best[1]:.3f} after round {one.best[0]}"


def bytes_line(one: FederationStanding) -> str:
    """What travelled both ways; nothing for one that trains alone."""
    return f"{size(one.bytes_up)} up, {size(one.bytes_down)} down" if one.mode == "federated" else ""


def event_line(event: Event, one: FederationStanding | None) -> str:
    """A sentence on an event that is worth one, else nothing.

    Args:
        event: that has just been taken in.
        one: the federation that it is of.
    """
    kind = event["event"]
    if kind == "refused":
        return f"round {event['round']}: the packet of {event['site']} is refused: {event['reason']}"
    if kind == "missing":
        return f"round {event['round']}: nothing from {event['site']}: {event['reason']}"
    if kind == "excluded":
        return f"{event['site']} does not take part: {event['reason']}"
    if kind == "job_end":
        return event.get("reason", "")
    if kind == "round" and one is not None:
        facts = [f"{one.name}: round {event['round']} of {one.planned} in {event['seconds']:.0f} s"]
        return ", ".join(filter(None, [*facts, dice_line(one), bytes_line(one)]))
    return ""


def end_line(one: FederationStanding) -> str:
    """A sentence on a federation whose rounds are done."""
    rounds = f"{one.name}: {one.rounds} of {one.planned} rounds done"
    return ", ".join(filter(None, [rounds, dice_line(one), bytes_line(one)]))


def sites_view(one: FederationStanding, at_work: Mapping[str, str]) -> RenderableType | None:
    """What each site of a federation does in the round under way; only their number where there are many.

    Args:
        one: the federation.
        at_work: site → what it does, as far as that is known.
    """
    if len(one.sites) < 2:
        return None
    if len(one.sites) > FEW:
        return Text(_counted(one, at_work), style="dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column("site", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=36)
    table.add_column("loss", justify="right")
    table.add_column("Dice", justify="right")
    for site in sorted(one.sites.values(), key=lambda site: site.name):
        text, style = _doing(site, one, at_work)
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
    if standing.federations:
        parts.append(_modes(standing))
    one = standing.under_way
    if one is not None and not standing.ended and (sites := sites_view(one, {})) is not None:
        parts += [Text(f"{one.name}, round {min(one.rounds + 1, one.planned)}:"), sites]
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
    begun = f"begun {moment(standing.first):%Y-%m-%d %H:%M:%S} UTC"
    if standing.ended:
        return f"{begun}, ended {moment(standing.last):%Y-%m-%d %H:%M:%S} UTC"
    age = max(0.0, (at - moment(standing.last)).total_seconds())
    event = standing.last
    site = f" of {event['site']}" if "site" in event else ""
    number_ = f" in round {event['round']}" if "round" in event and event["event"] != "round" else ""
    last = f"last event {duration(age)} ago ({event['event']}{site}{number_})"
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
    for kind, events in standing.trouble.items():
        if events:
            last = events[-1]
            place = f"{last['site']} in round {last['round']}" if "round" in last else last["site"]
            lines.append(f"{names[kind]}: {len(events)}, the last {place}: {last['reason']}")
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
        rounds = f"{sum(one.rounds for one in group)} of {sum(one.planned for one in group)}"
        newest = [one.newest[1] for one in group if one.newest]
        best = [one.best for one in group if one.best]
        table.add_row(
            TITLES[mode],
            rounds,
            number(sum(newest) / len(newest) if newest else None),
            number(sum(value for _, value in best) / len(best) if best else None),
            str(best[0][0]) if len(group) == 1 and best else NONE,
            *([size(group[0].bytes_up), size(group[0].bytes_down)] if mode == "federated" else [NONE, NONE]),
        )
    return table


def _doing(site: SiteStanding, one: FederationStanding, at_work: Mapping[str, str]) -> tuple[str, str]:
    """What a site does, and in which style it is written."""
    if site.name in at_work:
        return WORKS[at_work[site.name]], "cyan"
    if site.trouble is not None:
        return f"{site.trouble['event']}: {site.trouble['reason']}", "red"
    if site.delivered:
        return "has the result", "green"
    if site.round > one.rounds or (site.round == one.rounds == one.planned):
        return f"answered in {duration(site.seconds)}" if site.seconds is not None else "answered", "green"
    # Where nobody says who is at work, all may be.
    return "waits" if at_work else "has not answered yet", "dim"


def _counted(one: FederationStanding, at_work: Collection[str]) -> str:
    count = len(one.sites)
    done = sum(site.delivered for site in one.sites.values()) if one.over else len(one.answered)
    parts = [f"{done} of {count} sites have {'the result' if one.over else 'answered'}"]
    if at_work:
        named = sorted(at_work)[:NAMED]
        more = f" and {len(at_work) - NAMED} more" if len(at_work) > NAMED else ""
        parts.append(f"{', '.join(named)}{more} at work")
    if trouble := sum(site.trouble is not None for site in one.sites.values()):
        parts.append(f"{trouble} did not answer their last round")
    return "; ".join(parts)
