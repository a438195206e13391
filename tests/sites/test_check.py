"""A single check of a data set that is wrong in many ways."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np

from tests.helpers.command import flapsam
from tests.helpers.sites import AFFINE, SHAPE, ball, make_site, save


def spoil(root: Path) -> dict[str, str]:
    """Write two sites that are wrong in fifteen ways. Returns each defect with the start of its message."""
    make_site(root / "a", 16)
    make_site(root / "b", 3, seed=1)
    image = {index: root / "a" / "images" / f"a_{index}.nii.gz" for index in range(16)}
    label = {index: root / "a" / "labels" / f"a_{index}.nii.gz" for index in range(16)}
    noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    label[0].unlink()
    image[1].unlink()
    save(np.zeros((20, 16, 5), np.uint8) + 1, label[2])
    moved = AFFINE.copy()
    moved[0, 3] = 12
    save(ball(SHAPE, np.random.default_rng(3)), label[3], moved)
    save(np.full(SHAPE, 7, np.uint8), label[4])
    broken = noise.copy()
    broken[0, 0, 0] = np.nan
    save(broken, image[5])
    save(np.full(SHAPE, 42, np.float32), image[6])
    image[7].write_bytes(image[7].read_bytes()[:-300])
    shutil.copy(image[9], image[8])
    save(noise, label[10])
    save(np.zeros(SHAPE, np.uint8), label[11])
    save(noise[..., 0], image[12])
    save(np.zeros((*SHAPE, 5), np.float32), image[13])
    rows = [{"case": f"a_{i}", "site": "a", "split": "train", "subject": f"p{i}"} for i in range(16)]
    rows += [{"case": f"b_{i}", "site": "b", "split": "test" if i else "train", "subject": f"q{i}"} for i in range(3)]
    rows[15] |= {"split": "test", "subject": "p14"}
    rows[14] |= {"split": "train"}
    rows.append({"case": "ghost", "site": "b", "split": "train", "subject": "q9"})
    with (root / "sites.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return {
        "label map missing": f"{label[0]}: the label map of case a_0 of site a is missing",
        "image missing": f"{image[1]}: the image of case a_1 of site a is missing",
        "shape": f"{label[2]}: its shape (20, 16, 5) differs",
        "affine": f"{label[3]}: its affine differs",
        "label value": f"{label[4]}: label value 7 belongs to no class",
        "NaN": f"{image[5]}: 1 voxels are NaN",
        "empty": f"{image[6]}: all voxels are 42",
        "truncated": f"{image[7]}: the voxels cannot be read",
        "duplicate": f"{image[9]}: the image has the same voxels as {image[8]}",
        "no whole numbers": f"{label[10]}: a label map holds whole numbers",
        "no class": f"{label[11]}: no voxel belongs to a class",
        "two dimensions": f"{image[12]}: a 3-D volume is needed",
        "too many modalities": f"{image[13]}: the file has 5 modalities",
        "subject on both sides": "site a: subject p14 is in both test and training",
        "in the table alone": f"{root}/b/images/ghost.nii.gz: the image of case ghost of site b is missing",
    }


def test_every_problem_is_found_in_one_run(tmp_path: Path, capfd):
    expected = spoil(tmp_path)
    outcome = flapsam(capfd, "data", "check", tmp_path, "--label", "1", "--label", "2", "--json")
    assert outcome.code == 2
    problems = json.loads(outcome.out)["problems"]
    for defect, start in expected.items():
        assert sum(problem.startswith(start) for problem in problems) == 1, f"{defect}: {problems}"
    # Case ghost lacks both of its files and is reported twice. Case a_1 lacks only its image.
    assert len(problems) == len(expected) + 1


def test_without_labels_every_value_is_accepted_and_reported(tmp_path: Path, capfd):
    make_site(tmp_path / "a", 3)
    outcome = flapsam(capfd, "data", "check", tmp_path)
    assert outcome.code == 0
    assert "label values: 1, 2" in outcome.out
    assert "3 cases at 1 sites, 0 problems" in outcome.out
