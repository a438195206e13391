"""Where the time of a run went."""

from collections.abc import Mapping, Sequence

from flapsam.report.figures.drawing import SERIES, WIDTH, chart, new_figure
from flapsam.report.run import TITLES
from flapsam.report.section import Section, Table
from flapsam.report.times import PhaseTimes, SiteTimes
from flapsam.report.units import NONE

PHASES = {
    "fits": "fits",
    "aggregation": "aggregation",
    "rest": "the rest of the rounds",
    "after": "validation at the end and test",
}
"""Field of ``PhaseTimes`` → its name for people."""


def phases(times: Mapping[str, PhaseTimes], sites: Sequence[SiteTimes]) -> Section | None:
    """Seconds of each mode by phase, and of each site; None where no round was closed."""
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
    described = "; ".join(f"{TITLES[mode]} {parts.total:.0f} s" for mode, parts in times.items())
    rows = [
        [TITLES[mode], *(f"{getattr(parts, field):.1f}" for field in PHASES), f"{parts.total:.1f}"]
        for mode, parts in times.items()
    ]
    return Section(
        "time",
        "Time",
        "Wall-clock seconds. Where sites are fitted side by side, a round's fits take as long as the slowest. The rest is "
        "packets, validation and everything else in a round.",
        [chart(figure, "Time per phase", described)],
        [Table("time-table", "Seconds per phase", ["mode", *PHASES.values(), "in all"], rows), _by_site(sites)],
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
    head = ["mode", "site", "fits (s)", "of it waiting for slices (s)", "steps", "steps a second"]
    return Table("time-sites", "Seconds of the fits at each site", head, rows, text_columns=2)
