"""Lists of images as Windows, spreadsheets and editors write them."""

from pathlib import Path

import pytest

from flapsam.adapters.images import find_images
from flapsam.adapters.trained import find_trained
from flapsam.base.errors import FlapsamError
from tests.helpers.adapters import saved


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapter"))


LISTS = {
    "Notepad": "in\\one.nii.gz\r\n\r\n".encode("utf-16"),
    "copied as a path": b'\xef\xbb\xbf"in/one.nii.gz"\r\n',
    "a column of a spreadsheet": b"in/one.nii.gz;;\r\n;;\r\n",
    "blanks": b"\tin/one.nii.gz \n \n",
    "an old Mac": b"in/one.nii.gz\rin/one.nii.gz",
}


@pytest.mark.parametrize("content", LISTS.values(), ids=LISTS)
def test_a_list_of_files_is_read_as_programs_write_it(content: bytes, adapter: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.nii.gz").touch()
    (tmp_path / "list.TXT").write_bytes(content)
    jobs, _ = find_images([tmp_path / "list.TXT"], find_trained(adapter))
    assert {job.image for job in jobs} == {tmp_path / "in" / "one.nii.gz"}
    assert not jobs[0].fault


def test_a_path_in_a_list_that_leads_nowhere_is_named_with_its_line(adapter: Path, tmp_path: Path):
    (tmp_path / "list.txt").write_text("\nnowhere.nii.gz\n")
    (job,), _ = find_images([tmp_path / "list.txt"], find_trained(adapter))
    assert job.fault == f"{tmp_path}/nowhere.nii.gz: no such file or folder; correct list.txt, line 2"
    (tmp_path / "list.txt").write_bytes("Zürich.nii.gz".encode("cp1252"))
    with pytest.raises(FlapsamError, match=r"list\.txt, line 1: byte 0xfc is not text in UTF-8"):
        find_images([tmp_path / "list.txt"], find_trained(adapter))
