"""Start-up kits: a folder for each participant, with its certificate and policies that no job can change."""

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography import x509
from nvflare.apis.utils.format_check import name_check
from nvflare.lighter.entity import Project
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner
from pydantic import BaseModel, ConfigDict, Field, field_validator

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder, write_text
from flapsam.base.version import __version__
from flapsam.run.config import StrictModel
from flapsam.run.reading import read_options

Role = Literal["server", "site", "coordinator"]
KIT = "kit.json"
SERVER, COORDINATOR, AUTHORITY = "server", "coordinator", "authority"
ADMINISTRATOR = "coordinator@flapsam.org"
ALLOWED: dict[Role, str] = {
    "server": "flapsam.federation.engines.nvflare.controller.FlapsamController",
    "site": "flapsam.federation.engines.nvflare.executor.FlapsamExecutor",
}
"""The class that a job may name, and no other."""
AUTHORITY_DAYS = 3600
"""For which the federation's own root certificate is valid; those of participants are for 360."""
FEW_DAYS = 30
"""Left of a certificate, below which it is said that a new kit is needed."""
HEARTBEAT_SECONDS = 15
"""Without a sign of life, after which the server takes a site for gone."""
Port = Annotated[int, Field(ge=1, le=65535)]


class ServerPlace(StrictModel):
    """Where the server is."""

    host: str
    """Name or address by which sites reach it."""
    port: Port = 8002
    """The only one that must be open to them."""
    admin_port: Port = 8003
    """Only on the server's own loopback."""


class FederationFile(StrictModel):
    """Who takes part, as in ``FEDERATION.yaml``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,60}$")]
    server: ServerPlace
    sites: Annotated[list[str], Field(min_length=1)]

    @field_validator("sites")
    @classmethod
    def _right(cls, value: list[str]) -> list[str]:
        for name in value:
            if name_check(name, "client")[0] or name in (SERVER, COORDINATOR, AUTHORITY) or len(name) > 60:
                raise ValueError(f"'{name}' is no name for a site; use letters, digits, _ and -")
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' stands there twice")
        return sorted(value)


class KitCard(BaseModel):
    """What a kit is, as in its ``kit.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    federation: str
    role: Role
    name: str
    server: str
    """``host:port``."""
    sites: list[str] = []
    """Of the federation; a site's kit does not name the others."""
    flapsam: str = __version__


@dataclass(frozen=True)
class Kit:
    """A participant's kit."""

    folder: Path
    card: KitCard

    @property
    def certificate(self) -> x509.Certificate:
        """The participant's own.

        Raises:
            FlapsamError: it cannot be read.
        """
        path = self.folder / "startup" / ("server.crt" if self.card.role == "server" else "client.crt")
        try:
            return x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FlapsamError(f"{path}: the certificate cannot be read; ask for a new kit") from error

    @property
    def days_left(self) -> int:
        """Until the certificate expires."""
        return (self.certificate.not_valid_after_utc - datetime.now(UTC)).days


def read_kit(folder: Path, *roles: Role) -> Kit:
    """The kit in a folder.

    Raises:
        FlapsamError: there is none, it is for another role, or its certificate has expired.
    """
    path = folder / KIT
    try:
        kit = Kit(folder.absolute(), KitCard.model_validate_json(path.read_text()))
    except (OSError, ValueError) as error:
        raise FlapsamError(f"{folder}: there is no start-up kit here; flapsam federation provision makes them") from error
    if kit.card.role not in roles:
        raise FlapsamError(f"{folder}: this kit is for a {kit.card.role}, not for a {' or '.join(roles)}")
    if kit.days_left < 0:
        expired = kit.certificate.not_valid_after_utc.date()
        raise FlapsamError(
            f"{folder}: the certificate expired on {expired}; get a new kit (flapsam federation provision --renew "
            f"{kit.card.name})"
        )
    return kit


