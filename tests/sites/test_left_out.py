"""Nothing is left out in silence: what a search or a data set does not use is listed with the reason."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from flapsam.adapters.images import Job, find_images
from flapsam.adapters.trained import find_trained
from flapsam.base.errors import FlapsamError
from flapsam.run.observer import Observer
from flapsam.sites import list_cases, unused
from flapsam.sites.check import check_data
from flapsam.volumes import LeftOut, Series, sentences
from tests.helpers.adapters import saved
from tests.helpers.dicom import save_series
from tests.helpers.sites import make_site, save

ARRAY = np.arange(8 * 7 * 4, dtype=np.int16).reshape(8, 7, 4)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapter"))


def search(adapter: Path, folder: Path, series: str | None = None) -> tuple[list[Job], dict[str, str]]:
    jobs, left_out = find_images([folder], find_trained(adapter), series=series)
    return jobs, {one.path.name: one.reason for one in left_out}


def test_suffixes_in_capitals_are_found(adapter: Path, tmp_path: Path):
    for end in (".nii.gz", ".NII.GZ", ".Nii", ".nii.GZ"):
        save(ARRAY, tmp_path / "a.nii.gz").rename(tmp_path / f"case_{end.replace('.', '_')}{end}")
    jobs, left_out = search(adapter, tmp_path)
    assert sorted(str(job.stem) for job in jobs) == ["case__NII_GZ", "case__Nii", "case__nii_GZ", "case__nii_gz"]
    assert left_out == {}


def test_what_a_search_leaves_out_is_listed(adapter: Path, tmp_path: Path):
    save(ARRAY, tmp_path / "a.nii.gz")
    save(ARRAY, tmp_path / "a_seg.nii.gz")
    save(ARRAY, tmp_path / "labels" / "a.nii.gz")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "scan").write_bytes(gzip.compress(nibabel.Nifti1Image(ARRAY, np.eye(4)).to_bytes()))
    (tmp_path / "archive.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    jobs, left_out = search(adapter, tmp_path)
    assert [str(job.stem) for job in jobs] == ["a"]
    assert left_out == {
        "a_seg.nii.gz": "named like a label map",
        "labels": "named like a label map",
        "notes.txt": "not an image",
        "scan": "not an image, but a NIfTI file, compressed with gzip",
        "archive.zip": "not an image, but a ZIP archive",
    }


def test_voxels_of_a_header_are_not_left_out(adapter: Path, tmp_path: Path):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(ARRAY)
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    sitk.WriteImage(image, str(tmp_path / "b.nhdr"))
    jobs, left_out = search(adapter, tmp_path)
    assert [str(job.stem) for job in jobs] == ["a", "b"]
    assert left_out == {}


def test_dicom_of_any_name_class_and_folder_is_found(adapter: Path, tmp_path: Path):
    save_series(tmp_path / "sound", ARRAY, np.eye(4), series="one")

    def anonymise(header, _) -> None:
        header.SOPClassUID = "2.25.1"

    save_series(tmp_path / "replaced", ARRAY, np.eye(4), series="two", change=anonymise)
    for path in save_series(tmp_path / "suffix", ARRAY, np.eye(4), series="three").iterdir():
        path.rename(path.with_suffix(".v2"))
    for index, path in enumerate(sorted(save_series(tmp_path / "spread", ARRAY, np.eye(4), series="four").iterdir())):
        (tmp_path / "spread" / f"{index % 2}").mkdir(exist_ok=True)
        path.rename(tmp_path / "spread" / f"{index % 2}" / path.name)
    jobs, left_out = search(adapter, tmp_path)
    assert {str(job.stem): len(job.image.files) for job in jobs if isinstance(job.image, Series)} == dict.fromkeys(
        ("sound", "replaced", "suffix", "spread"), 4
    )
    assert left_out == {}
    assert not any(job.fault for job in jobs)


def test_series_that_are_not_chosen_are_listed_and_told_by_their_uids(adapter: Path, tmp_path: Path):
    for name in ("T1", "T2"):
        save_series(tmp_path, ARRAY, np.eye(4), series=name)
    _, left_out = search(adapter, tmp_path, "T1")
    assert left_out == {"T2_0000.dcm": "series 3 'T2' (4 files), which --series does not choose"}
    for path in tmp_path.iterdir():
        path.unlink()
    for name in ("a", "b"):
        save_series(
            tmp_path, ARRAY, np.eye(4), series=name, change=lambda header, _: setattr(header, "SeriesDescription", "T2")
        )
    (job,), _ = search(adapter, tmp_path)
    assert job.fault.count("3 'T2' (4 files) 1.2.826") == 2
    jobs, _ = search(adapter, tmp_path, "*")
    assert len({job.stem for job in jobs}) == 2
    assert not any(job.fault for job in jobs)


def test_a_folder_without_images_says_what_it_holds(adapter: Path, tmp_path: Path):
    save_series(tmp_path, ARRAY, np.eye(4), change=lambda h, _: setattr(h, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.88.11"))
    with pytest.raises(FlapsamError, match=r"DICOM image found; .*DICOM, but not an image: Basic Text SR Storage"):
        search(adapter, tmp_path)


def test_cases_with_suffixes_in_capitals_are_read(tmp_path: Path):
    make_site(tmp_path / "a", 3)
    for folder in ("images", "labels"):
        path = tmp_path / "a" / folder / "a_2.nii.gz"
        path.rename(path.with_name("a_2.NII.GZ"))
    sites, checked = check_data(tmp_path, None, [1, 2], Observer())
    assert sites == {"a": 3}
    assert checked.problems == []
    assert checked.left_out == []


def test_files_that_no_case_uses_are_listed(tmp_path: Path):
    make_site(tmp_path / "a", 3)
    make_site(tmp_path / "b", 1)
    (tmp_path / "b" / "images").rename(tmp_path / "b" / "Images")
    save(ARRAY, tmp_path / "a" / "old.nii.gz")
    for name in ("a_3.nrrd", "a_4.mgz", "a_5"):
        (tmp_path / "a" / "images" / name).write_bytes(b"\x89PNG" if name == "a_4.mgz" else b"x")
    (file, *_) = save_series(tmp_path / "dicom", ARRAY[..., :1], np.eye(4)).iterdir()
    file.rename(tmp_path / "a" / "images" / "slice.v2")
    (tmp_path / "dicom").rmdir()
    (tmp_path / "sites.csv").write_text("case,site\n" + "".join(f"a_{index},a\n" for index in range(2)))
    cases = list_cases(tmp_path).cases
    (tmp_path / "sites.csv").rename(tmp_path / "SITES.CSV")
    found = unused(tmp_path, cases)
    assert {str(one.path.relative_to(tmp_path)): one.reason for one in found} == {
        "a/old.nii.gz": "no case of the data set",
        "a/images/a_2.nii.gz": "no case of the data set",
        "a/labels/a_2.nii.gz": "no case of the data set",
        "a/images/a_3.nrrd": "not NIfTI, which training needs; convert it to .nii.gz",
        "a/images/a_4.mgz": "not an image, but a PNG picture",
        "a/images/a_5": "not an image",
        "a/images/slice.v2": "DICOM; convert it to NIfTI for training",
        "b": "a folder without a case",
    }


def test_a_sentence_names_a_few_files_of_a_folder():
    many = [LeftOut(Path("a") / f"{index}.txt", "not an image") for index in range(7)]
    assert sentences([*many, LeftOut(Path("a/b.pdf"), "not an image, but a PDF document")]) == [
        "a: left out 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more (not an image)",
        "a: left out b.pdf (not an image, but a PDF document)",
    ]
