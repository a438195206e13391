"""Every data set, read from a miniature with exactly its layout."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest

from flapsam.base.errors import FlapsamError
from flapsam.experiments.settings import SETTINGS, read_settings
from flapsam.learning.prepared import prepare
from flapsam.run.config import Data
from flapsam.sites import DATASETS, find_dataset, label_map, read_found, read_sites
from flapsam.volumes import read_geometry, read_image, slice_count
from tests.helpers.places import SHARED, SOURCE
from tests.helpers.sites import ball, make_sites, save

SMALL = (6, 5, 4)
TABLES = SOURCE / "sites" / "tables"
IPL = np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-5.0, 0, 0, 0], [0, 0, 0, 1]])
"""The affine of KiTS19's files: array axis 0 points down, axis 1 to the back, axis 2 to the left."""


def rows(name: str) -> list[dict[str, str]]:
    with (TABLES / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def image(index: int = 0, shape: tuple[int, ...] = SMALL) -> np.ndarray:
    return np.random.default_rng(index).normal(100, 60, shape).astype(np.float32)


def label(index: int = 0, shape: tuple[int, ...] = SMALL) -> np.ndarray:
    return ball(shape, np.random.default_rng(index))


def kits19(root: Path) -> None:
    for index, row in enumerate(rows("fed_kits19")):
        folder = root / "data" / row["case"]
        truth = label(index).astype(np.uint16 if index % 24 == 0 else np.uint8)
        truth[0, 0, 0] = 3
        save(image(index).astype(np.float64), folder / "imaging.nii.gz", IPL)
        save(truth, folder / "segmentation.nii.gz", IPL)
    save(image(), root / "data" / "case_00299" / "imaging.nii.gz", IPL)


def ixi_tiny(root: Path) -> None:
    for row in rows("fed_ixi"):
        name = f"{row['case']}-0828"
        save(image(shape=(2, 2, 2)), root / "IXI_sample" / name / "T1" / f"{name}_image.nii.gz")
        save(np.ones((2, 2, 2), np.uint8), root / "IXI_sample" / name / "label" / f"{name}_label.nii.gz")


def ixi_full(root: Path) -> None:
    for row in rows("fed_ixi"):
        name = f"{row['case']}-0828-T1.nii.gz"
        save(image(shape=(2, 2, 2)), root / name)
        save(np.ones((2, 2, 2), np.uint8), root / "masks" / name)


def prostate(root: Path) -> None:
    for index, row in enumerate(rows("fed_prostate")):
        folder, word = root / row["site"], "Segmentation" if index % 5 == 0 else "segmentation"
        save(image(index), folder / f"{row['case']}.nii.gz")
        save(label(index), folder / f"{row['case']}_{word}.nii.gz")


def decathlon(root: Path, names: list[str], modalities: int = 1, title: str = "Other", suffix: bool = False) -> None:
    for index, name in enumerate(names):
        shape = SMALL if modalities == 1 or suffix else (*SMALL, modalities)
        for number in range(modalities if suffix else 1):
            save(image(index, shape), root / "imagesTr" / f"{name}{f'_000{number}' if suffix else ''}.nii.gz")
        save(label(index), root / "labelsTr" / f"{name}.nii.gz")
        (root / "imagesTr" / f"._{name}.nii.gz").write_bytes(b"macOS")
    description = {
        "name": title,
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior Part"},
        "modality": {str(number): "MRI" for number in range(modalities)},
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
        "test": ["./imagesTs/other.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(description))


def hippocampus(root: Path) -> None:
    decathlon(root, [row["case"] for row in rows("hippocampus")] + ["hippocampus_118"], title="Hippocampus")


def nnunet(root: Path, modalities: int = 1) -> None:
    for index in range(5):
        for number in range(modalities):
            save(image(index + number), root / "imagesTr" / f"case_{index}_000{number}.nii.gz")
        save(label(index), root / "labelsTr" / f"case_{index}.nii.gz")
    description = {
        "channel_names": {str(number): "CT" for number in range(modalities)},
        "labels": {"background": 0, "kidney": 1, "tumour": 2, "ignore": 3},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))


@dataclass(frozen=True)
class Miniature:
    dataset: str
    make: Callable[[Path], object]
    labels: dict
    sites: dict[str, tuple[int, int] | int]
    """Site → number of cases for training and for the test, or their sum where the data define no split."""
    modalities: int = 1


KITS = {"A": (9, 3), "B": (11, 3), "C": (9, 3), "D": (9, 3), "E": (12, 4), "F": (24, 6)}
IXI = {"Guys": (249, 62), "HH": (145, 36), "IOP": (59, 15)}
PROSTATE = {"RUNMC": (24, 6), "BMC": (24, 6), "I2CVB": (15, 4), "UCL": (10, 3), "BIDMC": (9, 3), "HK": (9, 3)}
HIPPOCAMPUS = {"site_1": 30, "site_2": 24, "site_3": 15, "site_4": 22, "site_5": 22, "site_6": 22}
MINIATURES = [
    Miniature("folders", make_sites, {}, {"site_0": 4, "site_1": 4}),
    Miniature("msd", lambda p: decathlon(p, ["a", "b"]), {"anterior": 1, "posterior_part": 2}, {"all": 2}),
    Miniature("msd", lambda p: decathlon(p, ["a"], 2), {"anterior": 1, "posterior_part": 2}, {"all": 1}, modalities=2),
    Miniature(
        "msd", lambda p: decathlon(p, ["a"], 2, suffix=True), {"anterior": 1, "posterior_part": 2}, {"all": 1}, modalities=2
    ),
    Miniature("nnunet", nnunet, {"kidney": 1, "tumour": 2, "ignore": 3}, {"all": 5}),
    Miniature("nnunet", lambda p: nnunet(p, 3), {"kidney": 1, "tumour": 2, "ignore": 3}, {"all": 5}, modalities=3),
    Miniature("hippocampus", hippocampus, {"anterior": 1, "posterior": 2}, dict(HIPPOCAMPUS)),
    Miniature("fed-kits19", kits19, {"kidney": 1, "tumour": [2, 3, 4, 5]}, dict(KITS)),
    Miniature("fed-ixi", ixi_tiny, {"brain": 1}, dict(IXI)),
    Miniature("fed-ixi", ixi_full, {"brain": 1}, dict(IXI)),
    Miniature("fed-prostate", prostate, {"prostate": [1, 2]}, dict(PROSTATE)),
]


def test_every_data_set_has_a_miniature():
    assert {miniature.dataset for miniature in MINIATURES} == set(DATASETS)


@pytest.mark.parametrize("miniature", MINIATURES, ids=lambda m: f"{m.dataset}-{m.modalities}")
def test_every_data_set_reads_its_miniature(miniature: Miniature, tmp_path: Path):
    miniature.make(tmp_path)
    dataset = find_dataset(tmp_path)
    assert dataset.name == miniature.dataset
    labels = dict(dataset.labels(tmp_path))
    assert labels == miniature.labels
    data = Data(path=tmp_path, labels=labels or {"ball": 1, "core": 2})
    sites, problems = read_found(data, 0)
    assert problems == []
    counts = {site.name: (len(site.of("train", "val")), len(site.of("test"))) for site in sites}
    assert {name: count if isinstance(miniature.sites[name], tuple) else sum(count) for name, count in counts.items()} == (
        miniature.sites
    )
    case = sites[0].cases[0]
    assert read_image(*case.images).modalities == miniature.modalities
    for site in sites:
        for case in site.cases[:2]:
            prepare(case, label_map(data, site.name), read_samples(miniature.dataset), tmp_path / "cache" / site.name)


def read_samples(name: str):
    return read_settings(name if name in SETTINGS else "hippocampus", Path()).samples


@pytest.mark.skipif(not (SHARED / "facts").exists(), reason="the fact tables are missing")
@pytest.mark.parametrize(
    ("name", "facts", "key"),
    [
        ("fed_kits19", "fedkits19_sites_named", lambda r: (r["case"], r["site_letter"], r["split"])),
        ("fed_ixi", "fedixi_sites", lambda r: (f"{r['ixi_id']}-{r['filename_token']}", r["filename_token"], r["split"])),
        ("fed_prostate", "prostate_sites", lambda r: (r["raw_image"].split("/")[1][:-7], r["raw_folder"], r["split"])),
    ],
)
def test_the_site_tables_match_the_fact_tables(name: str, facts: str, key: Callable):
    with (SHARED / "facts" / f"{facts}.csv").open(newline="") as file:
        expected = sorted(key(row) for row in csv.DictReader(file))
    assert sorted((row["case"], row["site"], row["split"]) for row in rows(name)) == expected


@pytest.mark.skipif(not (SHARED / "data" / "hippocampus").exists(), reason="the hippocampus volumes are missing")
def test_the_hippocampus_table_matches_the_folder():
    data = Data(path=SHARED / "data" / "hippocampus", labels={"anterior": 1, "posterior": 2})
    cases = [(c.name, site.name, c.split, c.subject) for site in read_sites(data, 0) for c in site.cases]
    assert sorted(cases) == sorted((r["case"], r["site"], r["split"], r["subject"]) for r in rows("hippocampus"))


def first_case(tmp_path: Path, make: Callable[[Path], object], name: str, site: str):
    make(tmp_path)
    config = read_settings(name, tmp_path)
    case = next(s for s in read_sites(config.data, 0) if s.name == site).cases[0]
    prepared = prepare(case, label_map(config.data, site), config.samples, tmp_path / "cache")
    return case, prepared, config.samples


def test_kits19_is_prepared_as_in_the_paper(tmp_path: Path):
    case, prepared, samples = first_case(tmp_path, kits19, "fed-kits19", "B")
    stored = np.asarray(nibabel.load(case.image).dataobj)  # type: ignore[attr-defined]
    assert "".join(nibabel.aff2axcodes(nibabel.load(case.image).affine)) == "IPL"  # type: ignore[attr-defined]
    assert prepared.slices == SMALL[0] == slice_count(*read_geometry(case.image), samples.axis)
    scores = (stored.clip(-77, 341) - 110.722) / 84.011
    # The file counts its slices from above: its slice 2 is slice 3 from below, whose window is slices 0 to 4 of the file.
    window = scores[0:5]
    expected = (scores[2] - window.min()) / (window.max() - window.min() + 1e-8)
    actual = prepared.window(3, 1, samples)[0][0, 0].numpy()
    # The canonical axes point right and to the front, those of the file left and to the back.
    np.testing.assert_allclose(actual, expected[::-1, ::-1].T, atol=1e-5)
    assert set(np.unique(prepared.labels())) <= {0, 1, 2}
    assert prepared.labels().max() == 2


def test_prostate_is_prepared_as_in_the_paper(tmp_path: Path):
    case, prepared, samples = first_case(tmp_path, prostate, "fed-prostate", "BMC")
    stored = np.asarray(nibabel.load(case.image).dataobj)  # type: ignore[attr-defined]
    clipped = stored.clip(None, np.percentile(stored, 99))
    expected = (clipped[..., 1] - clipped.min()) / (clipped.max() - clipped.min() + 1e-8)
    # The volume has four slices, and the window of slice 1 is 0 0 1 2 3, which covers all of them.
    np.testing.assert_allclose(prepared.window(1, 1, samples)[0][0, 0].numpy(), expected, atol=1e-6)
    assert set(np.unique(prepared.labels())) <= {0, 1}


def test_the_settings_agree_with_the_data_sets():
    sites = {"A": (-66, 208), "B": (-77, 341), "C": (-89, 325), "D": (-64, 202), "E": (-64, 236), "F": (-82, 288)}
    for name, dataset in DATASETS.items():
        if dataset.named:
            config = read_settings(name, Path("x"))
            assert config.data.labels == dataset.labels(Path())
            assert config.samples.site_clip == (sites if name == "fed-kits19" else {})


def test_data_without_sites_take_a_table_or_simulated_sites(tmp_path: Path):
    nnunet(tmp_path)
    labels: dict = {"kidney": 1, "tumour": 2}
    simulated = read_sites(Data(path=tmp_path, labels=labels, simulated_sites=2), 0)
    assert [(site.name, len(site.cases)) for site in simulated] == [("site_1", 3), ("site_2", 2)]
    table = tmp_path / "who.csv"
    table.write_text("case,site,split,subject\ncase_0,x,train,p\ncase_1,y,test,q\n")
    sites = read_sites(Data(path=tmp_path, labels=labels, table=table), 0)
    assert [(s.name, c.name, c.split, c.subject) for s in sites for c in s.cases] == [
        ("x", "case_0", "train", "p"),
        ("y", "case_1", "test", "q"),
    ]
    table.write_text("case,site\ncase_9,x\n")
    with pytest.raises(FlapsamError, match="case case_9 is not in the data"):
        read_sites(Data(path=tmp_path, labels=labels, table=table), 0)
    with pytest.raises(FlapsamError, match="6 sites are too many for 5 subjects"):
        read_sites(Data(path=tmp_path, labels=labels, simulated_sites=6), 0)


def test_data_with_sites_refuse_simulated_sites(tmp_path: Path):
    with pytest.raises(FlapsamError, match="have sites of their own"):
        read_sites(Data(path=make_sites(tmp_path), labels={"ball": 1, "core": 2}, simulated_sites=2), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "must be a mapping"), ('{"training": [1]}', "'training.0': must be a mapping")],
)
def test_a_broken_description_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(FlapsamError, match=message):
        read_sites(Data(path=tmp_path, layout="msd", labels={"a": 1}), 0)


