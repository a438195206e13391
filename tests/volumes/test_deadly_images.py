"""Deadly images in one command, the process that reads them, and its limits."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flapsam.base.errors import FlapsamError
from flapsam.volumes import Volume, read_image, read_process
from flapsam.volumes.read_process import look_apart, read_apart
from tests.helpers.adapters import saved
from tests.helpers.command import flapsam
from tests.helpers.deadly import AFFINE, ARRAY, DEADLY
from tests.helpers.deaths import compute, die, die_while_reading, fail, fall_short, hang, process_id, swell
from tests.volumes.test_formats import save_as

GOOD = 10


def test_deadly_images_end_nothing_but_themselves(tmp_path: Path, capfd):
    for name, (spoil, _) in DEADLY.items():
        path = tmp_path / "in" / name.replace(".", "_") / name
        path.parent.mkdir(parents=True)
        spoil(path)
    for number in range(GOOD):
        end = (".nii.gz", ".nrrd", ".mha")[number % 3]
        save_as(Volume(ARRAY[:8, :8, :3], AFFINE), tmp_path / "in" / "good" / f"{number}{end}")
    started = time.monotonic()
    outcome = flapsam(capfd, "predict", saved(tmp_path / "a"), tmp_path / "in", "-o", tmp_path / "out")
    assert time.monotonic() - started < 100
    assert outcome.code == 1
    errors = [line for line in outcome.err.splitlines() if line[:2] == "- "]
    assert len(DEADLY) >= 20
    assert len(errors) == len(DEADLY)
    for name, (_, message) in DEADLY.items():
        (error,) = [line for line in errors if re.search(rf"/{re.escape(name)}: ", line)]
        assert message in error
        assert "unexpected" not in error
    assert len(list((tmp_path / "out/good").iterdir())) == GOOD


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (die, r"^a\.nii: it cannot be read, because the process that read it crashed \(SIGSEGV\)"),
        (die_while_reading, r"crashed \(SIGSEGV\)"),
        (hang, "reading it takes more than 1 seconds"),
        (compute, "reading it takes far longer than its size allows"),
        (swell, "reading it takes far more memory than its size allows"),
        (fail, r"^a\.nii: it cannot be read \(KeyError: .first line[^\n]{500,600} …$"),
        (fall_short, "it holds more or fewer voxels than its header says"),
    ],
)
def test_whatever_happens_to_the_process_becomes_a_sentence(function, message: str, monkeypatch):
    monkeypatch.setattr(read_process, "_idle", [])
    if function is hang:
        monkeypatch.setattr(read_process, "WAIT_SECONDS", 1)
    with pytest.raises(FlapsamError, match=message):
        read_apart(function, "a.nii", 0)
    read_process._stop_all()


def test_one_process_reads_many_images_and_threads_have_their_own(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(read_process, "_idle", [])
    first = look_apart(process_id, "a")
    assert first != os.getpid()
    assert look_apart(process_id, "b") == first
    # A process that died between two images is replaced, and the next image is not blamed.
    os.kill(first, signal.SIGKILL)
    second = look_apart(process_id, "c")
    assert second != first
    path = save_as(Volume(ARRAY, AFFINE), tmp_path / "a.nii.gz")
    results: list[Volume] = []
    threads = [threading.Thread(target=lambda: results.append(read_image(path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for volume in results:
        np.testing.assert_array_equal(volume.array, ARRAY)
        # Every volume has memory of its own, which may be changed.
        volume.array[0, 0, 0] += 1
    assert 1 <= len(read_process._idle) <= 3
    read_process._stop_all()