def provision(path: Path, output: Path, renew: Sequence[str] = ()) -> list[Kit]:
    """Write the kits that are not there yet.

    Args:
        path: the federation's file.
        output: folder of the kits and of the authority, whose key signs them all: keep that one to yourself.
        renew: names of participants whose kits are made anew, with new certificates; ``all`` for all.

    Returns:
        All kits.

    Raises:
        FlapsamError: the file is wrong, a name to renew is none, or something cannot be written.
    """
    federation = read_options(path, FederationFile)
    names = [SERVER, COORDINATOR, *federation.sites]
    odd = [name for name in renew if name not in (*names, "all")]
    if odd:
        raise FlapsamError(f"--renew {odd[0]}: there is no such participant; there are {', '.join(names)}")
    renewed = names if "all" in renew else list(renew)
    authority = output / AUTHORITY
    make_folder(authority / "state")
    authority.chmod(0o700)
    _check_same(output, federation)
    _forget(authority, [_subject(name, federation) for name in renewed])
    with tempfile.TemporaryDirectory(dir=authority, prefix=".making-") as made:
        _build(federation, authority, Path(made))
        for name in names:
            if name in renewed or not (output / name / KIT).exists():
                _harden(Path(made) / name, name, federation)
                shutil.rmtree(output / name, ignore_errors=True)
                shutil.move(Path(made) / name, output / name)
    return [read_kit(output / name, "server", "site", "coordinator") for name in names]


def _subject(name: str, federation: FederationFile) -> str:
    return {SERVER: federation.server.host, COORDINATOR: ADMINISTRATOR}.get(name, name)


def _check_same(output: Path, federation: FederationFile) -> None:
    """Kits of another federation, or of another server, are not mixed with these."""
    path = output / AUTHORITY / "federation.json"
    about = {"name": federation.name, "server": federation.server.model_dump()}
    if path.exists() and json.loads(path.read_text()) != about:
        raise FlapsamError(f"{output}: the kits here are of another federation or server; choose another output")
    write_text(path, json.dumps(about))


def _forget(authority: Path, subjects: Sequence[str]) -> None:
    """Let the authority give these a new certificate."""
    path = authority / "state" / "cert.json"
    if path.exists() and subjects:
        known = json.loads(path.read_text())
        write_text(path, json.dumps({name: value for name, value in known.items() if name not in subjects}))
        path.chmod(0o600)


def _build(federation: FederationFile, authority: Path, made: Path) -> None:
    """NVFLARE's own kits, in ``made``."""
    project = Project(federation.name, federation.name, props={"api_version": 3})
    place = federation.server
    ports = {"fed_learn_port": place.port, "admin_port": place.admin_port}
    # Sites verify the server by its host; the coordinator works on the server's machine and reaches it there.
    project.set_server(place.host, "server", {**ports, "host_names": ["localhost", "127.0.0.1"]})
    for site in federation.sites:
        project.add_client(site, re.sub("[^A-Za-z0-9]", "_", site), {"allow_log_streaming": False})
    project.add_admin(ADMINISTRATOR, "server", {"role": "project_admin", "connect_to": {"host": "localhost"}})
    templates = ["master_template.yml"]
    builders = [
        WorkspaceBuilder(templates),
        StaticFileBuilder(config_folder="config", scheme="grpc"),
        CertBuilder(AUTHORITY_DAYS),
    ]
    said = io.StringIO()
    with tempfile.TemporaryDirectory(dir=authority, prefix=".work-") as work:
        # NVFLARE keeps its state in a folder of its workspace, and leaves the kits beside it.
        workspace = make_folder(Path(work) / federation.name)
        (workspace / "state").symlink_to((authority / "state").absolute())
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            Provisioner(work, builders, None).provision(project)
        found = workspace / "prod_00"
        if not found.exists():
            raise FlapsamError(f"NVFLARE could not make the kits: {' '.join(said.getvalue().split())[-300:]}")
        (authority / "state" / "cert.json").chmod(0o600)
        for name in (SERVER, COORDINATOR, *federation.sites):
            shutil.move(found / _subject(name, federation), made / name)