def test_nnunet_regions_and_other_formats_are_refused(tmp_path: Path):
    nnunet(tmp_path)
    description = json.loads((tmp_path / "dataset.json").read_text())
    regions = {**description, "labels": {"background": 0, "whole": [1, 2], "core": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(regions))
    with pytest.raises(FlapsamError, match="regions overlap"):
        DATASETS["nnunet"].labels(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({**description, "file_ending": ".mha"}))
    with pytest.raises(FlapsamError, match=r"convert them to \.nii\.gz"):
        find_dataset(tmp_path).read(tmp_path)


def test_nnunets_own_list_of_files_is_read(tmp_path: Path, monkeypatch):
    nnunet(tmp_path / "elsewhere")
    monkeypatch.setenv("PLACE", str(tmp_path / "elsewhere"))
    files = {"images": ["$PLACE/imagesTr/case_1_0000.nii.gz"], "label": "elsewhere/labelsTr/case_1.nii.gz"}
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"kidney": 1},
        "file_ending": ".nii.gz",
        "dataset": {"one": files},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    listing = find_dataset(tmp_path).read(tmp_path)
    assert [(case.name, case.image.exists(), case.label.exists()) for case in listing.cases] == [("one", True, True)]


def test_an_empty_folder_has_an_unknown_layout(tmp_path: Path):
    with pytest.raises(FlapsamError, match="unknown layout"):
        find_dataset(tmp_path)
