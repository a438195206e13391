"""Time of a run by phase and site."""

from collections.abc import Mapping, Sequence

from flapsam.report.figures.drawing import SERIES, WIDTH, chart, new_figure
from flapsam.report.run import TITLES
from flapsam.report.section import Section, Table
from flapsam.report.times import PhaseTimes, SiteTimes
from flapsam.report.units import NONE

PHASES = {
    "fits": "training",
    "aggregation": "aggregation",
    "rest": "rest of the rounds",
    "after": "final validation and test",
}
"""Field of ``PhaseTimes`` → its displayed name."""


def phases(times: Mapping[str, PhaseTimes], sites: Sequence[SiteTimes]) -> Section | None:
    """A chart and tables of the seconds by mode and phase, and by site; None before the first round is done."""
    if not times:
        return None
    figure = new_figure(WIDTH, 1.1 + 0.45 * len(times))
    axes = figure.subplots()
    for row, parts in enumerate(times.values()):
        left = 0.0
        for index, (field, name) in enumerate(PHASES.items()):
            seconds = getattr(parts, field)
            axes.barh(row, seconds, left=left, color=SERIES[index], height=0.6, label=name if row == 0 else None)
            left += seconds
    axes.set_yticks(range(len(times)), [TITLES[mode] for mode in times])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    figure.legend(loc="outside lower left", ncols=4, fontsize=9)
    totals = ", ".join(f"{TITLES[mode]} {parts.total:.0f} s" for mode, parts in times.items())
    rows = [
        [TITLES[mode], *(f"{getattr(parts, field):.1f}" for field in PHASES), f"{parts.total:.1f}"]
        for mode, parts in times.items()
    ]
    return Section(
        "time",
        "Time",
        "Wall-clock seconds. If sites train in parallel, a round's training time is that of its slowest site. The rest of "
        "the rounds is spent on packets, validation and everything else.",
        [chart(figure, "Time per phase", f"In total: {totals}.")],
        [Table("time-table", "Seconds per phase", ["mode", *PHASES.values(), "total"], rows), _by_site(sites)],
    )


def _by_site(sites: Sequence[SiteTimes]) -> Table:
    rows = [
        [
            TITLES[times.mode],
            times.site,
            f"{times.seconds:.1f}",
            f"{times.waiting:.1f}",
            f"{times.steps:.0f}",
            f"{times.steps / times.seconds:.2f}" if times.seconds else NONE,
        ]
        for times in sites
    ]
    head = ["mode", "site", "training (s)", "of which waiting for slices (s)", "steps", "steps per second"]
    return Table("time-sites", "Training time at each site", head, rows, text_columns=2)
