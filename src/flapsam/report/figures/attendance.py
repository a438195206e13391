"""Who answered in which round, and what was refused: drop-outs."""

from collections.abc import Sequence

from flapsam.report.figures.drawing import INK, MUTED, SERIES, WIDTH, chart, legend, new_figure, short
from flapsam.report.run import Series
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE
from flapsam.run.ledger import SiteExcluded, Trouble

LOOKS = {
    "answered": {"color": MUTED, "marker": "s", "linestyle": "none", "markersize": 3.5},
    "missing": {"color": SERIES[1], "marker": "X", "linestyle": "none", "markersize": 8},
    "refused": {"color": SERIES[5], "marker": "D", "linestyle": "none", "markersize": 6},
}
WORDS = {"refused": "packet refused", "missing": "no answer", "excluded": "does not take part"}


def attendance(answered: Series, troubles: Sequence[Trouble], rounds: int) -> Section | None:
    """Site by round, with the reasons; None where there were no rounds of several sites.

    Args:
        answered: site → round → any number, where the site answered.
        troubles: what kept sites from answering.
        rounds: number of rounds done.
    """
    if not answered and not troubles:
        return None
    if not troubles:
        text = f"Every site answered in every round: {len(answered)} sites, {rounds} rounds."
        return Section("attendance", "Drop-outs", text)
    sites = sorted({*answered, *(trouble.site for trouble in troubles)})
    figure = new_figure(max(WIDTH, 2 + 0.11 * rounds), 1.3 + 0.24 * len(sites))
    axes = figure.subplots()
    places: dict[str, list[tuple[int, int]]] = {kind: [] for kind in LOOKS}
    places["answered"] = [(number, sites.index(site)) for site, points in answered.items() for number in points]
    for trouble in troubles:
        if not isinstance(trouble, SiteExcluded):
            places[trouble.event].append((trouble.round, sites.index(trouble.site)))
    for kind, look in LOOKS.items():
        axes.plot([number for number, _ in places[kind]], [row for _, row in places[kind]], **look)
    axes.set_yticks(range(len(sites)), [short(site) for site in sites])
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.set_xlabel("round")
    axes.spines["left"].set_color(INK)
    legend(figure, list(LOOKS.items()))
    counts = {kind: sum(trouble.event == kind for trouble in troubles) for kind in WORDS}
    described = ", ".join(f"{count} × {WORDS[kind]}" for kind, count in counts.items() if count)
    rows = [_row(trouble) for trouble in troubles]
    return Section(
        "attendance",
        "Drop-outs",
        f"{described}. A round continues without sites that do not answer, and without packets that are not right.",
        [chart(figure, "Who answered in which round", described)],
        [Table("attendance-table", "Drop-outs and refused packets", ["what", "site", "when", "why", "round"], rows, 4)],
    )


def _row(trouble: Trouble) -> list[str]:
    number = NONE if isinstance(trouble, SiteExcluded) else str(trouble.round)
    return [WORDS[trouble.event], trouble.site, trouble.time.isoformat(), trouble.reason, number]
