"""Downloads, which happen only when the user asks for them."""

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
    """Folder that holds downloads: ``FLAPSAM_CACHE`` if set, else the user's cache folder."""
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
    """Download a file, resuming an interrupted download.

    Args:
        url: address of the file.
        target: path of the downloaded file. It appears only once the file is complete and its checksum matches.
        sha256: first digits of the SHA-256 checksum, if known.
        md5: first digits of the MD5 checksum, for files whose makers publish no other.
        on_bytes: called with the number of bytes received and the total (0 if the server does not state it).

    Raises:
        FlapsamError: there is no connection, the server refuses, the disk is too small, or the checksum differs.
    """
    # Unlike everything else, weights and public data may be shared with other users of the machine.
    make_folder(target.parent, 0o777)
    part = target.with_name(target.name + ".part")
    received = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={received}-"} if received else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                received = 0
            length = int(response.headers.get("Content-Length") or 0)
            total = received + length if length else 0
            if length > shutil.disk_usage(target.parent).free:
                raise FlapsamError(
                    f"{target.parent}: the disk has less than the {length} bytes that are needed; set FLAPSAM_CACHE to a "
                    "folder on a larger one"
                )
            with part.open("ab" if received else "wb") as file:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    received += len(chunk)
                    on_bytes(received, total)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise FlapsamError(f"{url}: the server answers {error.code} {error.reason}") from error
        total = received
    except (urllib.error.URLError, OSError) as error:
        raise FlapsamError(
            f"{url}: cannot be downloaded ({getattr(error, 'reason', error)}); run this again to resume, or download it on "
            f"a machine with a connection and copy it to {target}"
        ) from error
    if total and received != total:
        raise FlapsamError(f"{url}: the connection broke after {received} of {total} bytes; run this again to resume")
    for algorithm, expected in (("sha256", sha256), ("md5", md5)):
        if expected and not (actual := checksum(part, algorithm)).startswith(expected):
            part.unlink()
            raise FlapsamError(
                f"{url}: the file's checksum is {actual[:12]}…, not {expected}…, so it was removed; run this again to "
                "download it"
            )
    part.replace(target)


def checksum(path: Path, algorithm: str = "sha256") -> str:
    """A file's checksum in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
