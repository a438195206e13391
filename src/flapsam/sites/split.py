"""Which cases train, which validate, which are kept for the test. Always by subject, always from the run's seed."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from flapsam.base.seeds import seed_for
from flapsam.run.config import Split
from flapsam.sites.case import Case, Site


def draw_test(site: Site, fraction: float, seed: int) -> Site:
    """Where no case has a split yet, keep a seeded share of the subjects for the test; else leave the splits as they are.

    Where ``split_problems`` finds any, cases without a split stay without.
    """
    if all(case.split is None for case in site.cases):
        return _move(site, "train", "test", _drawn(site.cases, fraction, 0, seed_for(seed, site.name, "test split")))
    return site


def split_problems(site: Site) -> list[str]:
    """A sentence for each case without a split where others have one, and each subject in the test and in training."""
    without = [case.name for case in site.cases if case.split is None]
    problems = []
    if 0 < len(without) < len(site.cases):
        problems = [f"site {site.name}: case {name} has no split although others have; give all or none" for name in without]
    both = {case.subject for case in site.of("test")} & {case.subject for case in site.of("train", "val")}
    return problems + [
        f"site {site.name}: subject {subject} is in the test and in training; move one" for subject in sorted(both)
    ]


def hold_out_validation(site: Site, fraction: float, seed: int) -> Site:
    """Where the split has no ``val``, hold out a seeded share of the training subjects, at least one."""
    if site.of("val"):
        return site
    training = site.of("train")
    return _move(site, "train", "val", _drawn(training, fraction, 1, seed_for(seed, site.name, "validation split")))


def _drawn(cases: Iterable[Case], fraction: float, at_least: int, seed: int) -> set[str]:
    subjects = sorted({case.subject for case in cases})
    if len(subjects) < 2 or fraction == 0:
        return set()
    count = min(max(round(fraction * len(subjects)), at_least), len(subjects) - 1)
    return set(np.random.default_rng(seed).permutation(subjects)[:count].tolist())


def _move(site: Site, source: Split, target: Split, subjects: set[str]) -> Site:
    def moved(case: Case) -> Case:
        current = case.split or source
        return replace(case, split=target if current == source and case.subject in subjects else current)

    return replace(site, cases=tuple(moved(case) for case in site.cases))
