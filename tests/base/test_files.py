"""Files: for their owner alone, whole or not at all, and one sentence if the disk is full or read-only."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from flapsam.adapters.prediction import predict
from flapsam.base.errors import FlapsamError
from flapsam.base.files import alone, check_writable, make_folder, write_text, written_whole
from flapsam.federation.state import ClientState, ServerState
from flapsam.learning.prepared import PreparedCase
from flapsam.run.ledger import Ledger, RunEnded
from tests.helpers.adapters import saved
from tests.helpers.command import flapsam
from tests.helpers.sites import SHAPE, save


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def readable_by_others(folder: Path) -> list[Path]:
    """The folder and everything in it that any other user may read, write or enter."""
    return [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]


def replaced(path: Path) -> None:
    """Some libraries write another file and rename it."""
    with written_whole(path) as temporary:
        temporary.unlink()
        temporary.write_text("x")


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: write_text(folder / "sub" / "a.txt", "x"),
    "by a library": lambda folder: replaced(folder / "a.txt"),
    "folder": lambda folder: make_folder(folder / "a" / "b"),
    "lock": lambda folder: alone(folder / "lock").close(),
    "ledger": lambda folder: Ledger(make_folder(folder) / "events.jsonl").write(RunEnded()),
    "probe": check_writable,
    "server": lambda folder: ServerState(folder / "a").commit(1, {"": {"x": torch.zeros(2)}}, {}, {"all": b"packet"}),
    "reply": lambda folder: ServerState(folder / "a").keep_reply("site", {"x": torch.zeros(2)}, {}),
    "client": lambda folder: ClientState(folder / "a").commit(1, b"reply"),
    "moments": lambda folder: ClientState(folder / "a").moments(1),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_only_the_owner_can_read_what_is_written(write: Callable[[Path], object], tmp_path: Path):
    write(tmp_path / "new")
    assert (tmp_path / "new").exists()
    assert readable_by_others(tmp_path / "new") == []


def test_only_the_owner_can_read_prepared_cases(cases: list[PreparedCase]):
    assert len(list(cases[0].folder.iterdir())) == 9
    assert readable_by_others(cases[0].folder) == []


def test_only_the_owner_can_read_label_maps_and_users_folders_stay_as_they_are(tmp_path: Path):
    image = save(np.zeros(SHAPE, np.float32), tmp_path / "image.nii.gz")
    shared = tmp_path / "shared"
    shared.mkdir(0o777)
    predict(saved(tmp_path / "adapter"), [image], shared, threads=1)
    predict(tmp_path / "adapter", [image], shared / "new" / "folder", threads=1)
    assert readable_by_others(shared) == [shared]
    assert shared.stat().st_mode & 0o777 == 0o777


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


DISKS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG]


@pytest.mark.parametrize("number", DISKS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["tempfile.mkstemp", "os.fsync"])
def test_a_file_that_cannot_be_written_is_one_sentence(call: str, number: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(f"flapsam.base.files.{call}", raising(OSError(number, os.strerror(number))))
    with pytest.raises(FlapsamError, match=rf"\({os.strerror(number)}\)"):
        write_text(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", DISKS, ids=errno.errorcode.get)
def test_a_ledger_that_cannot_be_written_is_one_sentence(number: int, tmp_path: Path, monkeypatch):
    ledger = Ledger(tmp_path / "events.jsonl")
    monkeypatch.setattr("flapsam.run.ledger.private", raising(OSError(number, os.strerror(number))))
    with pytest.raises(FlapsamError, match=rf"events\.jsonl: cannot be written \({os.strerror(number)}\)"):
        ledger.write(RunEnded())
    assert not ledger.holds(RunEnded())


def test_a_full_disk_under_safetensors_is_one_sentence(tmp_path: Path):
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(FlapsamError, match=r"a: cannot be written \(No space left on device\)"),
        written_whole(tmp_path / "a"),
    ):
        raise error
    with pytest.raises(SafetensorError, match="InvalidHeader"), written_whole(tmp_path / "a"):
        raise SafetensorError("InvalidHeader")


@pytest.mark.parametrize("number", DISKS, ids=errno.errorcode.get)
def test_a_command_ends_with_one_sentence_wherever_the_disk_fails(number: int, capfd, monkeypatch):
    monkeypatch.setattr("flapsam.sites.fetching.about", raising(OSError(number, os.strerror(number), "a/b")))
    outcome = flapsam(capfd, "data", "info", "hippocampus")
    assert outcome.code == 2
    assert outcome.err.startswith("Error: a/b: cannot be ") and len(outcome.err.splitlines()) == 1
    assert f"({os.strerror(number)}); " in outcome.err


def test_other_errors_are_not_hidden(capfd, monkeypatch):
    monkeypatch.setattr("flapsam.sites.fetching.about", raising(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        flapsam(capfd, "data", "info", "hippocampus")
