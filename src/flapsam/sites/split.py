"""Splits into training, validation and test, always drawn by subject and from the run's seed."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from flapsam.base.seeds import seed_for
from flapsam.run.config import Split
from flapsam.sites.case import Case, Site


def draw_test(site: Site, fraction: float, seed: int) -> Site:
    """Draw a share of the subjects for the test, unless cases of the site have a split already.

    If only some cases have one, the others stay without, and ``split_problems`` reports them.

    Args:
        site: the site to split.
        fraction: share of the site's subjects.
        seed: the run's seed.
    """
    if all(case.split is None for case in site.cases):
        return _move(site, "train", "test", _drawn(site.cases, fraction, 0, seed_for(seed, site.name, "test split")))
    return site


def split_problems(site: Site) -> list[str]:
    """One sentence for each case without a split where others have one, and for each subject in both test and training."""
    without = [case.name for case in site.cases if case.split is None]
    problems = []
    if 0 < len(without) < len(site.cases):
        problems = [
            f"site {site.name}: case {name} has no split but others do; give every case a split, or none" for name in without
        ]
    both = {case.subject for case in site.of("test")} & {case.subject for case in site.of("train", "val")}
    return problems + [
        f"site {site.name}: subject {subject} is in both test and training; put all its cases into one of them"
        for subject in sorted(both)
    ]


def hold_out_validation(site: Site, fraction: float, seed: int) -> Site:
    """Hold out a share of the training subjects for validation, unless the site has a ``val`` split already.

    At least one subject is held out, but never the only one.

    Args:
        site: the site, with its test split drawn.
        fraction: share of the training subjects; 0 holds out none.
        seed: the run's seed.
    """
    if site.of("val"):
        return site
    training = site.of("train")
    return _move(site, "train", "val", _drawn(training, fraction, 1, seed_for(seed, site.name, "validation split")))


def keep_for_training(site: Site, count: int, seed: int) -> Site:
    """Leave out all but ``count`` training subjects, so that one can see what few labelled cases give.

    The subjects are drawn at random, and those of a smaller count are among those of a larger one.

    Args:
        site: the site, with its test and validation splits drawn.
        count: number of subjects to keep. A site with fewer keeps all.
        seed: the run's seed.
    """
    subjects = sorted({case.subject for case in site.of("train")})
    order = np.random.default_rng(seed_for(seed, site.name, "training cases")).permutation(subjects).tolist()
    kept = set(order[:count])
    return replace(site, cases=tuple(case for case in site.cases if case.split != "train" or case.subject in kept))


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
