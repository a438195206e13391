"""Drop-outs: which site answered in which round, and which packets were refused."""

from collections import Counter
from collections.abc import Sequence

from flapsam.report.figures.drawing import INK, MUTED, SERIES, WIDTH, chart, legend, lowest, new_figure, short
from flapsam.report.run import Series
from flapsam.report.section import Section, Table
from flapsam.report.units import NONE
from flapsam.run.ledger import SiteExcluded, Trouble

LOOKS = {
    "answered": {"color": MUTED, "marker": "s", "linestyle": "none", "markersize": 3.5},
    "missing": {"color": SERIES[1], "marker": "X", "linestyle": "none", "markersize": 8},
    "refused": {"color": SERIES[5], "marker": "D", "linestyle": "none", "markersize": 6},
    "left_out": {"color": SERIES[3], "marker": "v", "linestyle": "none", "markersize": 7},
}
WORDS = {
    "refused": "packet refused",
    "left_out": "answer left out",
    "missing": "no answer",
    "excluded": "does not take part",
}


def attendance(answered: Series, troubles: Sequence[Trouble], rounds: int, told: str = "") -> Section | None:
    """A chart of sites by rounds, and a table with the reasons for drop-outs; None if no site took part in a federation.

    Args:
        answered: site → round → any number, for the rounds that the site answered.
        troubles: refused packets, answers left out, missing answers and excluded sites.
        rounds: number of rounds done.
        told: a sentence on how many rounds all sites took part in.
    """
    if not answered and not troubles:
        return None
    if not troubles:
        text = f"Every site answered every round ({len(answered)} sites, {rounds} rounds)."
        return Section("attendance", "Drop-outs", text)
    often = Counter(trouble.site for trouble in troubles)
    sites, note = lowest({site: -often[site] for site in {*answered, *often}}, "most events")
    rows_of = {site: row for row, site in enumerate(sites)}
    figure = new_figure(max(WIDTH, 2 + 0.11 * rounds), 1.3 + 0.24 * len(sites))
    axes = figure.subplots()
    places: dict[str, list[tuple[int, int]]] = {kind: [] for kind in LOOKS}
    places["answered"] = [(number, row) for site, row in rows_of.items() for number in answered.get(site, {})]
    for trouble in troubles:
        if not isinstance(trouble, SiteExcluded) and trouble.site in rows_of:
            places[trouble.event].append((trouble.round, rows_of[trouble.site]))
    for kind, look in LOOKS.items():
        axes.plot([number for number, _ in places[kind]], [row for _, row in places[kind]], **look)
    axes.set_yticks(range(len(sites)), [short(site) for site in sites])
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.set_xlabel("round")
    axes.spines["left"].set_color(INK)
    legend(figure, [(kind.replace("_", " "), look) for kind, look in LOOKS.items()])
    counts = {kind: sum(trouble.event == kind for trouble in troubles) for kind in WORDS}
    summary = ", ".join(f"{count} × {WORDS[kind]}" for kind, count in counts.items() if count)
    rows = [_row(trouble) for trouble in troubles]
    return Section(
        "attendance",
        "Drop-outs",
        f"{summary}. A round continues without answers that are not used, and without sites that do not answer, unless "
        f"rounds.require names them. {told}{note}",
        [chart(figure, "Answers by site and round", summary)],
        [Table("attendance-table", "Drop-outs and unused answers", ["event", "site", "time", "reason", "round"], rows, 4)],
    )


def _row(trouble: Trouble) -> list[str]:
    number = NONE if isinstance(trouble, SiteExcluded) else str(trouble.round)
    return [WORDS[trouble.event], trouble.site, trouble.time.isoformat(), trouble.reason, number]
