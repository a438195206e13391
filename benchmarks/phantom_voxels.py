"""Dice from intensity alone on the phantom, with Gaussian mixtures over single voxels fitted on the training labels.

    python benchmarks/phantom_voxels.py FOLDER

There is one mixture per class and site (so that it knows the site's contrast), and then one per class for all sites. Each
voxel of a test case gets the likeliest class. The priors are those of the training voxels, and those of the foreground are
multiplied by a factor. The factor is the best on the test cases themselves, so no threshold could do better. The script
prints mean test Dice.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.mixture import GaussianMixture

from flapsam.learning.metrics import CaseScores, score_case, summarise
from flapsam.run.config import ClassValues, Data
from flapsam.sites import Site, label_map, read_sites
from flapsam.sites.pairs import read_pair

CLASSES: dict[str, ClassValues] = {"kidney": 1, "tumour": 2}
VOXELS_PER_CLASS = 20_000
FACTORS = (1, 2, 4, 8, 16, 32)


def voxel_dice(folder: Path, *, components: int = 4, per_site: bool = True) -> dict[str, float]:
    """Mean test Dice by class, with the mean over the classes as ``mean``."""
    data = Data(path=folder, labels=CLASSES)
    sites = read_sites(data, seed=0)
    groups = [[site] for site in sites] if per_site else [sites]
    scores: dict[float, list[CaseScores]] = {factor: [] for factor in FACTORS}
    for group in groups:
        for factor, group_scores in _score_group(group, data, components).items():
            scores[factor] += group_scores
    summary = max((summarise(case_scores) for case_scores in scores.values()), key=lambda summary: summary.mean_dice or 0.0)
    return {name: value or 0.0 for name, value in {**summary.dice, "mean": summary.mean_dice}.items()}


def _score_group(sites: list[Site], data: Data, components: int) -> dict[float, list[CaseScores]]:
    maps = {site.name: label_map(data, site.name) for site in sites}
    pairs = [read_pair(case, maps[site.name]) for site in sites for case in site.of("train")]
    intensities = np.concatenate([image.array.ravel() for image, _ in pairs]).astype(np.float64)
    labels = np.concatenate([label.array.ravel() for _, label in pairs])
    rng = np.random.default_rng(0)
    mixtures, priors = [], []
    for index in range(len(data.classes) + 1):
        voxels = intensities[labels == index]
        priors.append(len(voxels) / len(labels))
        drawn = rng.choice(voxels, min(VOXELS_PER_CLASS, len(voxels)), replace=False)
        mixtures.append(GaussianMixture(components, random_state=0).fit(drawn[:, None]))
    scores: dict[float, list[CaseScores]] = {factor: [] for factor in FACTORS}
    for site in sites:
        for case in site.of("test"):
            image, truth = read_pair(case, maps[site.name])
            column = image.array.reshape(-1, 1).astype(np.float64)
            likelihood = np.stack([m.score_samples(column) + np.log(p) for m, p in zip(mixtures, priors, strict=True)])
            for factor in FACTORS:
                weighted = likelihood + np.log(factor) * (np.arange(len(likelihood)) > 0)[:, None]
                predicted = weighted.argmax(axis=0).reshape(image.array.shape)
                scores[factor].append(score_case(case.name, site.name, predicted, truth.array, None, data.classes))
    return scores


if __name__ == "__main__":
    for per_site in (True, False):
        dice = voxel_dice(Path(sys.argv[1]), per_site=per_site)
        label = "one mixture per site" if per_site else "one mixture for all sites"
        print(label + ": " + ", ".join(f"{name} {value:.3f}" for name, value in dice.items()))
