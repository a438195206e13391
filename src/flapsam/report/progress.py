"""Long work on a terminal: a bar with the time left; elsewhere, a line a round."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flapsam.federation.ledger import Event
from flapsam.federation.observer import Observer
from flapsam.metrics import mean


class ConsoleObserver(Observer):
    """Shows a run on a console, as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.title = ""
        self.task: TaskID | None = None
        self.validation: dict[int, list[float | None]] = {}

    def __enter__(self) -> "ConsoleObserver":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        self.title = title
        self.validation.clear()
        self.task = self.bars.add_task(title, total=steps, completed=done, news="")
        if not self.console.is_terminal:
            self.say(title)

    def step(self, count: float = 1) -> None:
        if self.task is not None:
            self.bars.advance(self.task, count)

    def end(self) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=self.bars.tasks[self.task].total)
        if self.validation:
            self._show("done")

    def event(self, event: Event) -> None:
        if event["event"] == "validation":
            self.validation.setdefault(event["round"], []).append(event["dice"]["mean"])
        elif event["event"] == "refused":
            self.say(f"round {event['round']}: the packet of {event['site']} is refused: {event['reason']}")
        elif event["event"] == "missing":
            self.say(f"round {event['round']}: nothing from {event['site']}: {event['reason']}")
        elif event["event"] == "excluded":
            self.say(f"{event['site']} does not take part: {event['reason']}")
        elif event["event"] == "job_end" and "reason" in event:
            self.say(event["reason"])
        elif event["event"] == "round":
            self._show(f"round {event['round']} in {event['seconds']:.0f} s")

    def _show(self, news: str) -> None:
        newest = max(self.validation, default=0)
        dice = mean(self.validation.get(newest, []))
        if dice is not None:
            news += f", validation Dice {dice:.3f} after round {newest}"
        if self.task is not None:
            self.bars.update(self.task, news=news)
        if not self.console.is_terminal:
            self.say(f"{self.title}: {news}")
