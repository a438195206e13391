"""What `data check` and `init` say about sites that differ: what a run would refuse, and what it would do without a word."""

import json
from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.experiments.init import look
from flapsam.run.config import Data
from flapsam.run.observer import Observer
from flapsam.sites import Case, list_cases
from flapsam.sites.check import check_sites
from flapsam.sites.differences import label_notes, modality_problems, unknown_values
from flapsam.sites.reading import read_found
from tests.helpers.command import flapsam
from tests.helpers.sites import small_pair, write_run


def folder(root: Path, **sites: tuple[tuple[int, ...], int]) -> Path:
    """Sites of two cases each, with these label values and this number of modalities."""
    for site, (values, modalities) in sites.items():
        for case in ("1", "2"):
            small_pair(root / site, case, values=values, modalities=modalities)
    return root


def test_sites_that_differ_are_named_by_check_and_init(tmp_path: Path, capfd):
    data = folder(tmp_path / "data", a=((1, 2), 1), b=((1, 5), 1), c=((1, 2), 2))
    modalities = "site c: its images have 2 modalities, those of a, b have 1; all cases need equally many"
    values = (
        "only some sites have the label values 2, 5 (a: 1, 2; b: 1, 5; c: 1, 2); where a class has other values, write them "
        "into data.site_labels"
    )
    outcome = flapsam(capfd, "data", "check", data)
    assert outcome.code == 2
    assert outcome.out.splitlines() == [
        modalities,
        f"note: {values}",
        "label values: 1, 2, 5",
        "6 cases at 3 sites, 1 problems",
    ]
    checked = json.loads(flapsam(capfd, "data", "check", data, "--json").out)
    assert (checked["problems"], checked["notes"]) == ([modalities], [values])
    assert checked["label_values_by_site"] == {"a": [1, 2], "b": [1, 5], "c": [1, 2]}
    outcome = flapsam(capfd, "init", data, "-o", tmp_path / "run.yaml")
    assert (outcome.code, outcome.err.splitlines()[-1]) == (2, f"Error: {modalities}; {values}")
    assert not (tmp_path / "run.yaml").exists()


def test_init_writes_a_note_and_says_it(tmp_path: Path, capfd):
    data = folder(tmp_path / "data", a=((1, 2), 1), b=((1, 5), 1))
    outcome = flapsam(capfd, "init", data, "-o", tmp_path / "run.yaml")
    assert outcome.code == 0
    note = "only some sites have the label values 2, 5 (a: 1, 2; b: 1, 5)"
    assert f"# Note: {note}" in (tmp_path / "run.yaml").read_text()
    assert f"note: {note}" in outcome.err


def case(site: str, name: str) -> Case:
    return Case(name, site, name, Path(site) / "images" / f"{name}.nii.gz", Path(site) / "labels" / f"{name}.nii.gz")


MODALITIES: dict[str, tuple[dict[Case, int], list[str]]] = {
    "equal": ({case("a", "1"): 2, case("b", "1"): 2}, []),
    "one site": (
        {case("a", "1"): 2, case("a", "2"): 2, case("b", "1"): 1},
        ["site b: its images have 1 modality, those of a have 2; all cases need equally many"],
    ),
    "as many of one as of the other": (
        {case("a", "1"): 2, case("b", "1"): 1},
        ["site a: its images have 2 modalities, those of b have 1; all cases need equally many"],
    ),
    "one case": (
        {case("a", "1"): 1, case("a", "2"): 2, case("b", "1"): 1},
        ["a/images/2.nii.gz: the case has 2 modalities, most cases have 1; all cases need equally many"],
    ),
    "a site with other numbers": (
        {case("a", "1"): 1, case("a", "2"): 1, case("a", "3"): 1, case("b", "1"): 2, case("b", "2"): 3},
        [
            "b/images/1.nii.gz: the case has 2 modalities, most cases have 1; all cases need equally many",
            "b/images/2.nii.gz: the case has 3 modalities, most cases have 1; all cases need equally many",
        ],
    ),
    "none": ({}, []),
}


@pytest.mark.parametrize(("counts", "problems"), MODALITIES.values(), ids=MODALITIES)
def test_modalities_are_compared(counts: dict[Case, int], problems: list[str]):
    assert modality_problems(counts) == problems


def data(**fields) -> Data:
    return Data(**{"path": Path(), "labels": {"kidney": 1, "tumour": [2, 3]}, **fields})


LABELS: dict[str, tuple[dict[str, set[int]], Data | None, list[str]]] = {
    "the same values": ({"a": {1, 2}, "b": {1, 2}}, None, []),
    "one site": ({"a": {1, 2}}, None, []),
    "a value at one site": (
        {"a": {1}, "b": {1, 2}},
        None,
        [
            "only some sites have the label value 2 (a: 1; b: 1, 2); where a class has other values, write them into "
            "data.site_labels"
        ],
    ),
    "a site without labels": (
        {"a": set(), "b": {1}},
        None,
        [
            "only some sites have the label value 1 (a: none; b: 1); where a class has other values, write them into "
            "data.site_labels"
        ],
    ),
    "classes everywhere, by other values": ({"a": {1, 2}, "b": {1, 3}}, data(), []),
    "a class at one site": (
        {"a": {1}, "b": {1, 2}, "c": {1}},
        data(),
        [
            "class tumour: label maps of b have voxels of it, those of a, c have none; where it is not annotated or has "
            "other values, say so in data.site_labels"
        ],
    ),
    "a class that is not annotated elsewhere": ({"a": {1}, "b": {1, 2}}, data(site_labels={"a": {"tumour": None}}), []),
    "a class with other values elsewhere": ({"a": {1, 7}, "b": {1, 2}}, data(site_labels={"a": {"tumour": 7}}), []),
    "no site": ({}, data(), []),
    "a class nowhere": ({"a": {1}, "b": {1}}, data(), ["class tumour: no label map has a voxel of it"]),
}


