"""Downloads from a server on this machine."""

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save

from flapsam.base.download import cache_folder, checksum, download
from flapsam.base.errors import FlapsamError
from flapsam.sam import sources
from flapsam.sites import DATASETS, Download
from tests.helpers.adapters import trained
from tests.helpers.command import flapsam

CONTENT = bytes(range(256)) * 10_000
DIGITS = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file, whole or from a byte offset. It drops the connection once, after ``break_after`` bytes."""

    requests: list[str | None] = []  # noqa: RUF012
    content = CONTENT
    break_after: int | None = None
    path_served = "/sam.pth"
    ranges = True

    def do_GET(self):
        byte_range = self.headers.get("Range")
        Handler.requests.append(byte_range)
        if self.path != Handler.path_served:
            return self.send_error(404)
        start = int(byte_range.removeprefix("bytes=").rstrip("-")) if byte_range and Handler.ranges else 0
        if start >= len(Handler.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(Handler.content) - start))
        self.end_headers()
        stop, Handler.break_after = Handler.break_after, None
        self.wfile.write(Handler.content[start : stop or len(Handler.content)])

    def log_message(self, *_):
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.requests, Handler.break_after, Handler.ranges, Handler.content = [], None, True, CONTENT
    Handler.path_served = "/sam.pth"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}/sam.pth"
        http_server.shutdown()


def test_a_file_is_downloaded_whole(server: str, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    download(server, tmp_path / "a" / "sam.pth", sha256=DIGITS[:6], on_bytes=lambda *progress: seen.append(progress))
    assert (tmp_path / "a" / "sam.pth").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["sam.pth"]


def test_an_interrupted_download_resumes(server: str, tmp_path: Path):
    Handler.break_after = 1_500_000
    with pytest.raises(FlapsamError, match="run this again to resume"):
        download(server, tmp_path / "sam.pth", sha256=DIGITS)
    assert not (tmp_path / "sam.pth").exists()
    download(server, tmp_path / "sam.pth", sha256=DIGITS)
    assert (tmp_path / "sam.pth").read_bytes() == CONTENT
    assert Handler.requests == [None, "bytes=1500000-"]


def test_a_download_restarts_if_the_server_has_no_ranges(server: str, tmp_path: Path):
    Handler.ranges = False
    (tmp_path / "sam.pth.part").write_bytes(b"half")
    download(server, tmp_path / "sam.pth", sha256=DIGITS)
    assert (tmp_path / "sam.pth").read_bytes() == CONTENT


def test_a_partial_file_that_is_already_complete_is_used(server: str, tmp_path: Path):
    (tmp_path / "sam.pth.part").write_bytes(CONTENT)
    download(server, tmp_path / "sam.pth", sha256=DIGITS)
    assert checksum(tmp_path / "sam.pth") == DIGITS


def test_a_wrong_checksum_is_refused(server: str, tmp_path: Path):
    with pytest.raises(FlapsamError, match="checksum is"):
        download(server, tmp_path / "sam.pth", sha256="000000")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_and_an_unreachable_server_are_errors(server: str, tmp_path: Path):
    with pytest.raises(FlapsamError, match="the server answers 404"):
        download(server.replace("sam.pth", "other"), tmp_path / "sam.pth")
    with pytest.raises(FlapsamError, match=r"download it on a machine with a connection and copy it to .*sam\.pth"):
        download("http://127.0.0.1:9/sam.pth", tmp_path / "sam.pth")


def test_the_cache_folder_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FLAPSAM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FLAPSAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flapsam"


@pytest.fixture
def tiny_on_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sources.Source:
    """A backbone ``tiny`` whose weights are on the server."""
    Handler.content = save(trained("full")[0].network.state_dict())
    monkeypatch.setenv("FLAPSAM_CACHE", str(tmp_path / "cache"))
    digits = hashlib.sha256(Handler.content).hexdigest()[:6]
    source = sources.Source("tiny", "sam-tiny-1", "paper", "Apache-2.0", server, "tiny.safetensors", digits)
    monkeypatch.setitem(sources.SOURCES, "tiny", source)
    return source


def test_backbone_get_list_and_info_work(tiny_on_server: sources.Source, tmp_path: Path, capfd):
    path = tmp_path / "cache" / "tiny.safetensors"
    rows = json.loads(flapsam(capfd, "backbone", "list", "--json").out)
    assert {row["name"] for row in rows} == sources.SOURCES.keys()
    assert rows[-1]["weights"] == "flapsam backbone get tiny"
    Handler.break_after = 1_000_000
    broken = flapsam(capfd, "backbone", "get", "tiny")
    assert broken.code == 2
    assert "run this again to resume" in broken.err
    outcome = flapsam(capfd, "backbone", "get", "tiny")
    assert outcome.code == 0, outcome.err
    assert Handler.requests == [None, "bytes=1000000-"]
    assert json.loads(flapsam(capfd, "backbone", "list", "--json").out)[-1]["weights"] == str(path)
    assert "sam-tiny" in flapsam(capfd, "backbone", "list").out
    info = json.loads(flapsam(capfd, "backbone", "info", path, "--json").out)
    assert (info["architecture"], info["image size"], info["masks"]) == ("sam-tiny-1", 64, 3)
    assert info["SHA-256"] == hashlib.sha256(Handler.content).hexdigest()
    assert "64" in flapsam(capfd, "backbone", "info", path).out


def test_backbone_get_says_what_to_do_offline(tiny_on_server: sources.Source, monkeypatch: pytest.MonkeyPatch, capfd):
    url = "http://127.0.0.1:9/tiny.safetensors"
    monkeypatch.setitem(sources.SOURCES, "tiny", replace(tiny_on_server, url=url))
    outcome = flapsam(capfd, "backbone", "get", "tiny")
    assert outcome.code == 2
    assert f"{url}" in outcome.err
    assert "download it on a machine with a connection and copy it to" in outcome.err
    assert "choose" in flapsam(capfd, "backbone", "get", "tinier").err


def archive(folder: Path, form: str, inside: str) -> bytes:
    (folder / "made" / inside).mkdir(parents=True)
    (folder / "made" / inside / "dataset.json").write_text("{}")
    return Path(shutil.make_archive(str(folder / "archive"), form, folder / "made")).read_bytes()


@pytest.mark.parametrize(("form", "suffix"), [("tar", ".tar"), ("zip", ".zip")])
def test_data_are_downloaded_and_unpacked(form: str, suffix: str, server: str, tmp_path: Path, capfd, monkeypatch):
    Handler.content = archive(tmp_path, form, "Task04_Hippocampus")
    Handler.path_served = f"/task{suffix}"
    dataset = DATASETS["hippocampus"]
    source = Download(
        server.replace("/sam.pth", Handler.path_served), "Task04_Hippocampus", hashlib.md5(Handler.content).hexdigest()
    )
    monkeypatch.setitem(DATASETS, "hippocampus", replace(dataset, download=source))  # type: ignore[arg-type]
    outcome = flapsam(capfd, "data", "get", "hippocampus", tmp_path / "data")
    assert outcome.code == 0, outcome.err
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["Task04_Hippocampus"]
    assert (tmp_path / "data" / "Task04_Hippocampus" / "dataset.json").exists()
    assert "already exists" in flapsam(capfd, "data", "get", "hippocampus", tmp_path / "data").err
    wrong = replace(dataset, download=replace(source, md5="0" * 32))
    monkeypatch.setitem(DATASETS, "hippocampus", wrong)  # type: ignore[arg-type]
    outcome = flapsam(capfd, "data", "get", "hippocampus", tmp_path / "other")
    assert (outcome.code, "the file's checksum is" in outcome.err) == (2, True)
    assert not list((tmp_path / "other").iterdir())


def test_data_behind_a_form_come_with_instructions(tmp_path: Path, capfd):
    outcome = flapsam(capfd, "data", "get", "fed-prostate", tmp_path)
    assert outcome.code == 2
    assert "agree to the terms" in outcome.err
    assert "data set 'x' is unknown" in flapsam(capfd, "data", "get", "x", tmp_path).err


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_complete_info(name: str, capfd):
    outcome = flapsam(capfd, "data", "info", name, "--json")
    assert outcome.code == 0
    assert all(json.loads(outcome.out).values())
    assert name in flapsam(capfd, "data", "list", "--json").out
