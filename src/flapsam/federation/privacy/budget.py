"""A site's ledger of the privacy that its answers have spent."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder
from flapsam.federation.privacy.accounting import Steps, epsilon


class BudgetError(FlapsamError):
    """A run would reveal more about a patient than it may."""


@dataclass(frozen=True)
class Ceiling:
    """The most that a site's answers may reveal about one of its patients, over all runs."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Spent:
    """Steps of a run whose result may have left the site."""

    run: str
    """The run's id."""
    round: int
    """The round that they belong to."""
    steps: Steps
    """The steps."""


class Budget:
    """A file with an entry a line, as JSON. Entries are added before the steps begin, and none is ever removed."""

    def __init__(self, path: Path, ceiling: Ceiling | None = None, *, begun: bool = False) -> None:
        """Open the ledger.

        Args:
            path: the file.
            ceiling: the most that may be spent; only each run's own limit holds if not given.
            begun: whether the file must be there. Without it, nobody knows what was spent.

        Raises:
            FlapsamError: the file is missing or damaged.
        """
        self.path = path
        self.ceiling = ceiling
        if begun and not path.exists():
            raise FlapsamError(
                f"{path}: the ledger of the privacy that was spent is missing, although this site has taken part in runs; "
                "put it back, or write an empty file if nothing that these runs revealed counts"
            )
        self.spent: list[Spent] = []
        try:
            if not path.exists():
                make_folder(path.parent)
                path.touch()
                _keep_name(path.parent)
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                # A crash has cut off the last entry, so its steps never began.
                os.truncate(path, len(whole))
            self.spent.extend(map(_entry, whole.splitlines()))
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise FlapsamError(
                f"{path}: cannot read the ledger of the privacy that was spent; restore this file from a backup"
            ) from error

    def epsilon(self, delta: float, more: Sequence[Steps] = ()) -> float:
        """ε of everything that was spent.

        Args:
            delta: δ.
            more: steps to add.
        """
        return epsilon([*(entry.steps for entry in self.spent), *more], delta)

    def check(self, run: str, plan: Steps) -> None:
        """Check that there is enough left for the rest of a run.

        Args:
            run: the run's id.
            plan: all steps that the run may take, with those that it has taken.

        Raises:
            BudgetError: there is not.
        """
        self._check_same(run, plan)
        left = max(plan.count - self._taken(run), 0)
        self._check_ceiling(Steps(plan.sampling, plan.noise, left))

    def spend(self, run: str, number: int, steps: Steps, plan: Steps) -> None:
        """Enter the steps of a round, and wait until they are on the disk. Call it before the steps begin.

        Args:
            run: the run's id.
            number: the round's number.
            steps: the steps of the round.
            plan: all steps that the run may take.

        Raises:
            BudgetError: they would reveal more than the run or the site allows. Nothing is entered.
            FlapsamError: the entry cannot be written.
        """
        if (steps.sampling, steps.noise) != (plan.sampling, plan.noise):
            raise ValueError("these are not the planned steps")
        self._check_same(run, plan)
        if self._taken(run) + steps.count > plan.count:
            taken = self._taken(run) + steps.count
            raise BudgetError(
                f"with round {number}, this run would have taken {taken} private steps, but its noise is for {plan.count}; "
                "rounds were repeated more often than privacy.repeats allows"
            )
        self._check_ceiling(steps)
        entry = Spent(run, number, steps)
        line = {"run": run, "round": number, "sampling": steps.sampling, "noise": steps.noise, "steps": steps.count}
        try:
            # Not a new file: if this one is gone, so is the record of what was spent.
            with self.path.open("r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FlapsamError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self.spent.append(entry)

    def _taken(self, run: str) -> int:
        return sum(entry.steps.count for entry in self.spent if entry.run == run)

    def _check_same(self, run: str, plan: Steps) -> None:
        """Check that a run goes on with the sampling and the noise that it began with."""
        for entry in self.spent:
            if entry.run == run and (entry.steps.sampling, entry.steps.noise) != (plan.sampling, plan.noise):
                raise BudgetError("the run's privacy is not what it was in earlier rounds; start a new run")

    def _check_ceiling(self, steps: Steps) -> None:
        if self.ceiling is None:
            return
        total = self.epsilon(self.ceiling.delta, [steps])
        if total > self.ceiling.epsilon:
            before = self.epsilon(self.ceiling.delta)
            raise BudgetError(
                f"with this run, ε would be {total:.3g} at δ = {self.ceiling.delta:g}; this site allows "
                f"{self.ceiling.epsilon:g}, of which {before:.3g} is spent"
            )


def _entry(line: bytes) -> Spent:
    fields = json.loads(line)
    steps = Steps(float(fields["sampling"]), float(fields["noise"]), int(fields["steps"]))
    if not (0 < steps.sampling <= 1 and steps.noise > 0 and steps.count > 0):
        raise ValueError(line)
    return Spent(str(fields["run"]), int(fields["round"]), steps)


def _keep_name(folder: Path) -> None:
    """Wait until a new file's name is on the disk, too."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
