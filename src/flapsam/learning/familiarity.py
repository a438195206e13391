"""Whether an image looks like those that an adapter knows: its spacing, and what the encoder makes of its slices.

Intensities are judged as the network gets them, because those of MRI differ from scanner to scanner.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import stdtrit

from flapsam.learning.inference import Precision, embeddings
from flapsam.learning.slices import stack_of
from flapsam.run.config import Samples
from flapsam.sam import Sam
from flapsam.volumes import Volume

LOOKED_AT = 16
"""Number of slices that are looked at, evenly spaced over a volume."""
GRID = 2
"""Side of the grid that an embedding is averaged to. It tells where something is, such as which way is up."""
COMPONENTS = 32
"""Largest number of principal components in which images may differ."""
SLICES_EACH = 10
"""Smallest number of slices for each component."""
LEAST_DEVIATION = 0.05
"""Smallest standard deviation of a logarithmic distance, so that equal images do not make every other one unusual."""
FOLDS = 5
"""Parts of the images, each of which is judged by the others."""
FEWEST = 10
"""Smallest number of images that say what is usual."""
DEVIATIONS = 3
"""Standard deviations that a usual image may be away, or somewhat more where few images are known."""
IN_ORDER = 0.5
"""Correlation of slices' places with those that the embedding suggests, from which on it tells the order of slices."""
STRETCH = 1.5
"""Factor by which spacing may leave the range of the known images."""


@dataclass(frozen=True)
class Look:
    """What is looked at in an image."""

    features: NDArray[np.float32]
    """Averaged embeddings (slices, features)."""
    places: NDArray[np.float32]
    """Place of each of these slices in the volume, from 0 to 1."""
    spacing: tuple[float, ...]
    """Voxel spacing in mm: left-right, back-front, foot-head."""
    patient: str = ""
    """Who was imaged. Images of one patient are never judged by one another. Empty if nobody else's image is theirs."""


def look(
    network: Sam,
    volume: Volume,
    samples: Samples,
    *,
    precision: Precision = "fp32",
    site: str = "",
    patient: str = "",
) -> Look:
    """Look at up to ``LOOKED_AT`` slices of an image.

    Args:
        network: the network with its trained parameters.
        volume: the image.
        samples: how it is cut and scaled.
        precision: precision of the image encoder.
        site: the volume's site, which matters where sites clip intensities differently.
        patient: who was imaged.
    """
    stack = stack_of(volume, samples, site)
    chosen = np.unique(np.linspace(0, len(stack) - 1, LOOKED_AT).round().astype(int)).tolist()
    found = [
        F.adaptive_avg_pool2d(part.float(), GRID).flatten(1).cpu().numpy()
        for part in embeddings(network, stack, chosen, precision=precision)
    ]
    places = np.array(chosen, np.float32) / np.float32(max(len(stack) - 1, 1))
    return Look(np.concatenate(found), places, tuple(volume.to_canonical().spacing), patient)


@dataclass(frozen=True)
class Components:
    """Principal components of the slices of some images."""

    mean: NDArray[np.float32]
    """Mean of the slices (features,)."""
    basis: NDArray[np.float32]
    """Principal components (components, features)."""
    deviations: NDArray[np.float32]
    """Standard deviation along each component."""
    rest: NDArray[np.float32]
    """Mean squared distance of slices from the components, shape (1,)."""
    order: NDArray[np.float32]
    """Weights that tell a slice's place from its components, and a constant; empty if they do not."""

    def distances(self, image: Look) -> NDArray[np.float64]:
        """Logarithms of an image's mean squared distances, within the components (Mahalanobis) and away from them."""
        centred = (image.features - self.mean).astype(np.float64)
        scores = centred @ self.basis.T
        away = ((centred - scores @ self.basis) ** 2).sum(axis=1).mean() / float(self.rest[0])
        within = ((scores / self.deviations) ** 2).mean()
        return np.log(np.maximum([within, away], 1e-12))

    def agreement(self, image: Look) -> float:
        """Correlation of slices' places with those that their embeddings suggest; 0 where one of them is constant."""
        scores = (image.features - self.mean) @ self.basis.T / self.deviations
        suggested = scores @ self.order[:-1] + self.order[-1]
        if suggested.std() == 0 or image.places.std() == 0:
            return 0.0
        return float(np.corrcoef(suggested, image.places)[0, 1])


