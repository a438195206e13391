"""The cases of a run whose files are on this machine, and their volumes."""

from collections.abc import Mapping
from dataclasses import dataclass

from flapsam.base.errors import FlapsamError
from flapsam.report.run import Run
from flapsam.sites import Case, label_map, read_sites
from flapsam.sites.pairs import read_pair
from flapsam.volumes import Volume, read_label

CaseKey = tuple[str, str]
"""Site and name of a case."""


@dataclass(frozen=True)
class CaseVolumes:
    """An image with its true and its predicted label map."""

    image: Volume
    truth: Volume
    """The true label map, as class indices."""
    predicted: Volume
    """The predicted label map, as class indices."""


def cases_of(run: Run) -> dict[CaseKey, Case]:
    """The cases of a run. Empty if no case is tested yet, or if the data are not on this machine."""
    if not run.scores:
        return {}
    try:
        sites = read_sites(run.config.data, run.config.seed)
    except FlapsamError:
        return {}
    return {(case.site, case.name): case for site in sites for case in site.cases}


def subjects_of(cases: Mapping[CaseKey, Case]) -> dict[str, str]:
    """``SITE/CASE`` → subject."""
    return {f"{site}/{name}": case.subject for (site, name), case in cases.items()}


def read_volumes(run: Run, mode: str, cases: Mapping[CaseKey, Case], key: CaseKey) -> CaseVolumes:
    """Read the volumes of a test case.

    Args:
        run: the run.
        mode: the mode whose prediction is read.
        cases: the run's cases, from ``cases_of``.
        key: the site and name of the case.

    Raises:
        FlapsamError: a file is missing, broken, or does not match the others.
    """
    case = cases.get(key)
    if case is None:
        raise FlapsamError(f"its volumes are not in {run.config.data.path}")
    image, truth = read_pair(case, label_map(run.config.data, case.site))
    path = run.folder.label_map(mode, case.site, case.name)
    predicted = read_label(path)
    if predicted.array.shape != truth.array.shape:
        raise FlapsamError(f"{path}: has another shape than the image")
    return CaseVolumes(image, truth, predicted)
