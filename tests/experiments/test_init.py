"""Data → configuration → run, with nothing edited in between."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from flapsam.experiments.init import initialise
from flapsam.federation.traffic import strategy_table
from flapsam.run.observer import Observer
from flapsam.run.reading import read_config
from flapsam.sites import read_sites
from flapsam.volumes import read_label
from tests.helpers.command import flapsam
from tests.helpers.sites import make_sites, save
from tests.sites.test_datasets import decathlon, kits19, nnunet

LAYOUTS: dict[str, tuple[Callable[[Path], object], dict, list[str]]] = {
    "a folder a site": (make_sites, {"label_1": 1, "label_2": 2}, ["site_0", "site_1"]),
    "MSD": (
        lambda root: decathlon(root, [f"case_{i}" for i in range(9)]),
        {"anterior": 1, "posterior_part": 2},
        ["site_1", "site_2"],
    ),
    "nnU-Net v2, two modalities": (lambda root: nnunet(root, 2), {"kidney": 1, "tumour": 2, "ignore": 3}, ["all"]),
}


@pytest.mark.parametrize(("make", "labels", "sites"), LAYOUTS.values(), ids=LAYOUTS)
def test_init_then_simulate(make, labels: dict, sites: list[str], tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data")
    told = flapsam(capfd, "init", "data")
    assert told.code == 0, told.err
    assert "flapsam simulate run.yaml" in told.out
    config = read_config(tmp_path / "run.yaml")
    assert config.data.labels == labels
    assert [site.name for site in read_sites(config.data, config.seed)] == sites
    assert "# " in (tmp_path / "run.yaml").read_text()
    told = flapsam(capfd, "simulate", "run.yaml", "--set", "rounds.count=1", "--set", "training.batch_size=12")
    assert told.code == 0, told.err
    assert (tmp_path / "runs" / "run" / "adapter" / "flapsam.json").exists()


def test_several_modalities_are_predicted_as_they_were_learned(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nnunet(tmp_path / "data", 2)
    flapsam(capfd, "init", "data")
    told = flapsam(capfd, "simulate", "run.yaml", "--set", "rounds.count=1", "--set", "samples.size=64")
    assert told.code == 0, told.err
    told = flapsam(capfd, "predict", "runs/run", "data/imagesTr", "-o", "out")
    assert told.code == 0, told.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"case_{i}.nii.gz" for i in range(5)]
    test = next((tmp_path / "runs" / "run" / "predictions" / "federated" / "all").iterdir())
    again = read_label(tmp_path / "out" / test.name)
    np.testing.assert_array_equal(again.array, read_label(test).array)
    alone = flapsam(capfd, "predict", "runs/run", "data/imagesTr/case_0_0000.nii.gz", "-o", "other")
    assert (alone.code, "it has 1 modalities, the adapter was trained on 2" in alone.err) == (1, True)


def ct(root: Path) -> None:
    """Two sites of coronal CT slices, 240 × 100, the classes between 20 and 80 Hounsfield units."""
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 4.0, 1.0, 1.0])
    for site in ("a", "b"):
        for index in range(3):
            image = np.full((240, 5, 100), -1000, np.int16)
            label = np.zeros(image.shape, np.uint8)
            label[50:150, 1:3, 20:80] = 5
            image[label > 0] = rng.integers(20, 81, int((label > 0).sum()))
            save(image, root / site / "images" / f"{index}.nii.gz", affine)
            save(label, root / site / "labels" / f"{index}.nii.gz", affine)


def test_choices_by_hand(tmp_path: Path):
    ct(tmp_path / "data")
    seen, estimate = initialise(tmp_path / "data", tmp_path / "run.yaml", Observer())
    tree = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert tree["data"] == {"path": "data", "labels": {"label_5": 5}}
    assert tree["samples"] == {"size": 224, "axis": "coronal", "clip": [20, 80], "resize": "pad"}
    # Three cases a site, 0.68 of them for training, five slices of which two are occupied: few, so the smallest batch.
    assert tree["training"]["batch_size"] == 4
    assert (seen.slices, seen.plane, seen.occupied) == (5, (240, 100), pytest.approx(0.4))
    # A bit and a half a parameter and a little more, both ways, 20 rounds.
    parameters = {row.strategy: row.parameters for row in strategy_table("sam-tiny", image_size=224, classes=1)}["flap"]
    assert 1.5 < estimate.bytes_a_site * 8 / (parameters * 2 * 20) < 1.7
    assert estimate.seconds > 0


def test_a_data_set_that_is_known_gets_the_papers_clipping(tmp_path: Path):
    kits19(tmp_path / "data")
    initialise(tmp_path / "data", tmp_path / "run.yaml", Observer())
    config = read_config(tmp_path / "run.yaml")
    assert (config.data.layout, config.samples.site_clip["E"]) == ("fed-kits19", (-64, 236))
    assert config.data.labels["tumour"] == [2, 3, 4, 5]


def test_a_file_that_is_there_is_kept(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("mine")
    told = flapsam(capfd, "init", make_sites(tmp_path / "data"))
    assert (told.code, "it is there already" in told.err) == (2, True)
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_without_any_class_there_is_nothing_to_write(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sites(tmp_path / "data")
    for path in (tmp_path / "data").glob("*/labels/*"):
        save(np.zeros((20, 16, 6), np.uint8), path)
    told = flapsam(capfd, "init", "data")
    assert (told.code, "nothing to learn" in told.err) == (2, True)
    assert not (tmp_path / "run.yaml").exists()
