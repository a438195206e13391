import csv
from pathlib import Path

import numpy as np
import pytest

from flapsam.base.errors import FlapsamError
from flapsam.experiments.phantom import make_phantom
from flapsam.federation.shares import client_shares, training_size
from flapsam.run.config import Data, Rounds, RunConfig, Split
from flapsam.sites import HIDDEN, IGNORED, Case, Site, hold_out_validation, keep_for_training, label_map, read_sites
from tests.helpers.places import SHARED
from tests.helpers.sites import make_site, make_sites


def write_table(root: Path, rows: list[dict[str, str]]) -> None:
    with (root / "sites.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def data(path: Path, **fields) -> Data:
    return Data(path=path, **{"labels": {"ball": 1, "core": 2}, **fields})


def test_without_a_table_test_cases_are_drawn_at_each_site_by_seed(tmp_path: Path):
    for number in range(2):
        make_site(tmp_path / f"site_{number}", 10, seed=number, shape=(4, 4, 2))
    first, repeated, reseeded = (read_sites(data(tmp_path), seed) for seed in (0, 0, 1))
    assert [len(site.of("test")) for site in first] == [2, 2]
    assert first == repeated
    assert [site.of("test") for site in first] != [site.of("test") for site in reseeded]


def test_a_table_sets_split_and_subject(tmp_path: Path):
    make_sites(tmp_path, sites=1, cases=4)
    splits = ["train", "train", "val", "test"]
    rows = [{"case": f"site_0_{i}", "site": "site_0", "split": s, "subject": f"s{i // 2}"} for i, s in enumerate(splits)]
    rows[3]["subject"] = "s9"
    write_table(tmp_path, rows)
    (site,) = read_sites(data(tmp_path), 0)
    assert [(case.name, case.split, case.subject) for case in site.cases] == [
        ("site_0_0", "train", "s0"),
        ("site_0_1", "train", "s0"),
        ("site_0_2", "val", "s1"),
        ("site_0_3", "test", "s9"),
    ]
    assert hold_out_validation(site, 0.5, 0) == site


def test_validation_cases_are_drawn_by_subject():
    cases = tuple(Case(f"c{i}", "a", f"s{i // 2}", Path(), Path(), "train" if i < 8 else "test") for i in range(10))
    site = hold_out_validation(Site("a", cases), 0.15, seed=0)
    assert len(site.of("val")) == 2
    assert len({case.subject for case in site.of("val")}) == 1
    assert not {case.subject for case in site.of("val")} & {case.subject for case in site.of("train")}
    assert site.of("test") == list(cases[8:])


def test_few_training_subjects_are_among_more_of_them_and_bring_all_their_cases():
    splits: dict[int, Split] = {**dict.fromkeys(range(12), "train"), 12: "val", 13: "val", 14: "test", 15: "test"}
    site = Site("a", tuple(Case(f"c{i}", "a", f"s{i // 2}", Path(), Path(), split) for i, split in splits.items()))
    kept = {count: keep_for_training(site, count, seed=0) for count in (1, 2, 4, 6, 9)}
    assert [len(few.of("train")) for few in kept.values()] == [2, 4, 8, 12, 12]
    for fewer, more in zip(kept.values(), list(kept.values())[1:], strict=False):
        assert set(fewer.cases) <= set(more.cases)
    assert kept[9] == site
    assert all(few.of("val", "test") == site.of("val", "test") for few in kept.values())
    others = {tuple(case.subject for case in keep_for_training(site, 2, seed).of("train")) for seed in range(8)}
    assert len(others) > 1


def test_the_only_training_subject_is_not_held_out():
    site = Site("a", (Case("c", "a", "s", Path(), Path(), "train"),))
    assert hold_out_validation(site, 0.5, seed=0) == site


def table_row(**fields: str) -> dict[str, str]:
    return {"case": "site_0_0", "site": "site_0", "split": "train", "subject": "s", **fields}


WRONG_TABLES = {
    "no such case": ([table_row(case="nobody")], "the image of case .* is missing; add it or remove the case"),
    "no such split": ([table_row(split="holdout")], "use train, val or test"),
    "twice": ([table_row(), table_row()], "is listed twice"),
    "column missing": ([{"case": "site_0_0"}], "column site is missing"),
    "half a split": ([table_row(), table_row(case="site_0_1", split="")], "give every case a split, or none"),
    "subject on both sides": ([table_row(), table_row(case="site_0_1", split="test")], "subject s is in both test"),
}


@pytest.mark.parametrize(("rows", "message"), WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_a_wrong_table_is_refused(rows: list[dict[str, str]], message: str, tmp_path: Path):
    make_sites(tmp_path, sites=1, cases=2)
    write_table(tmp_path, rows)
    with pytest.raises(FlapsamError, match=message):
        read_sites(data(tmp_path), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column case, site is missing"),
        ("case,site\n", "there are no rows below the header"),
        ("case,site\nsite_0_0\n", "line 2: it has no site, only 'site_0_0'"),
        ("case,site\nsite_0_0,site_0\nsite_0_1,site_0,train\n", "line 3: it has 3 cells, the header 2"),
        ("case,site\n,site_0\n", "line 2: it has no case, only ',site_0'"),
        (f"case,site\n{'a' * 300},site_0\n", "line 2, case: 'aaa"),
        (f"case,site\n{'a' * 200_000},site_0\n", "cannot be read as CSV"),
    ],
)
def test_a_table_with_too_few_or_too_many_cells_is_refused(text: str, message: str, tmp_path: Path):
    make_sites(tmp_path, sites=1, cases=2)
    (tmp_path / "sites.csv").write_text(text)
    with pytest.raises(FlapsamError, match=message):
        read_sites(data(tmp_path), 0)


def test_a_missing_label_map_is_refused(tmp_path: Path):
    make_sites(tmp_path, sites=1, cases=2)
    (tmp_path / "site_0" / "labels" / "site_0_1.nii.gz").unlink()
    with pytest.raises(FlapsamError, match=r"site_0_1\.nii\.gz: the label map of case site_0_1 of site site_0 is missing"):
        read_sites(data(tmp_path), 0)


def test_unknown_sites_and_layouts_are_refused(tmp_path: Path):
    make_sites(tmp_path)
    with pytest.raises(FlapsamError, match="no site 'x'"):
        read_sites(data(tmp_path, sites=["x"]), 0)
    with pytest.raises(FlapsamError, match="no site 'y'"):
        read_sites(data(tmp_path, site_labels={"y": {"ball": 3}}), 0)
    with pytest.raises(FlapsamError, match="layout 'bids' is unknown"):
        read_sites(data(tmp_path, layout="bids"), 0)
    with pytest.raises(FlapsamError, match="no such folder"):
        read_sites(data(tmp_path / "nowhere"), 0)
    assert [site.name for site in read_sites(data(tmp_path, sites=["site_1"]), 0)] == ["site_1"]


def test_labels_are_merged_dropped_and_ignored():
    mapping = label_map(data(Path(), labels={"kidney": [1, 2], "cyst": 5, "background": 3, "ignore": 9}), "any")
    stored = np.array([0, 1, 2, 3, 5, 9])
    np.testing.assert_array_equal(mapping.apply(stored, Path("x")), [0, 1, 1, 0, 2, IGNORED])


def test_a_site_replaces_a_reserved_name_in_any_spelling():
    labels = {"ball": 1, "core": 2, "Ignore": 255}
    site_labels = {"b": {"ignore": 254}}
    assert label_map(data(Path(), labels=labels, site_labels=site_labels), "a").index_of == {0: 0, 1: 1, 2: 2, 255: IGNORED}
    assert label_map(data(Path(), labels=labels, site_labels=site_labels), "b").index_of == {0: 0, 1: 1, 2: 2, 254: IGNORED}


def test_a_site_may_use_other_label_values():
    mapping = label_map(data(Path(), site_labels={"b": {"ball": [7, 2], "core": 1}}), "b")
    np.testing.assert_array_equal(mapping.apply(np.array([0, 7, 2, 1]), Path("x")), [0, 1, 1, 2])


def test_background_may_hide_a_class_that_is_not_annotated():
    mapping = label_map(data(Path(), site_labels={"b": {"core": None}}), "b")
    np.testing.assert_array_equal(mapping.apply(np.array([0, 1]), Path("x")), [HIDDEN, 1])
    assert mapping.annotated == {1}
    assert label_map(data(Path(), site_labels={"b": {"core": None}}), "a").annotated == {1, 2}


def test_an_error_names_the_file_and_the_label_value_of_no_class():
    with pytest.raises(FlapsamError, match=r"file\.nii: label value 3 belongs to no class"):
        label_map(data(Path()), "a").apply(np.array([0, 3]), Path("file.nii"))


def config(path: Path) -> RunConfig:
    return RunConfig.model_validate({"data": {"path": path, "labels": {"ball": 1, "core": 2}}})


def test_weights_follow_slices_cases_or_given_numbers(tmp_path: Path):
    make_site(tmp_path / "a", 1, shape=(4, 4, 6))
    make_site(tmp_path / "b", 3, shape=(4, 4, 2))
    rows = [{"case": f"{s}_{i}", "site": s, "split": "train"} for s, i in (("a", 0), ("b", 0), ("b", 1), ("b", 2))]
    write_table(tmp_path, rows)
    sizes = {site.name: training_size(site.of("train"), config(tmp_path)) for site in read_sites(data(tmp_path), 0)}
    expected = {"slices": (0.5, 0.5), "cases": (0.25, 0.75), "uniform": (0.5, 0.5)}
    for kind, (a, b) in expected.items():
        assert client_shares(sizes, Rounds.model_validate({"weights": kind})) == pytest.approx({"a": a, "b": b})
    assert client_shares(sizes, Rounds(weights={"a": 3, "b": 1})) == pytest.approx({"a": 0.75, "b": 0.25})
    with pytest.raises(FlapsamError, match="give one for each of a, b"):
        client_shares(sizes, Rounds(weights={"a": 1}))


@pytest.mark.skipif(not (SHARED / "facts").exists(), reason="the fact tables are missing")
def test_weights_of_fed_kits19_match_the_paper():
    """The published code hard-codes the weights. They are the sites' shares of the training slices."""
    with (SHARED / "facts" / "fedkits19_segmentation_headers.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    slices = [sum(int(row["shape"].split("x")[0]) for row in rows if row["site"] == str(site)) for site in range(6)]
    shares = [round(count / sum(slices), 3) for count in slices]
    assert shares == [0.030, 0.184, 0.153, 0.096, 0.047, 0.490]


def test_the_phantom_depends_on_its_seed(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_phantom(tmp_path / name, sites=2, cases=2, seed=seed)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.nii.gz")} for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]
    sites = read_sites(Data(path=tmp_path / "a", labels={"kidney": 1, "tumour": 2}), 0)
    assert [(len(site.of("train")), len(site.of("test"))) for site in sites] == [(1, 1), (1, 1)]


def test_the_phantom_cannot_be_segmented_by_intensity_alone(tmp_path: Path):
    """Gaussian mixtures of voxel intensities score at most 0.5, even with priors tuned on the test cases."""
    from phantom_voxels import voxel_dice

    make_phantom(tmp_path, sites=4, cases=5, seed=0)
    assert voxel_dice(tmp_path, per_site=True)["mean"] <= 0.5
    assert voxel_dice(tmp_path, per_site=False)["mean"] <= 0.5


@pytest.mark.skipif(not (SHARED / "data" / "hippocampus").exists(), reason="the hippocampus volumes are missing")
def test_hippocampus_has_six_sites():
    sites = read_sites(Data(path=SHARED / "data" / "hippocampus", labels={"anterior": 1, "posterior": 2}), 0)
    assert [len(site.cases) for site in sites] == [30, 24, 15, 22, 22, 22]
    assert sum(len(site.of("train")) for site in sites) == 99
    assert sum(len(site.of("test")) for site in sites) == 36
