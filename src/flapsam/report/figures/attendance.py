"""Who answered in which round, and what was refused: drop-outs."""

from flapsam.report.figures.drawing import INK, MUTED, SERIES, WIDTH, chart, legend, new_figure, short
from flapsam.report.run import Run
from flapsam.report.section import Section, Table
from flapsam.report.standing import TROUBLE
from flapsam.report.units import NONE

LOOKS = {
    "answered": {"color": MUTED, "marker": "s", "linestyle": "none", "markersize": 3.5},
    "missing": {"color": SERIES[1], "marker": "X", "linestyle": "none", "markersize": 8},
    "refused": {"color": SERIES[5], "marker": "D", "linestyle": "none", "markersize": 6},
}
WORDS = {"missing": "no answer", "refused": "packet refused", "excluded": "does not take part"}


def attendance(run: Run) -> Section | None:
    """Site by round, with the reasons; None where there were no rounds of several sites."""
    answered = run.fits("federated", "bytes_up")
    troubles = [event for event in run.events if event["event"] in TROUBLE]
    if not answered and not troubles:
        return None
    if not troubles:
        text = f"Every site answered in every round: {len(answered)} sites, {run.rounds('federated')} rounds."
        return Section("attendance", "Drop-outs", text)
    sites = sorted({*answered, *(event["site"] for event in troubles)})
    figure = new_figure(max(WIDTH, 2 + 0.11 * run.rounds("federated")), 1.3 + 0.24 * len(sites))
    axes = figure.subplots()
    places: dict[str, list[tuple[int, int]]] = {what: [] for what in LOOKS}
    places["answered"] = [(one, sites.index(site)) for site, points in answered.items() for one in points]
    for event in troubles:
        if "round" in event:
            places[event["event"]].append((event["round"], sites.index(event["site"])))
    for what, look in LOOKS.items():
        axes.plot([one for one, _ in places[what]], [row for _, row in places[what]], **look)
    axes.set_yticks(range(len(sites)), [short(site) for site in sites])
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.set_xlabel("round")
    axes.spines["left"].set_color(INK)
    legend(figure, list(LOOKS.items()))
    counts = {what: sum(event["event"] == what for event in troubles) for what in TROUBLE}
    told = ", ".join(f"{count} × {WORDS[what]}" for what, count in counts.items() if count)
    rows = [
        [WORDS[event["event"]], event["site"], event["time"], event["reason"], str(event.get("round", NONE))]
        for event in troubles
    ]
    return Section(
        "attendance",
        "Drop-outs",
        f"{told}. A round goes on without those who do not answer, and without packets that are not right.",
        [chart(figure, "Who answered in which round", told)],
        [Table("attendance-table", "Drop-outs and refused packets", ["what", "site", "when", "why", "round"], rows, 4)],
    )
