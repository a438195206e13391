"""Where the time of a run went."""

from flapsam.federation.ledger import Event
from flapsam.report.figures.drawing import SERIES, WIDTH, chart, new_figure
from flapsam.report.run import TITLES, Run, mode_of
from flapsam.report.section import Section, Table
from flapsam.report.standing import moment
from flapsam.report.units import NONE

PHASES = ("fits", "aggregation", "the rest of the rounds", "validation at the end and test")


def phases(run: Run) -> Section | None:
    """Seconds of each mode by phase, and of each site; None where no round was closed."""
    times = {mode: _times(run, mode) for mode in run.modes if run.rounds(mode)}
    if not times:
        return None
    figure = new_figure(WIDTH, 1.1 + 0.45 * len(times))
    axes = figure.subplots()
    for row, parts in enumerate(times.values()):
        left = 0.0
        for index, phase in enumerate(PHASES):
            axes.barh(row, parts[phase], left=left, color=SERIES[index], height=0.6, label=phase if row == 0 else None)
            left += parts[phase]
    axes.set_yticks(range(len(times)), [TITLES[mode] for mode in times])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    figure.legend(loc="outside lower left", ncols=4, fontsize=9)
    told = "; ".join(f"{TITLES[mode]} {sum(parts.values()):.0f} s" for mode, parts in times.items())
    rows = [
        [TITLES[mode], *(f"{parts[p]:.1f}" for p in PHASES), f"{sum(parts.values()):.1f}"] for mode, parts in times.items()
    ]
    return Section(
        "time",
        "Time",
        "Wall-clock seconds. Where sites are fitted side by side, a round's fits take as long as the slowest. The rest is "
        "packets, validation and what lies between.",
        [chart(figure, "Time per phase", told)],
        [
            Table("time-table", "Seconds per phase", ["mode", *PHASES, "in all"], rows, opened=False),
            _by_site(run),
        ],
    )


def _times(run: Run, mode: str) -> dict[str, float]:
    parts: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    fitting: dict[tuple[str, int], list[float]] = {}
    apart = False
    for event in run.of("fit", mode):
        seconds = event.get("seconds") or event.get("site_seconds") or 0.0
        fitting.setdefault((event["federation"], event["round"]), []).append(seconds)
        # Only an engine between hospitals tells how long a site took.
        apart = apart or "site_seconds" in event
    for event in run.of("round", mode):
        aggregation = event["aggregation_seconds"]
        left = event["seconds"] - aggregation
        fits = fitting.get((event["federation"], event["round"]), [])
        # One after another their sum, which side by side may be more than the round took.
        fit = min(max(fits, default=0.0), left) if apart or sum(fits) > left else sum(fits)
        parts["fits"] += fit
        parts["aggregation"] += aggregation
        parts["the rest of the rounds"] += left - fit
    parts[PHASES[-1]] = _after_rounds(run, mode)
    return parts


def _after_rounds(run: Run, mode: str) -> float:
    """From the end of each federation's last round to its last event; the ledger has whole seconds."""
    closed: dict[str, Event] = {}
    last: dict[str, Event] = {}
    for event in run.events:
        if mode_of(event) == mode:
            last[event["federation"]] = event
            if event["event"] == "round":
                closed[event["federation"]] = event
    return sum(max((moment(last[name]) - moment(event)).total_seconds(), 0.0) for name, event in closed.items())


def _by_site(run: Run) -> Table:
    rows = []
    for mode in run.modes:
        seconds, waiting, steps = (run.fits(mode, key) for key in ("seconds", "waiting", "steps"))
        for site, points in seconds.items():
            total, count = sum(points.values()), sum(steps.get(site, {}).values())
            waited = f"{sum(waiting.get(site, {}).values()):.1f}"
            rate = f"{count / total:.2f}" if total else NONE
            rows.append([TITLES[mode], site, f"{total:.1f}", waited, f"{count:.0f}", rate])
    head = ["mode", "site", "fits (s)", "of it waiting for slices (s)", "steps", "steps a second"]
    return Table("time-sites", "Seconds of the fits at each site", head, rows, text_columns=2)
