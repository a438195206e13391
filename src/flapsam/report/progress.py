"""Progress of long work: on a terminal a bar with the run's sites, Dice, traffic and time left; elsewhere lines of text."""

from collections.abc import Sequence
from threading import RLock

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn
from rich.text import Text

from flapsam.base.escaping import one_line
from flapsam.report.standing import CohortStanding, Standing
from flapsam.report.standing_view import bytes_line, dice_line, end_line, event_line, sites_view
from flapsam.report.units import duration, rate
from flapsam.run.config import RunConfig
from flapsam.run.ledger import AnswerMissing, AnswerRefused, Delivered, Event, Fitted, RoundClosed, SiteTested, now
from flapsam.run.observer import Observer

REFRESHES = 4
"""Number of redraws per second."""


class ConsoleObserver(Observer):
    """Shows the progress of a run on a console while its context is open."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.draws = console.is_terminal and not console.is_dumb_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            console=console,
        )
        self.task: Task | None = None
        self.standing: Standing | None = None
        self.working: dict[str, str] = {}
        # The view is drawn in another thread.
        self.lock = RLock()
        self.live = Live(
            get_renderable=self._view,
            console=console,
            refresh_per_second=REFRESHES,
            transient=True,
            vertical_overflow="crop",
        )

    def __enter__(self) -> "ConsoleObserver":
        if self.draws and not self.console.quiet:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(one_line(text), highlight=False, markup=False, soft_wrap=True)

    def opened(self, config: RunConfig, events: Sequence[Event]) -> None:
        with self.lock:
            self.standing = Standing(config, events)

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        with self.lock:
            self._clear()
            self.bar.add_task(escape(one_line(title)), total=steps or None, completed=done, pace="")
            (self.task,) = self.bar.tasks
            self.title = title
        if not self.draws:
            self.say(title)

    def step(self, count: float = 1) -> None:
        if self.task is not None:
            self.bar.advance(self.task.id, count)

    def end(self) -> None:
        with self.lock:
            task, trained = self.task, self._trained()
            self._clear()
        if trained is not None:
            self.say(end_line(trained))
        elif task is not None and self.draws:
            self.say(f"{self.title}, {task.completed:.0f} in {duration(task.elapsed or 0)}")

    def works(self, site: str, work: str) -> None:
        with self.lock:
            self.working[site] = work

    def event(self, event: Event) -> None:
        with self.lock:
            if isinstance(event, Fitted | Delivered | SiteTested | AnswerRefused | AnswerMissing):
                self.working.pop(event.site, None)
            if self.standing is not None:
                self.standing.add(event)
            text = event_line(event, self.standing.under_way if self.standing else None)
        # On a terminal, the view already shows the rounds.
        if text and (not isinstance(event, RoundClosed) or not self.draws):
            self.say(text)

    def _trained(self) -> CohortStanding | None:
        """The cohort that the bar shows, or None while it shows other work."""
        cohorts = self.standing.cohorts.values() if self.standing and self.task else ()
        return next((standing for standing in cohorts if str(standing.cohort) == self.title), None)

    def _clear(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task.id)
        self.task = None
        self.working.clear()

    def _view(self) -> RenderableType:
        with self.lock:
            if self.task is None:
                return Group()
            speed, trained = self.task.speed, self._trained()
            unit = " steps" if trained is not None and (self.task.total or 0) > trained.planned else ""
            left = f", {duration(self.task.time_remaining)} left" if self.task.time_remaining is not None else ""
            self.bar.update(self.task.id, pace=rate(speed, unit) + left if speed else "")
            parts: list[RenderableType | None] = [self.bar.get_renderable()]
            if trained is not None and self.standing is not None:
                parts += [Text(_facts(trained, self.standing), style="dim"), sites_view(trained, self.working)]
            return Group(*(part for part in parts if part is not None))


def _facts(trained: CohortStanding, standing: Standing) -> str:
    """Three lines: the round and the time left, the Dice, and the traffic."""
    at = now()
    in_rounds = trained.rounds < trained.planned and not trained.over
    first = f"round {trained.rounds + 1} of {trained.planned}" if in_rounds else "sending the result"
    round_left = standing.round_seconds_left(at)
    if round_left is not None and not trained.over:
        first += f", {duration(round_left)} left"
    run_left = standing.seconds_left(at)
    if run_left is not None and len(standing.cohorts) > 1:
        first += f"; whole run, about {duration(run_left)} left"
    return "\n".join(filter(None, [first, dice_line(trained), bytes_line(trained)]))