def _harden(folder: Path, name: str, federation: FederationFile) -> None:
    """What no job may change: who may do what, which classes a job may name, that no code and no logs travel."""
    role: Role = {SERVER: "server", COORDINATOR: "coordinator"}.get(name, "site")  # type: ignore[assignment]
    place = federation.server
    startup, local = folder / "startup", folder / "local"
    for needless in [*startup.glob("*.sh"), *startup.glob("*.ipynb"), *local.glob("*.sample"), folder / "readme.txt"]:
        needless.unlink(missing_ok=True)
    for default in local.glob("*.default"):
        default.rename(default.with_suffix(""))
    if role != "coordinator":
        change_json(local / "resources.json", lambda tree: resources(tree, ALLOWED[role]))
        change_json(local / "log_config.json", quiet)
        write_text(local / "authorization.json", json.dumps(AUTHORIZATION, indent=1))
    if role == "server":
        change_json(startup / "fed_server.json", on_loopback)
    sites = [] if role == "site" else federation.sites
    card = KitCard(federation=federation.name, role=role, name=name, server=f"{place.host}:{place.port}", sites=sites)
    write_text(folder / KIT, card.model_dump_json(indent=1) + "\n")
    if role == "site":
        write_text(folder / "site.yaml", SITE_TEMPLATE)
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    folder.chmod(0o700)


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a JSON file anew, changed."""
    tree = json.loads(path.read_text())
    change(tree)
    write_text(path, json.dumps(tree, indent=1) + "\n")


def resources(tree: dict[str, Any], allowed: str) -> None:
    """Harden ``local/resources.json`` of a server or a site."""
    tree["class_list_enforcement_mode"] = "enforce"
    tree["class_allow_list"] = [allowed]
    tree["allow_log_streaming"] = False
    logging = ("site_log_streamer", "log_receiver")
    tree["components"] = [part for part in tree["components"] if part["id"] not in logging]
    for server in tree.get("servers", []):
        server |= {"heart_beat_timeout": HEARTBEAT_SECONDS, "max_num_clients": 10_000}
    for part in tree["components"]:
        if part["id"] == "job_scheduler":
            # One run at a time; a job is looked at each second, for as long as it takes.
            part["args"] = {"max_jobs": 1, "min_schedule_interval": 1.0, "max_schedule_interval": 1.0}
            part["args"]["max_schedule_count"] = 1_000_000_000


def on_loopback(tree: dict[str, Any]) -> None:
    """Bind the administration port of ``startup/fed_server.json`` to this machine."""
    for server in tree["servers"]:
        server["admin_host"] = "127.0.0.1"


def quiet(tree: dict[str, Any]) -> None:
    """Logs go to files only."""
    tree["handlers"].pop("consoleHandler", None)
    for logger in tree["loggers"].values():
        logger["handlers"] = [handler for handler in logger["handlers"] if handler != "consoleHandler"]


AUTHORIZATION = {
    "format_version": "1.0",
    "permissions": {
        # The administrator may run and end jobs, and nothing else: no shell, no code, no restart of others' machines.
        "project_admin": {
            "submit_job": "any",
            "manage_job": "any",
            "app_command": "any",
            "view": "any",
            "clone_job": "none",
            "download_job": "none",
            "operate": "none",
            "shell_commands": "none",
            "byoc": "none",
            "server-predeployed-flwr": "none",
        },
        "org_admin": "none",
        "lead": "none",
        "member": "none",
    },
}
"""For the server, and for each site, which asks its own copy."""

SITE_TEMPLATE = """\
# This site's own file. No server can override it.
data:
  path: /path/to/our/volumes     # a folder with images/ and labels/, or any layout of `flapsam data list`
state: state                     # what a run must not forget, unpacked volumes, the log, the adapters
min_cases: 10                    # with fewer training cases this site takes part in nothing
metrics: true                    # false: losses and validation Dice stay here
# strategies: [flap, lora]       # only in runs with these
# aggregators: [flexlora-aligned, fedavg]
# max_rounds: 100
# weights: sam_vit_b.pth         # the backbone's checkpoint, if flapsam backbone get did not fetch it
device: cpu                      # cuda, mps or auto
# threads: 8
"""
