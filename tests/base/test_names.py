"""Names: what is one, which are the same, and that no entry lets anything else in."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from flapsam.adapters.images import find_images
from flapsam.adapters.store import read_card
from flapsam.adapters.trained import Trained
from flapsam.base.errors import FlapsamError
from flapsam.base.names import as_name, check_distinct
from flapsam.federation.hospitals.handshake import Proposal, SiteFailed
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.run.config import Data, RunConfig
from flapsam.run.reading import validated
from flapsam.sites import list_cases, read_sites
from flapsam.sites.table import read_table
from tests.helpers.adapters import saved

WRITTEN = Path(__file__).parents[1] / "written"
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))

GOOD = [
    "a",
    "case_00012",
    "IXI002-Guys-0828",
    "kidney tumour",
    "=cmd()",
    "1.5 bits, rank 4",
    "左腎",
    "a" * 100,
    "a..b",
    "*?[",
    "-",
]
BAD = {
    "": "it is empty",
    "a/b": "a slash or a backslash",
    "a\\b": "a slash or a backslash",
    "/etc/passwd": "a slash or a backslash",
    ".": "begins with a dot",
    "..": "begins with a dot",
    ".hidden": "begins with a dot",
    "a\nb": "cannot be printed",
    "a\x00b": "cannot be printed",
    "\x1b[2J": "cannot be printed",
    "a\u202eb": "cannot be printed",
    "a\u200bb": "cannot be printed",
    "a\u2028b": "cannot be printed",
    "a\udc80": "cannot be printed",
    " a": "begins or ends with a space",
    "a ": "begins or ends with a space",
    "a" * 101: "more than 100 characters",
    "a" * 200: "more than 100 characters",
    "腎" * 67: "200 bytes",
}


@pytest.mark.parametrize("name", GOOD)
def test_honest_names_are_kept(name: str):
    assert as_name(name) == name


@pytest.mark.parametrize(("text", "reason"), BAD.items(), ids=ascii)
def test_anything_else_is_refused_in_one_printable_line(text: str, reason: str):
    with pytest.raises(FlapsamError, match=reason) as refusal:
        as_name(text, "sites.csv, line 3, case")
    assert str(refusal.value).startswith("sites.csv, line 3, case: '")
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 600


def test_a_name_has_one_spelling():
    assert DECOMPOSED != COMPOSED
    assert as_name(DECOMPOSED) == COMPOSED


@pytest.mark.parametrize("names", [["a", "a"], ["Case", "case"], [COMPOSED, DECOMPOSED], [DECOMPOSED.upper(), COMPOSED]])
def test_names_that_some_file_systems_confuse_are_one_name(names: list[str]):
    with pytest.raises(FlapsamError, match="listed twice" if names[0] == names[1] else "count as the same name"):
        check_distinct(names)
    check_distinct(["a", "b", COMPOSED])


def in_a_folder(folder: Path, name: str) -> None:
    """Cases and sites as folders. Names with a slash or of 200 characters are no names of files."""
    for part in ("images", "labels"):
        path = folder / "site" / part / f"{name}.nii.gz"
        path.parent.mkdir(parents=True)
        path.touch()
    read_sites(Data(path=folder, labels={"a": 1}), 0)


def in_a_table(folder: Path, name: str) -> None:
    quoted = name.replace('"', '""')
    (folder / "sites.csv").write_text(f'case,site\na,b\n"{quoted}",b\n', newline="")
    read_table(folder / "sites.csv")


def in_a_tables_site(folder: Path, name: str) -> None:
    quoted = name.replace('"', '""')
    (folder / "sites.csv").write_text(f'case,site\na,"{quoted}"\n', newline="")
    read_table(folder / "sites.csv")


def described(folder: Path, **description: object) -> None:
    (folder / "dataset.json").write_text(json.dumps(description))
    list_cases(folder)


def in_nnunets_list(folder: Path, name: str) -> None:
    files = {"images": ["a_0000.nii.gz"], "label": "a.nii.gz"}
    described(folder, channel_names={"0": "CT"}, file_ending=".nii.gz", labels={}, dataset={name: files})


def in_a_pair(folder: Path, name: str) -> None:
    described(folder, training=[{"image": f"imagesTr/{name}.nii.gz", "label": "labelsTr/a.nii.gz"}])


def in_a_configuration(folder: Path, name: str) -> None:
    validated({"data": {"path": "/", "labels": {name: 1}}}, RunConfig, "run.yaml")


def in_an_adapter(folder: Path, name: str) -> None:
    card = json.loads((WRITTEN / "adapter-format-1" / "flapsam.json").read_text())
    (folder / "flapsam.json").write_text(json.dumps(card | {"classes": ["kidney", name]}))
    read_card(folder)


ENTRIES: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "folder": (in_a_folder, r"site/images/.*nii\.gz: '"),
    "table": (in_a_table, r"sites\.csv, line \d+, case: '"),
    "site in a table": (in_a_tables_site, r"sites\.csv, line \d+, site: '"),
    "nnU-Net": (in_nnunets_list, r"dataset\.json: 'dataset\."),
    "pairs": (in_a_pair, r"dataset\.json, training, entry 0: '"),
    "configuration": (in_a_configuration, r"run\.yaml: 'data\.labels\."),
    "adapter": (in_an_adapter, r"flapsam\.json: .*'classes\.1': '"),
}


@pytest.mark.parametrize("name", ["../../x", "..", "a\nb", "a\x1b[2J", "a\u202eb", "a" * 101, ".a"], ids=ascii)
@pytest.mark.parametrize(("enter", "where"), ENTRIES.values(), ids=ENTRIES)
def test_every_entry_refuses_what_is_no_name(enter: Callable[[Path, str], None], where: str, name: str, tmp_path: Path):
    if enter is in_a_folder and ("/" in name or name.startswith(".")):
        pytest.skip("no name of a file, or a hidden file, which is no case")
    with pytest.raises(FlapsamError, match=where) as refusal:
        enter(tmp_path, name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("enter", [in_a_table, in_nnunets_list, in_a_configuration], ids=lambda entry: entry.__name__)
def test_every_entry_keeps_honest_names(enter: Callable[[Path, str], None], tmp_path: Path):
    for name in GOOD:
        enter(tmp_path, name + "x" if name == "a" else name)


def test_a_folder_with_two_spellings_of_one_case_is_refused(tmp_path: Path):
    for name in ("Case", "case", COMPOSED, DECOMPOSED):
        for part in ("images", "labels"):
            (tmp_path / "site" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "site" / part / f"{name}.nii.gz").touch()
    with pytest.raises(FlapsamError, match="count as the same name"):
        list_cases(tmp_path)
    for part in ("images", "labels"):
        (tmp_path / "site" / part / f"{DECOMPOSED}.nii.gz").unlink()
    found = list_cases(tmp_path)
    assert [case.name for case in found.cases] == ["Case", COMPOSED]
    assert len(found.problems) == 1 and "'Case' and 'case' count as the same name" in found.problems[0]


def test_a_case_is_found_whatever_the_encoding_of_its_accents(tmp_path: Path):
    for part in ("images", "labels"):
        (tmp_path / DECOMPOSED / part).mkdir(parents=True)
        (tmp_path / DECOMPOSED / part / f"{DECOMPOSED}.nii.gz").touch()
    (tmp_path / "sites.csv").write_text(f"case,site,split\n{COMPOSED},{DECOMPOSED},train\n")
    (case,) = read_sites(Data(path=tmp_path, labels={"a": 1}, sites=[DECOMPOSED]), 0)[0].cases
    assert (case.name, case.site, case.image.exists()) == (COMPOSED, COMPOSED, True)


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "../../x.nii.gz", "imagesTr/../../x.nii.gz", "a\nb.nii.gz", "$HOME/x.nii.gz", "x\x00.nii.gz"],
    ids=ascii,
)
@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_description_names_no_file_outside_its_folder(kind: str, file: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    paths = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz", kind: file}
    message = r"dataset\.json, (training, entry 0|dataset, a): '.*' is not a path inside the data's folder"
    with pytest.raises(FlapsamError, match=message):
        files = {"images": [paths["image"]], "label": paths["label"]}
        described(tmp_path, channel_names={"0": "CT"}, file_ending=".nii.gz", labels={}, dataset={"a": files})
    if not file.startswith("$"):
        with pytest.raises(FlapsamError, match=message):
            described(tmp_path, training=[paths])


def test_a_description_may_name_files_inside_its_folder(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for root in (tmp_path / "data", tmp_path / "link"):
        pairs = [{"image": str(tmp_path / "data" / "a.nii.gz"), "label": "./labelsTr/a.nii.gz"}]
        (root / "dataset.json").write_text(json.dumps({"training": pairs}))
        assert all("is missing" in problem for problem in list_cases(root).problems)


DESCRIPTIONS = [
    '{"training": 1}',
    '{"training": {"a": 1}}',
    '{"training": [[1]]}',
    '{"training": [{"image": 1, "label": null}]}',
    '{"channel_names": 1, "file_ending": ".nii.gz"}',
    '{"channel_names": {}, "file_ending": 1}',
    '{"channel_names": {}, "file_ending": ".nii.gz", "dataset": 1}',
    '{"channel_names": {}, "file_ending": ".nii.gz", "dataset": {"a": {"images": [], "label": "b"}}}',
    '{"channel_names": {}, "file_ending": ".nii.gz", "dataset": {"a": {"images": 1}}}',
    "[" * 100_000,
    '{"training":' + "[" * 100_000,
]
LABELS = [
    '{"training": [], "labels": []}',
    '{"training": [], "labels": {"x": "y"}}',
    '{"training": [], "labels": {"1": 2}}',
    '{"training": [], "labels": {"1": "a", "2": "A"}}',
    '{"channel_names": {}, "file_ending": ".nii.gz", "labels": {"a": "b"}}',
    '{"channel_names": {}, "file_ending": ".nii.gz", "labels": {"a": {"b": 1}}}',
    '{"channel_names": {}, "file_ending": ".nii.gz", "labels": {"a\\n": 1, "..": 2}}',
    '{"channel_names": {}, "file_ending": ".nii.gz"}',
]


@pytest.mark.parametrize("text", DESCRIPTIONS, ids=lambda text: text[:60])
def test_a_description_of_another_form_is_refused_in_one_sentence(text: str, tmp_path: Path):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(FlapsamError) as refusal:
        list_cases(tmp_path, "nnunet" if "channel_names" in text else "msd")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("text", LABELS)
def test_labels_of_another_form_are_refused_in_one_sentence(text: str, tmp_path: Path):
    from flapsam.sites import find_dataset

    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(FlapsamError, match=r"dataset\.json"):
        find_dataset(tmp_path).labels(tmp_path)


def test_a_class_name_with_a_slash_becomes_one_with_an_underscore(tmp_path: Path):
    """AMOS has the class prostate/uterus."""
    from flapsam.sites import find_dataset

    (tmp_path / "dataset.json").write_text('{"training": [], "labels": {"0": "background", "15": "prostate/uterus"}}')
    assert find_dataset(tmp_path).labels(tmp_path) == {"prostate_uterus": 15}


def test_an_image_whose_label_map_has_no_name_is_not_segmented(tmp_path: Path):
    trained = Trained(saved(tmp_path / "adapter"), None)
    for name in ("good", "Good", "a\nb", ".hidden", "x" * 101):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.nii.gz").touch()
    jobs = {job.stem.name: job.fault for job in find_images([tmp_path / "images"], trained)[0]}
    assert jobs.keys() == {"good", "Good", "a\nb", "x" * 101}
    assert jobs["Good"] == ""
    assert "would overwrite" in jobs["good"]
    assert "cannot be printed" in jobs["a\nb"] and "more than 100" in jobs["x" * 101]


def test_a_site_refuses_a_proposal_with_what_is_no_name(tmp_path: Path):
    config = RunConfig.model_validate({"data": {"path": "/", "labels": {"a": 1}}})
    site = SiteSide("a", SiteConfig.model_validate({"data": {"path": tmp_path}, "state": tmp_path / "state"}))
    tree = json.loads(Proposal.of("0" * 32, config).model_dump_json())
    for changes in ({"labels": {"../x": 1}}, {"labels": {"a\n": 1}}, {"site_labels": {"a": {"a/b": 1}}}):
        message = json.dumps({**tree, "config": {**tree["config"], "data": {**tree["config"]["data"], **changes}}})
        with pytest.raises(SiteFailed, match="configuration"):
            site.join(message.encode())
    assert not (tmp_path / "state").exists()
