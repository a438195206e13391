"""Validation scores of a site whose label maps have voxels to ignore, classes that are absent, or a class not annotated."""

from pathlib import Path

import numpy as np
import pytest

from flapsam.federation.client import score_cases
from flapsam.learning.metrics import summarise
from flapsam.learning.prepared import prepare
from flapsam.run.config import RunConfig
from flapsam.sites import Case, label_map
from tests.helpers.sites import AFFINE, save
from tests.learning.test_slices import Brightest

IMAGE = np.zeros((64, 64, 4), np.float32)
IMAGE[8:24, 12:20] = 1
IMAGE[40:48, 12:20] = 1
"""Two bright blocks, of 16 and of 8 planes, which the network predicts as class 1."""


def scored(tmp_path: Path, truth: np.ndarray, **data: object) -> dict[str, float | None]:
    labels = {"ball": 1, "core": 2, "ignore": 255}
    config = RunConfig.model_validate(
        {
            "data": {"path": tmp_path, "labels": labels, **data},
            "samples": {"scaling": "volume", "size": 64},
            "inference_batch": 4,
        }
    )
    image, label = save(IMAGE, tmp_path / "a.nii.gz", AFFINE), save(truth, tmp_path / "a_label.nii.gz", AFFINE)
    case = prepare(Case("a", "s", "a", image, label), label_map(config.data, "s"), config.samples, tmp_path / "cache")
    summary = summarise(score_cases(Brightest(), [case], config))  # type: ignore[arg-type]
    return {"mean": summary.mean_dice, **summary.dice}


def test_ignored_voxels_are_left_out_and_absent_classes_have_no_dice(tmp_path: Path):
    truth = np.zeros(IMAGE.shape, np.uint8)
    truth[8:24, 12:20], truth[40:48, 12:20] = 1, 255
    assert scored(tmp_path, truth) == {"mean": pytest.approx(1, abs=0.02), "ball": pytest.approx(1, abs=0.02), "core": None}


@pytest.mark.parametrize("annotated", [True, False])
def test_background_counts_for_the_classes_that_a_site_annotates(annotated: bool, tmp_path: Path):
    truth = np.zeros(IMAGE.shape, np.uint8)
    truth[8:24, 12:20] = 1
    site_labels = {} if annotated else {"s": {"core": None}}
    # The second block is wrong: 2 · 16 / (16 + 24).
    assert scored(tmp_path, truth, site_labels=site_labels)["ball"] == pytest.approx(0.8, abs=0.02)
