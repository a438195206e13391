"""The definition of a job: configuration only, which names one class of flapsam for the server and one for the sites."""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

PACKAGE = "flapsam.federation.engines.nvflare"
SERVER_PART, SITE_PART = "server", "site"
"""Names of the two parts of a definition."""
CONFIG: Mapping[str, str] = {
    SERVER_PART: "config/config_fed_server.json",
    SITE_PART: "config/config_fed_client.json",
}
"""The only file of each part."""
SIGNATURES = tuple(folder + name for folder in ("", "config/") for name in (NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE))
"""The coordinator's signatures, which NVFLARE adds to each folder of a part and which sites verify."""
DAMAGED = (ValueError, LookupError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged or hostile zip file of JSON can raise."""
LARGEST = 1 << 20
"""Maximum size of a file of a definition in bytes."""


def job_name(run: str) -> str:
    """Name that all jobs of a run share."""
    return f"flapsam-{run[:12]}"


def server_part(folder: str) -> dict[str, Any]:
    """The server's part of a definition, path → content.

    Args:
        folder: the run's folder at the server, as an absolute path. It is not sent to the sites.
    """
    controller = {"path": f"{PACKAGE}.controller.FlapsamController", "args": {"folder": folder}}
    tree = {
        "format_version": 2,
        "server": {"task_request_interval": 0.1},
        "workflows": [{"id": "flapsam", **controller}],
        "components": [],
    }
    return {CONFIG[SERVER_PART]: tree}


def site_part() -> dict[str, Any]:
    """The sites' part of a definition, path → content. It is the same in every job."""
    executor = {"path": f"{PACKAGE}.executor.FlapsamExecutor", "args": {}}
    tree = {
        "format_version": 2,
        "executors": [{"tasks": ["join", "fit", "agree", "validate", "own", "test"], "executor": executor}],
        "components": [],
    }
    return {CONFIG[SITE_PART]: tree}


def write_job(folder: Path, run: str, output: Path, sites: Sequence[str], min_sites: int) -> Path:
    """Write the definition of a job.

    Args:
        folder: folder to write into.
        run: the run's id.
        output: the run's folder at the server.
        sites: sites that take part.
        min_sites: number of sites that the job needs to start.

    Returns:
        The definition's folder.
    """
    meta = {
        "name": job_name(run),
        "resource_spec": {},
        "min_clients": min(min_sites, len(sites)),
        "deploy_map": {SERVER_PART: ["server"], SITE_PART: list(sites)},
    }
    parts = {SERVER_PART: server_part(str(output.absolute())), SITE_PART: site_part()}
    files = {f"{part}/{path}": tree for part, part_files in parts.items() for path, tree in part_files.items()}
    definition = folder / job_name(run)
    for name, tree in {"meta.json": meta, **files}.items():
        path = definition / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=1))
    return definition


def is_definition(packed: object, part: str) -> bool:
    """Whether a zip file is a part of a definition as ``write_job`` writes it, with its signature and nothing else.

    Args:
        packed: the zip file that was received.
        part: ``SERVER_PART`` or ``SITE_PART``.
    """
    try:
        if not isinstance(packed, bytes):
            return False
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            files = [entry for entry in archive.infolist() if not entry.is_dir()]
            folders = {entry.filename for entry in archive.infolist() if entry.is_dir()}
            known = {CONFIG[part], *SIGNATURES}
            names = [entry.filename for entry in files]
            if not {*names} <= known or len(names) != len({*names}) or not folders <= {"config/"}:
                return False
            if any(entry.file_size > LARGEST for entry in files):
                return False
            tree = json.loads(archive.read(CONFIG[part]))
        folder = tree["workflows"][0]["args"]["folder"] if part == SERVER_PART else ""
        return (
            isinstance(folder, str) and tree == (server_part(folder) if part == SERVER_PART else site_part())[CONFIG[part]]
        )
    except DAMAGED:
        return False
