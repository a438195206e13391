"""A site's ledger of the privacy that its answers have spent."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

from pydantic import Field

from flapsam.base.errors import FlapsamError
from flapsam.base.files import NO_LOCKS, make_folder, private, sync_folder
from flapsam.federation.privacy.accounting import Plan, Steps
from flapsam.run.config import StrictModel


class BudgetError(FlapsamError):
    """A run would reveal more about a patient than it may."""


class Ceiling(StrictModel):
    """The most that a site's answers may reveal about one of its patients, over all runs in its state."""

    epsilon: Annotated[float, Field(gt=0)]
    """Largest ε of differential privacy. Every run must be private and needs its part of it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Allowance δ, roughly the probability that more is revealed."""


@dataclass(frozen=True)
class Spent:
    """Steps of a run whose result may have left the site."""

    run: str
    """The run's id."""
    round: int
    """The round that they belong to."""
    plan: Plan
    """The plan of the run, but with the steps of this round."""


class Budget:
    """A file with one JSON entry per line. Entries are added before their steps begin, and none is ever removed.

    A run counts in full from its first round on, with the ε and δ that it declares, and those of several runs are added up.
    This holds even if a server chooses the settings of a run after it has seen the results of earlier ones (Rogers et al.
    2016, arXiv 1605.08294). It does not for the tighter composition that is used within a run, whose settings are fixed.
    """

    def __init__(self, path: Path, ceiling: Ceiling | None = None) -> None:
        """Use a ledger.

        Args:
            path: the file.
            ceiling: the most that may be spent. If it is not given, only each run's own limit holds.
        """
        self.path = path
        self.ceiling = ceiling

    def create(self, begun: bool) -> None:
        """Create the file if it is missing.

        Args:
            begun: whether it must exist, because the site has taken part in private runs.

        Raises:
            FlapsamError: the file is missing but must exist, or it is damaged.
        """
        if not self.path.exists():
            if begun:
                raise FlapsamError(
                    f"{self.path}: the ledger of the privacy that was spent is missing, although this site has taken part "
                    "in private runs; put it back, or write an empty file if nothing that these runs revealed counts"
                )
            make_folder(self.path.parent)
            open(self.path, "ab", opener=private).close()
            sync_folder(self.path.parent)
        self.spent()

    def spent(self) -> list[Spent]:
        """All entries.

        Raises:
            FlapsamError: the file is missing or damaged.
        """
        try:
            return self._entries(self.path.read_bytes())
        except OSError as error:
            raise FlapsamError(f"{self.path}: cannot be read ({error.strerror or error})") from error

    def total(self) -> tuple[float, float]:
        """ε and δ of all runs together.

        Raises:
            FlapsamError: the file is missing or damaged.
        """
        return _total(self.spent())

    def check(self, run: str, plan: Plan) -> None:
        """Check that a run may begin or go on.

        Args:
            run: the run's id.
            plan: all steps that the run may take.

        Raises:
            BudgetError: it may not.
            FlapsamError: the file is missing or damaged.
        """
        self._check(self.spent(), run, plan)

    def spend(self, run: str, number: int, count: int, plan: Plan) -> None:
        """Enter the steps of a round, and wait until they are on the disk. Call it before the steps begin.

        Args:
            run: the run's id.
            number: the round's number.
            count: number of steps of the round.
            plan: all steps that the run may take.

        Raises:
            BudgetError: they would reveal more than the run or the site allows. Nothing is entered.
            FlapsamError: the file is missing, is damaged, or cannot be written.
        """
        try:
            # Not a new file: if this one is gone, so is the record of what was spent.
            with self.path.open("r+b") as file:
                _lock(file, self.path)
                content = file.read()
                entries = self._entries(content)
                self._check(entries, run, plan)
                taken = count + sum(entry.plan.steps.count for entry in entries if entry.run == run)
                if taken > plan.steps.count:
                    raise BudgetError(
                        f"with round {number}, this run would have taken {taken} private steps, but its noise is for "
                        f"{plan.steps.count}; rounds were repeated more often than privacy.repeats allows"
                    )
                # A crash may have cut off the last entry. Its steps never began.
                end = content.rfind(b"\n") + 1
                file.truncate(end)
                file.seek(end)
                line = {
                    "run": run,
                    "round": number,
                    "steps": count,
                    "sampling": plan.steps.sampling,
                    "noise": plan.steps.noise,
                    "epsilon": plan.epsilon,
                    "delta": plan.delta,
                }
                try:
                    file.write(json.dumps(line).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    with suppress(OSError):
                        os.truncate(self.path, end)
                    raise
        except OSError as error:
            raise FlapsamError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def _check(self, entries: Iterable[Spent], run: str, plan: Plan) -> None:
        others = [entry for entry in entries if entry.run != run]
        for entry in entries:
            if entry.run == run and not plan.keeps(entry.plan):
                raise BudgetError("the run's sampling, noise, ε or δ differ from earlier rounds; start a new run")
        if self.ceiling is None:
            return
        before = _total(others)
        for name, used, more, most in (
            ("ε", before[0], plan.epsilon, self.ceiling.epsilon),
            ("δ", before[1], plan.delta, self.ceiling.delta),
        ):
            # Not a comparison the other way round, which would accept what is no number. Sums of decimals are inexact.
            if not used + more <= most * (1 + 1e-9):
                raise BudgetError(
                    f"with this run, {name} would rise to {used + more:.3g}; this site allows {most:.3g}, of which other "
                    f"runs have spent {used:.3g}"
                )

    def _entries(self, content: bytes) -> list[Spent]:
        try:
            return [_entry(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
        except (ValueError, LookupError, TypeError) as error:
            raise FlapsamError(
                f"{self.path}: the ledger of the privacy that was spent is damaged; restore this file from a backup"
            ) from error


def _total(entries: Iterable[Spent]) -> tuple[float, float]:
    """ε and δ of all runs together, each with the largest that it has declared."""
    runs: dict[str, tuple[float, float]] = {}
    for entry in entries:
        epsilon, delta = runs.get(entry.run, (0.0, 0.0))
        runs[entry.run] = max(epsilon, entry.plan.epsilon), max(delta, entry.plan.delta)
    return sum(epsilon for epsilon, _ in runs.values()), sum(delta for _, delta in runs.values())


def _entry(line: bytes) -> Spent:
    fields = json.loads(line)
    steps = Steps(float(fields["sampling"]), float(fields["noise"]), int(fields["steps"]))
    plan = Plan(steps, float(fields["epsilon"]), float(fields["delta"]))
    if not (0 < steps.sampling <= 1 and steps.noise > 0 and steps.count > 0 and plan.epsilon > 0 and 0 < plan.delta < 1):
        raise ValueError(line)
    return Spent(str(fields["run"]), int(fields["round"]), plan)


def _lock(file: IO[bytes], path: Path) -> None:
    """Wait until no other process uses the ledger. Without locks, two processes could each spend what is left."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise FlapsamError(
            f"{path}: this file system has no locks, so two processes could spend the same privacy; keep the site's state "
            "on a local disk"
        ) from error
