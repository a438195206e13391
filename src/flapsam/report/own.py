"""The adapters that sites keep for their own use, and the shared one, at every site."""

from collections.abc import Sequence

from flapsam.learning.metrics import crossed
from flapsam.report.section import Section, Table
from flapsam.report.units import number
from flapsam.run.ledger import Event, OwnAdapterKept

TITLE = "Each site's own adapter, and the shared one: mean test Dice at every site"


def own_rows(events: Sequence[Event]) -> list[list[str]]:
    """A head, and a row with the Dice of each adapter at every site. Empty if no site keeps an adapter of its own.

    Args:
        events: the ledger of a run.
    """
    dices = crossed(events)
    sites = sorted({site for tested in dices.values() for site in tested})
    kept = {f"personal/{event.site}": event.kept for event in events if isinstance(event, OwnAdapterKept)}
    rows = [
        [adapter.removeprefix("personal/") if adapter in kept else "shared", kept.get(adapter, "")]
        + [number(tested.get(site)) for site in sites]
        for adapter, tested in dices.items()
    ]
    return [["adapter", "is", *sites], *rows] if rows else []


def own_adapters(events: Sequence[Event]) -> Section | None:
    """The section of a run's page; None if no site keeps an adapter of its own.

    Args:
        events: the ledger of a run.
    """
    rows = own_rows(events)
    if not rows:
        return None
    text = (
        "Rows are adapters, columns are the sites whose test cases they segment. Each site has kept the shared adapter, the "
        "one with its personal parts, or the one that it trained on, whichever had the highest Dice on its validation cases."
    )
    return Section(
        "own", "Each site's own adapter", text, tables=[Table("own-table", TITLE, rows[0], rows[1:], 2, opened=True)]
    )
