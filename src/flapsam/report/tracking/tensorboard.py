"""TensorBoard tracker, with one folder per cohort and one per site in it, so that a chart shows the curve of all sites."""

import shutil
import threading
from collections.abc import Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from flapsam.report.tracking.points import Point
from flapsam.report.tracking.tracker import Tracked, Tracker


class TensorBoard(Tracker):
    """Writes event files. The files of a resumed run are written again from its first event."""

    def __init__(self, run: Tracked) -> None:
        threading.excepthook = _without_tensorboard
        self.run = run
        self.place = f"tensorboard --logdir {run.folder}"
        shutil.rmtree(run.folder, ignore_errors=True)
        self.writers: dict[str, SummaryWriter] = {}
        self.fresh: set[str] = set()
        """Series with points that are not flushed to their file yet."""

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            self.fresh.add(point.series)
            self._writer(point.series).add_scalar(point.name, point.value, point.step, walltime=point.time)

    def flush(self) -> None:
        for series in self.fresh:
            self.writers[series].flush()
        self.fresh.clear()

    def close(self, ended: bool) -> None:
        for writer in self.writers.values():
            writer.close()

    def _writer(self, series: str) -> SummaryWriter:
        if series not in self.writers:
            writer = self.writers[series] = SummaryWriter(self.run.folder / series)
            if "/" not in series:
                self._write_configuration(writer, series)
        return self.writers[series]

    def _write_configuration(self, writer: SummaryWriter, cohort: str) -> None:
        """Write the configuration as text, and as hyperparameters for the tab that compares runs."""
        fields: dict[str, Any] = {"mode": cohort, **self.run.parameters}
        rows = "\n".join(f"| {name} | {value} |" for name, value in fields.items())
        writer.add_text("configuration", f"| field | value |\n| --- | --- |\n{rows}")
        for summary in hparams(fields, {"validation_dice/mean": 0.0, "test_dice/mean": 0.0}):
            assert writer.file_writer is not None
            writer.file_writer.add_summary(summary)


def _without_tensorboard(error: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, unless it is TensorBoard's, whose ``flush`` raises the same error again."""
    if not type(error.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(error)
