"""Which cases train, which validate, which are kept for the test. Always by subject, always from the run's seed."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from flapsam.errors import FlapsamError
from flapsam.seeds import seed_for
from flapsam.sites.case import Case, Site, Split


def draw_test(site: Site, fraction: float, seed: int) -> Site:
    """Where no case has a split yet, keep a seeded share of the subjects for the test; else check that all have one.

    Raises:
        FlapsamError: some cases of the site have a split and some have none, or a subject is in two splits' sides.
    """
    without = [case.name for case in site.cases if case.split is None]
    if len(without) == len(site.cases):
        return _move(site, "train", "test", _drawn(site.cases, fraction, 0, seed_for(seed, site.name, "test split")))
    if without:
        raise FlapsamError(f"site {site.name}: case {without[0]} has no split although others have; give all or none")
    tested = {case.subject for case in site.of("test")}
    for case in site.of("train", "val"):
        if case.subject in tested:
            raise FlapsamError(f"site {site.name}: subject {case.subject} is in the test and in training; move one")
    return site


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