@dataclass(frozen=True)
class Familiar(Components):
    """What known images look like: principal components of their slices, and how far they are from one another.

    The distances of an image are compared with those of the known images, each judged by components of the others.
    """

    usual: NDArray[np.float32]
    """Largest usual value of both distances, shape (2,)."""
    spacing: NDArray[np.float32]
    """Smallest and largest spacing in mm (2, 3)."""

    @classmethod
    def of(cls, looks: Sequence[Look]) -> "Familiar":
        """What at least ``FEWEST`` images of at least ``FOLDS`` patients look like."""
        patients = [one.patient or str(number) for number, one in enumerate(looks)]
        place_of = {patient: place for place, patient in enumerate(dict.fromkeys(patients))}
        fold_of = [place_of[patient] % FOLDS for patient in patients]
        distances, agreements = [], []
        for fold in range(FOLDS):
            others = components([one for one, own in zip(looks, fold_of, strict=True) if own != fold])
            judged = [one for one, own in zip(looks, fold_of, strict=True) if own == fold]
            distances += [others.distances(one) for one in judged]
            agreements += [others.agreement(one) for one in judged]
        count = len(looks)
        # As in a prediction interval, because mean and deviation are estimates, too.
        reach = stdtrit(count - 1, _normal(DEVIATIONS)) * math.sqrt(1 + 1 / count)
        deviation = np.maximum(np.std(distances, axis=0, ddof=1), LEAST_DEVIATION)
        known = components(looks)
        spacing = np.array([one.spacing for one in looks])
        return cls(
            known.mean,
            known.basis,
            known.deviations,
            known.rest,
            known.order if np.quantile(agreements, 0.05) > IN_ORDER else known.order[:0],
            (np.mean(distances, axis=0) + reach * deviation).astype(np.float32),
            np.stack([spacing.min(axis=0), spacing.max(axis=0)]).astype(np.float32),
        )

    def unusual(self, image: Look) -> list[str]:
        """Reasons, in words, why an image is unlike the known ones. Empty if it is like them."""
        reasons = []
        low, high = self.spacing
        if any(
            one < least / STRETCH or one > most * STRETCH for one, least, most in zip(image.spacing, low, high, strict=True)
        ):
            reasons.append(f"spacing {_text(image.spacing)} mm, known are {_text(low)} to {_text(high)}")
        if (self.distances(image) > self.usual).any():
            reasons.append("slices look different")
        elif len(self.order) and self.agreement(image) < 0:
            reasons.append("slices seem to be in reverse order")
        return reasons

    def fits(self) -> bool:
        """Whether the arrays fit together, and are finite. Those from a file may be anything."""
        count, size = self.basis.shape if self.basis.ndim == 2 else (0, 0)
        shapes = {
            "mean": (size,),
            "deviations": (count,),
            "rest": (1,),
            "usual": (2,),
            "order": (count + 1,) if self.order.size else (0,),
            "spacing": (2, 3),
        }
        positive = (self.deviations > 0).all() and (self.rest > 0).all()
        return (
            count > 0
            and bool(positive)
            and all(
                array.dtype == np.float32 and np.isfinite(array).all() and array.shape == shapes.get(name, array.shape)
                for name, array in self.tensors().items()
            )
        )

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Name → array, for a file. They are in the order of C, because safetensors writes memory as it lies."""
        return {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}


def components(looks: Sequence[Look]) -> Components:
    """The principal components of images' slices, of which the places are known."""
    features = np.concatenate([one.features for one in looks]).astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    # Fewer components where there are few slices, so that each is known from several.
    kept = max(1, min(COMPONENTS, len(features) // SLICES_EACH, int((values > values[-1] * 1e-9).sum())))
    basis, variances = vectors[:, ::-1][:, :kept].T, values[::-1][:kept]
    rest = max(float(values[:-kept].sum()), float(values.sum()) * 1e-9, 1e-30)
    deviations = np.sqrt(np.maximum(variances, 1e-30))
    scores = np.column_stack([centred @ basis.T / deviations, np.ones(len(centred))])
    order = np.linalg.lstsq(scores, np.concatenate([one.places for one in looks]), rcond=None)[0]
    return Components(*(np.asarray(array, np.float32) for array in (mean, basis, deviations, [rest], order)))


def _normal(deviations: float) -> float:
    """Probability that a normal variable is at most so many standard deviations above its mean."""
    return (1 + math.erf(deviations / math.sqrt(2))) / 2


def _text(spacing: Any) -> str:
    return " × ".join(f"{float(step):.3g}" for step in spacing)
