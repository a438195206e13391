"""From data to configuration to run, with nothing edited in between."""

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
def test_init_writes_a_usable_configuration(make, labels: dict, sites: list[str], tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data")
    outcome = flapsam(capfd, "init", "data")
    assert outcome.code == 0, outcome.err
    assert "flapsam simulate run.yaml" in outcome.out
    config = read_config(tmp_path / "run.yaml")
    assert config.data.labels == labels
    assert [site.name for site in read_sites(config.data, config.seed)] == sites
    assert "# " in (tmp_path / "run.yaml").read_text()
    outcome = flapsam(capfd, "simulate", "run.yaml", "--set", "rounds.count=1", "--set", "training.batch_size=12")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "runs" / "run" / "adapter" / "flapsam.json").exists()


def test_predict_reads_several_modalities_as_the_run_did(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nnunet(tmp_path / "data", 2)
    flapsam(capfd, "init", "data")
    outcome = flapsam(capfd, "simulate", "run.yaml", "--set", "rounds.count=1", "--set", "samples.size=64")
    assert outcome.code == 0, outcome.err
    outcome = flapsam(capfd, "predict", "runs/run", "data/imagesTr", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"case_{i}.nii.gz" for i in range(5)]
    expected = next((tmp_path / "runs" / "run" / "predictions" / "federated" / "all").iterdir())
    predicted = read_label(tmp_path / "out" / expected.name)
    np.testing.assert_array_equal(predicted.array, read_label(expected).array)
    single = flapsam(capfd, "predict", "runs/run", "data/imagesTr/case_0_0000.nii.gz", "-o", "other")
    assert (single.code, "the image has 1 modality, but the adapter was trained on 2" in single.err) == (1, True)


def ct(root: Path) -> None:
    """Create two sites with coronal CT slices of 240 × 100 pixels and classes between 20 and 80 Hounsfield units."""
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


def test_choices_match_hand_calculations(tmp_path: Path):
    ct(tmp_path / "data")
    look, estimate = initialise(tmp_path / "data", tmp_path / "run.yaml", Observer())
    tree = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert tree["data"] == {"path": "data", "labels": {"label_5": 5}}
    assert tree["samples"] == {"size": 224, "axis": "coronal", "clip": [20, 80], "resize": "pad"}
    # Each site has three cases, 0.68 of them for training, with two of five slices occupied. So few slices get the
    # smallest batch size.
    assert tree["training"]["batch_size"] == 4
    assert (look.slices, look.plane, look.occupied) == (5, (240, 100), pytest.approx(0.4))
    # Slightly more than 1.5 bits per parameter, both ways, in 20 rounds.
    counts = {row.strategy: row.parameters for row in strategy_table("sam-tiny", image_size=224, classes=1)}
    # The preset has adapters on keys and outputs, too, which have as many parameters as those on queries and values.
    parameters = counts["flap"] + counts["lora"]
    assert 1.5 < estimate.bytes_a_site * 8 / (parameters * 2 * 20) < 1.7
    assert estimate.seconds > 0


def test_a_known_data_set_gets_the_papers_clipping(tmp_path: Path):
    kits19(tmp_path / "data")
    initialise(tmp_path / "data", tmp_path / "run.yaml", Observer())
    config = read_config(tmp_path / "run.yaml")
    assert (config.data.layout, config.samples.site_clip["E"]) == ("fed-kits19", (-64, 236))
    assert config.data.labels["tumour"] == [2, 3, 4, 5]


def test_an_existing_file_is_kept(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("mine")
    outcome = flapsam(capfd, "init", make_sites(tmp_path / "data"))
    assert (outcome.code, "already exists" in outcome.err) == (2, True)
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_data_without_any_class_are_an_error(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sites(tmp_path / "data")
    for path in (tmp_path / "data").glob("*/labels/*"):
        save(np.zeros((20, 16, 6), np.uint8), path)
    outcome = flapsam(capfd, "init", "data")
    assert (outcome.code, "nothing to learn" in outcome.err) == (2, True)
    assert not (tmp_path / "run.yaml").exists()
