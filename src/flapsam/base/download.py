"""Files from the network, only when the user asks for them."""

import hashlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder

CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: ``FLAPSAM_CACHE``, else the user's cache folder."""
    if "FLAPSAM_CACHE" in os.environ:
        return Path(os.environ["FLAPSAM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flapsam"


def download(
    url: str,
    target: Path,
    *,
    sha256: str = "",
    md5: str = "",
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fetch a file; what a broken attempt left is gone on with.

    Args:
        url: where from.
        target: where to; it appears when it is whole and right.
        sha256: the checksum's first digits, if they are known.
        md5: the same in MD5, where a file's makers give no other.
        on_bytes: called with the bytes there are and the bytes there will be (0 if the server does not say).

    Raises:
        FlapsamError: no connection, the server refuses, the disk is too small, or the checksum differs.
    """
    make_folder(target.parent)
    part = target.with_name(target.name + ".part")
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                there = 0
            length = int(response.headers.get("Content-Length") or 0)
            total = there + length if length else 0
            if length > shutil.disk_usage(target.parent).free:
                raise FlapsamError(
                    f"{target.parent}: {length} bytes are needed, fewer are free; set FLAPSAM_CACHE elsewhere"
                )
            with part.open("ab" if there else "wb") as file:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    there += len(chunk)
                    on_bytes(there, total)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise FlapsamError(f"{url}: the server answers {error.code} {error.reason}") from error
        total = there
    except (urllib.error.URLError, OSError) as error:
        raise FlapsamError(
            f"{url}: cannot be fetched ({getattr(error, 'reason', error)}); fetch it on a machine that is online and put it "
            f"to {target}, or run this again to go on"
        ) from error
    if total and there != total:
        raise FlapsamError(f"{url}: the connection broke after {there} of {total} bytes; run this again to go on")
    for algorithm, expected in (("sha256", sha256), ("md5", md5)):
        if expected and not (found := checksum(part, algorithm)).startswith(expected):
            part.unlink()
            raise FlapsamError(
                f"{url}: the file's checksum is {found[:12]}…, not {expected}…; it is removed, run this again"
            )
    part.replace(target)


def checksum(path: Path, algorithm: str = "sha256") -> str:
    """A file's checksum in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