@pytest.mark.parametrize(("values", "configured", "notes"), LABELS.values(), ids=LABELS)
def test_label_values_are_compared(values: dict[str, set[int]], configured: Data | None, notes: list[str]):
    assert label_notes(values, configured) == notes


def test_values_of_no_class_are_named_by_site():
    values = {"a": {1, 2, 9}, "b": {1, 7, 8}, "c": {3}}
    assert unknown_values(values, data(labels={"kidney": 1, "tumour": [2, 3], "ignore": 9})) == [
        "site b: label values 7, 8 belong to no class; add them to data.labels as a class, background or ignore"
    ]


def test_many_sites_are_not_all_listed():
    values = {f"s{number:02}": {1} for number in range(12)} | {"t": {1, 2}}
    (note,) = label_notes(values, data())
    assert "those of s00, s01, s02, s03, s04, s05, s06, s07, s08, s09, 2 more have none" in note


def test_names_of_nnunet_in_a_site_folder_are_read_and_said(tmp_path: Path, capfd):
    for name in ("x", "y"):
        small_pair(tmp_path / "a", name, image=f"{name}_0000")
    small_pair(tmp_path / "b", "scan_2021")
    small_pair(tmp_path / "b", "scan")
    outcome = flapsam(capfd, "data", "check", tmp_path)
    assert outcome.code == 0
    assert "note: site a: its images are called CASE_0000, as in nnU-Net, and count as those of CASE" in outcome.out
    assert "4 cases at 2 sites, 0 problems" in outcome.out
    named = {(case.site, case.name): case.image.name for case in list_cases(tmp_path).cases}
    assert named == {
        ("a", "x"): "x_0000.nii.gz",
        ("a", "y"): "y_0000.nii.gz",
        ("b", "scan"): "scan.nii.gz",
        ("b", "scan_2021"): "scan_2021.nii.gz",
    }


def test_two_files_of_a_case_are_two_modalities(tmp_path: Path):
    for number in ("0000", "0001"):
        small_pair(tmp_path / "a", "x", image=f"x_{number}")
    for number in ("0000", "0002"):
        small_pair(tmp_path / "a", "y", image=f"y_{number}")
    found = list_cases(tmp_path)
    assert [[image.name for image in case.images] for case in found.cases] == [
        ["x_0000.nii.gz", "x_0001.nii.gz"],
        ["y_0000.nii.gz", "y_0002.nii.gz"],
    ]
    assert found.problems == [
        f"{tmp_path}/a/images/y_0000.nii.gz: case y has the files y_0000, y_0002, but modalities count from _0000; "
        "add the missing"
    ]
    sites, _ = read_found(data(path=tmp_path, labels={"k": 1}), 0)
    checked = check_sites(sites, [], None)
    assert set(checked.modalities.values()) == {2}


def test_cases_that_a_table_does_not_list_are_named(tmp_path: Path, capfd):
    folder(tmp_path / "data", a=((1,), 1), b=((1,), 1))
    small_pair(tmp_path / "data" / "a", "3")
    (tmp_path / "who.csv").write_text("case,site\n1,a\n2,a\n1,b\n2,b\n")
    run = write_run(tmp_path / "run.yaml", tmp_path / "data")
    run.write_text(run.read_text().replace("labels:", "table: who.csv\n  labels:"))
    outcome = flapsam(capfd, "data", "check", tmp_path / "data", "--config", run)
    assert outcome.code == 0
    assert f"note: {tmp_path}/who.csv: 1 case of the folder is not listed and not used: 3" in outcome.out


def test_init_names_values_that_the_description_does_not(tmp_path: Path):
    for number in range(2):
        small_pair(tmp_path, f"{number}", values=(6,))
    pairs = [{"image": f"images/{number}.nii.gz", "label": f"labels/{number}.nii.gz"} for number in range(2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": pairs, "labels": {"1": "organ"}}))
    assert look(tmp_path, Observer()).notes == [
        "site all: label value 6 belongs to no class; add it to data.labels as a class, background or ignore",
        "class organ: no label map has a voxel of it",
    ]


def test_init_refuses_modalities_that_differ_within_a_site(tmp_path: Path):
    folder(tmp_path, a=((1,), 1))
    small_pair(tmp_path / "a", "3", modalities=3)
    with pytest.raises(FlapsamError, match=r"3\.nii\.gz: the case has 3 modalities, most cases have 1"):
        look(tmp_path, Observer())


def test_a_site_that_never_trains_needs_no_training_case(tmp_path: Path):
    folder(tmp_path, a=((1,), 1), b=((1,), 1))
    (tmp_path / "sites.csv").write_text("case,site,split\n1,a,train\n2,a,test\n1,b,test\n2,b,test\n")
    for unseen, count in (([], 1), (["b"], 0)):
        configured = data(path=tmp_path, labels={"k": 1}, unseen=unseen)
        sites, problems = read_found(configured, 0)
        assert len(check_sites(sites, problems, configured).problems) == count
