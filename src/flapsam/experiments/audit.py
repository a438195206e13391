"""Membership inference on a finished adapter: can its losses tell who was in the training data?"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, mannwhitneyu

from flapsam.adapters.store import load_adapter
from flapsam.adapters.trained import find_trained
from flapsam.base.errors import FlapsamError
from flapsam.experiments.paired import RESAMPLES
from flapsam.experiments.simulation import divided
from flapsam.learning.prepared import PreparedCase, prepare
from flapsam.learning.training import batch_of, loss_of
from flapsam.run.config import Checkpoint, Privacy, RunConfig
from flapsam.run.observer import Observer
from flapsam.sam import Sam
from flapsam.sites import label_map, read_sites

FALSE = (0.01, 0.05)
"""Shares of others that are wrongly suspected."""
AT_ONCE = 8
"""Number of slices that pass through the network at once."""


@dataclass(frozen=True)
class Found:
    """How many members are found with few false suspicions."""

    false: float
    """Largest share of others that is wrongly suspected."""
    share: float
    """Share of members that is found."""
    low: float
    """Lower end of the 95 % interval (Clopper and Pearson), for the threshold that these others set."""
    high: float
    """Upper end of the interval."""


@dataclass(frozen=True)
class Audit:
    """Outcome of the attack, over patients."""

    adapter: str
    members: int
    """Number of patients that the adapter was trained on."""
    others: int
    """Number of patients that were held out for the test."""
    auc: float
    """Probability that a member has a lower loss than another patient, ½ for ties. A guess has 0.5."""
    low: float
    """Lower end of the 95 % bootstrap interval over patients."""
    high: float
    """Upper end of the interval."""
    found: tuple[Found, ...]
    privacy: Privacy | None
    """The differential privacy that the adapter declares."""
    losses: Mapping[str, Mapping[str, float]]
    """``members`` or ``others`` → site and patient → loss."""

    def as_json(self) -> dict[str, Any]:
        """The audit for other programs and for the files of a data custodian."""
        return {**asdict(self), "privacy": self.privacy.model_dump() if self.privacy else None}


def audit(
    path: Path, data: Path | None = None, checkpoint: Checkpoint | None = None, observer: Observer | None = None
) -> Audit:
    """Attack an adapter with its own losses (Yeom et al. 2018, arXiv 1709.01604).

    Members are the patients that the run trained on, and the others are its test patients. Patients held out for validation
    are left out. A patient's loss is the training loss over all slices, without augmentation, averaged over the cases. The
    lower it is, the more the attack suspects that the patient was a member.

    Args:
        path: the folder of a simulated run, or of an adapter in one.
        data: folder of the data, if it is no longer where the run found it.
        checkpoint: the backbone's checkpoint, if it is not where the run found it.
        observer: follows the cases.

    Raises:
        FlapsamError: there is no run, its data cannot be read, or it has too few patients.
    """
    observer = observer or Observer()
    trained = find_trained(path)
    if trained.run is None:
        raise FlapsamError(f"{path}: this adapter lies in no run, which says who was trained on; name the run's folder")
    config = trained.run
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
    network, card = load_adapter(trained.folder, checkpoint or trained.checkpoint)
    config = config.model_copy(update={"samples": card.samples})
    sites = divided(config, read_sites(config.data, config.seed))
    groups = {
        "members": [case for site in sites if site.name not in config.data.unseen for case in site.of("train")],
        "others": [case for site in sites for case in site.of("test")],
    }
    observer.begin("losses", sum(map(len, groups.values())))
    losses: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as cache:
        for group, cases in groups.items():
            by_patient: dict[str, list[float]] = defaultdict(list)
            for case in cases:
                folder = Path(cache) / case.site
                unpacked = prepare(case, label_map(config.data, case.site), config.samples, folder)
                by_patient[f"{case.site}/{unpacked.patient}"].append(loss_of_case(network, unpacked, config))
                observer.step()
            losses[group] = {patient: float(np.mean(values)) for patient, values in sorted(by_patient.items())}
    observer.end()
    members, others = (np.array(list(losses[group].values())) for group in ("members", "others"))
    if min(len(members), len(others)) < 2:
        raise FlapsamError(
            f"{path}: the run has {len(members)} training patients and {len(others)} test patients; an audit needs at least "
            "2 of each"
        )
    low, high = interval(members, others)
    return Audit(
        adapter=str(trained.folder),
        members=len(members),
        others=len(others),
        auc=auc(members, others),
        low=low,
        high=high,
        found=tuple(found(members, others, share) for share in FALSE),
        privacy=card.privacy,
        losses=losses,
    )


def allowed(false: float, privacy: Privacy) -> float:
    """Largest share of members that any attack can find, by differential privacy (Kairouz et al. 2015, arXiv 1311.0776).

    Args:
        false: share of others that is wrongly suspected.
        privacy: the ε and δ that hold for each patient.
    """
    epsilon, delta = privacy.epsilon, privacy.delta
    return max(0.0, min(1.0, math.exp(min(epsilon, 700)) * false + delta, 1 - math.exp(-epsilon) * (1 - false - delta)))


@torch.inference_mode()
def loss_of_case(network: Sam, case: PreparedCase, config: RunConfig) -> float:
    """The training loss of a case, averaged over its slices, without augmentation."""
    network.eval()
    options = config.training.model_copy(update={"augment": "none", "window": 1})
    rng, device = np.random.default_rng(0), network.pixel_mean.device
    total = 0.0
    for start in range(0, case.slices, AT_ONCE):
        shown = [(case, centre) for centre in range(start, min(start + AT_ONCE, case.slices))]
        batch = batch_of(shown, options, config.samples, network.image_size, rng)
        loss = loss_of(partial(network, depth=1), batch, device, options, "fp32")
        total += float(loss.total) * len(shown)
    return total / case.slices


def auc(members: NDArray, others: NDArray) -> float:
    """Probability that a member's loss is lower than another patient's, ½ for ties.

    Args:
        members: losses (members,).
        others: losses (others,).
    """
    return float(mannwhitneyu(others, members).statistic) / len(members) / len(others)


def interval(members: NDArray, others: NDArray) -> tuple[float, float]:
    """The 95 % interval of ``auc``, a percentile bootstrap over patients. Both arguments are as in ``auc``."""
    result = bootstrap(
        (members, others), auc, n_resamples=RESAMPLES, paired=False, vectorized=False, method="percentile", rng=0
    ).confidence_interval
    return float(result.low), float(result.high)


def found(members: Sequence[float] | NDArray, others: Sequence[float] | NDArray, false: float) -> Found:
    """How many members are found if at most a share of the others is wrongly suspected.

    Args:
        members: losses (members,).
        others: losses (others,).
        false: the share.
    """
    # Suspects have a lower loss than the first of the others that must not be suspected.
    threshold = np.sort(np.asarray(others))[int(false * len(others))]
    hits = int((np.asarray(members) < threshold).sum())
    bounds = binomtest(hits, len(members)).proportion_ci()
    return Found(false, hits / len(members), float(bounds.low), float(bounds.high))
