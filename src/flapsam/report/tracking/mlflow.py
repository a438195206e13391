"""MLflow tracker. A run of flapsam becomes one run of MLflow, which is found again by its tag with flapsam's run id."""

import os
import re
from collections.abc import Sequence

# MLflow would report its usage to its developers. It reads these variables on import.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from flapsam.report.tracking.points import Point
from flapsam.report.tracking.tracker import Tracked, Tracker

EXPERIMENT = "flapsam"
RUN_TAG = "flapsam.run"
PARAMETERS, METRICS = 100, 1000
"""Largest number of parameters and of metrics that MLflow accepts in one request."""


class Mlflow(Tracker):
    """Logs to ``MLFLOW_TRACKING_URI`` or, without it, to files in the run's folder. Points are never logged twice."""

    def __init__(self, run: Tracked) -> None:
        store = os.environ.get("MLFLOW_TRACKING_URI")
        self.place = "open MLflow at MLFLOW_TRACKING_URI"
        if not store:
            # A database needs packages that mlflow-skinny does not have.
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            store = run.folder.absolute().as_uri()
            self.place = f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {store}"
        self.client = MlflowClient(tracking_uri=store)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)
        existing = self.client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.run}'")
        self.known: dict[str, set[int]] | None = None
        if existing:
            self.run = existing[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            self.known = {}
        else:
            self.run = self.client.create_run(experiment, tags={RUN_TAG: run.run}, run_name=run.name).info.run_id
            fields = [Param(_allowed(name), value) for name, value in run.parameters.items()]
            for start in range(0, len(fields), PARAMETERS):
                self.client.log_batch(self.run, params=fields[start : start + PARAMETERS])
        self.waiting: list[Metric] = []
        self.last = 0.0

    def write(self, points: Sequence[Point]) -> None:
        self.waiting += [
            Metric(key, point.value, round(1000 * point.time), point.step)
            for point in points
            if not self._is_known(key := _allowed(f"{point.series}/{point.name}"), point.step)
        ]
        self.last = points[-1].time

    def flush(self) -> None:
        for start in range(0, len(self.waiting), METRICS):
            self.client.log_batch(self.run, metrics=self.waiting[start : start + METRICS])
        self.waiting.clear()

    def close(self, ended: bool) -> None:
        self.flush()
        self.client.set_terminated(self.run, "FINISHED" if ended else "KILLED", end_time=round(1000 * self.last))

    def _is_known(self, key: str, step: int) -> bool:
        """Whether MLflow's run already has this point."""
        if self.known is None:
            return False
        if key not in self.known:
            self.known[key] = {metric.step for metric in self.client.get_metric_history(self.run, key)}
        return step in self.known[key]

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self.client.create_experiment(name)


def _allowed(name: str) -> str:
    """The name without characters that MLflow refuses."""
    return re.sub(r"[^/\w.\- ]", "_", name)
