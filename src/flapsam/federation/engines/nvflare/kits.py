"""Start-up kits: one folder for each participant, with its certificate and with policies that no job can change."""

import contextlib
import io
import json
import re
import shlex
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
from flapsam.base.files import make_folder, read_text, write_text
from flapsam.base.names import Name, Names, folded
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
"""The only class that a job may name at a server or a site."""
AUTHORITY_DAYS = 3600
"""Days for which the authority's root certificate is valid. Participants' certificates are valid for 360 days."""
FEW_DAYS = 30
"""Days of validity left, below which flapsam warns that a new kit is needed."""
HEARTBEAT_SECONDS = 15
"""Seconds without a heartbeat after which the server drops a site."""
Port = Annotated[int, Field(ge=1, le=65535)]


class ServerPlace(StrictModel):
    """Address of the server."""

    host: Name
    """Host name or IP address at which sites reach the server."""
    port: Port = 8002
    """Port for the sites, the only one that must be open to them."""
    admin_port: Port = 8003
    """Port for the coordinator, on the server's loopback interface only."""


class FederationFile(StrictModel):
    """The participants of a federation, as in ``FEDERATION.yaml``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,60}$")]
    """Name of the federation."""
    server: ServerPlace
    """Address of the server."""
    sites: Annotated[Names, Field(min_length=1)]
    """Names of the sites."""

    @field_validator("sites")
    @classmethod
    def _valid(cls, value: list[str]) -> list[str]:
        for name in value:
            # NVFLARE allows fewer names than flapsam.
            if name_check(name, "client")[0] or folded(name) in (SERVER, COORDINATOR, AUTHORITY) or len(name) > 60:
                raise ValueError(f"'{name}' is not a valid site name; use at most 60 letters, digits, _ and -")
        return sorted(value)


class KitCard(BaseModel):
    """Description of a kit, as in its ``kit.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    federation: Name
    role: Role
    name: Name
    server: Annotated[str, Field(pattern=r"^\S+:\d{1,5}$")]
    """Address of the server as ``host:port``."""
    sites: Names = []
    """Sites of the federation. Empty in a site's kit, which does not name the others."""
    flapsam: str = __version__
    """Version of flapsam that made the kit."""


@dataclass(frozen=True)
class Kit:
    """A participant's start-up kit."""

    folder: Path
    card: KitCard

    @property
    def certificate(self) -> x509.Certificate:
        """The participant's certificate.

        Raises:
            FlapsamError: the certificate cannot be read.
        """
        path = self.folder / "startup" / ("server.crt" if self.card.role == "server" else "client.crt")
        try:
            return x509.load_pem_x509_certificate(read_text(path).encode())
        except (OSError, ValueError) as error:
            raise FlapsamError(f"{path}: cannot read the certificate; get a new kit") from error

    @property
    def days_left(self) -> int:
        """Number of days until the certificate expires."""
        return (self.certificate.not_valid_after_utc - datetime.now(UTC)).days


def read_kit(folder: Path, *roles: Role) -> Kit:
    """Read the kit in a folder.

    Args:
        folder: the kit's folder.
        roles: roles that the kit may have.

    Raises:
        FlapsamError: the folder is not a kit, other users can read its private key, the kit has another role, or its
            certificate has expired.
    """
    path = folder / KIT
    _check_private(folder)
    try:
        kit = Kit(folder.absolute(), KitCard.model_validate_json(read_text(path)))
    except (OSError, ValueError) as error:
        raise FlapsamError(f"{folder}: not a start-up kit; make kits with flapsam federation provision") from error
    if kit.card.role not in roles:
        raise FlapsamError(f"{folder}: this kit is for a {kit.card.role}, not for a {' or '.join(roles)}")
    if kit.days_left < 0:
        expired = kit.certificate.not_valid_after_utc.date()
        raise FlapsamError(
            f"{folder}: the certificate expired on {expired}; get a new kit (flapsam federation provision --renew "
            f"{kit.card.name})"
        )
    return kit


def _check_private(folder: Path) -> None:
    """Refuse a kit whose private key other users of the machine can read."""
    for key in folder.glob("startup/*.key"):
        if key.stat().st_mode & 0o077:
            raise FlapsamError(
                f"{key}: other users of this machine can read this private key; get a new kit if they may have copied it, "
                f"otherwise run: chmod -R go-rwx {shlex.quote(str(folder))}"
            )


def provision(path: Path, output: Path, renew: Sequence[str] = ()) -> list[Kit]:
    """Write the kits that do not exist yet.

    Args:
        path: the federation's file.
        output: folder for the kits and for the authority, whose key signs them all and must stay secret.
        renew: names of participants whose kits are replaced, with new certificates, or ``all``.

    Returns:
        All kits, old and new.

    Raises:
        FlapsamError: the file is invalid, a name in ``renew`` is unknown, the output holds kits of another federation, or a
            kit cannot be made.
    """
    federation = read_options(path, FederationFile)
    names = [SERVER, COORDINATOR, *federation.sites]
    unknown = [name for name in renew if name not in (*names, "all")]
    if unknown:
        raise FlapsamError(f"--renew {unknown[0]}: unknown participant; choose from {', '.join(names)}, all")
    renewed = names if "all" in renew else list(renew)
    authority = output / AUTHORITY
    make_folder(authority / "state")
    authority.chmod(0o700)
    _check_same(output, federation)
    _forget(authority, [_subject(name, federation) for name in renewed])
    with tempfile.TemporaryDirectory(dir=authority, prefix=".making-") as built:
        _build(federation, authority, Path(built))
        for name in names:
            if name in renewed or not (output / name / KIT).exists():
                _harden(Path(built) / name, name, federation)
                shutil.rmtree(output / name, ignore_errors=True)
                shutil.move(Path(built) / name, output / name)
    return [read_kit(output / name, "server", "site", "coordinator") for name in names]


def _subject(name: str, federation: FederationFile) -> str:
    """Name of a participant in its certificate."""
    return {SERVER: federation.server.host, COORDINATOR: ADMINISTRATOR}.get(name, name)


def _check_same(output: Path, federation: FederationFile) -> None:
    """Refuse to mix the kits of two federations or two servers in one folder."""
    path = output / AUTHORITY / "federation.json"
    identity = {"name": federation.name, "server": federation.server.model_dump()}
    if path.exists() and json.loads(path.read_text()) != identity:
        raise FlapsamError(f"{output}: the kits here belong to another federation or server; choose another output folder")
    write_text(path, json.dumps(identity))


def _forget(authority: Path, subjects: Sequence[str]) -> None:
    """Let the authority forget the certificates of these subjects, so that it issues new ones."""
    path = authority / "state" / "cert.json"
    if path.exists() and subjects:
        known = json.loads(path.read_text())
        write_text(path, json.dumps({name: value for name, value in known.items() if name not in subjects}))
        path.chmod(0o600)


def _build(federation: FederationFile, authority: Path, folder: Path) -> None:
    """Let NVFLARE build its kits, and move them into a folder."""
    project = Project(federation.name, federation.name, props={"api_version": 3})
    place = federation.server
    ports = {"fed_learn_port": place.port, "admin_port": place.admin_port}
    # Sites verify the server by its host name. The coordinator works on the server's machine and reaches it at localhost.
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
    printed = io.StringIO()
    with tempfile.TemporaryDirectory(dir=authority, prefix=".work-") as work:
        # NVFLARE keeps its state in its workspace, beside the kits that it builds.
        workspace = make_folder(Path(work) / federation.name)
        (workspace / "state").symlink_to((authority / "state").absolute())
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            Provisioner(work, builders, None).provision(project)
        kits = workspace / "prod_00"
        if not kits.exists():
            reason = printed.getvalue().strip().rpartition("\n")[2]
            raise FlapsamError(f"NVFLARE could not make the kits: {reason[-300:]}")
        (authority / "state" / "cert.json").chmod(0o600)
        for name in (SERVER, COORDINATOR, *federation.sites):
            shutil.move(kits / _subject(name, federation), folder / name)


def _harden(folder: Path, name: str, federation: FederationFile) -> None:
    """Turn NVFLARE's kit into flapsam's. Its policies limit what a job may do, and forbid that code or logs travel."""
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
    """Apply a change to a JSON file."""
    tree = json.loads(path.read_text())
    change(tree)
    write_text(path, json.dumps(tree, indent=1) + "\n")


def resources(tree: dict[str, Any], allowed: str) -> None:
    """Harden ``local/resources.json`` of a server or a site.

    Args:
        tree: the file's content, which is changed in place.
        allowed: the only class that a job may name.
    """
    tree["class_list_enforcement_mode"] = "enforce"
    tree["class_allow_list"] = [allowed]
    tree["allow_log_streaming"] = False
    logging = ("site_log_streamer", "log_receiver")
    tree["components"] = [part for part in tree["components"] if part["id"] not in logging]
    for server in tree.get("servers", []):
        server |= {"heart_beat_timeout": HEARTBEAT_SECONDS, "max_num_clients": 10_000}
    for part in tree["components"]:
        if part["id"] == "job_scheduler":
            # One run at a time. NVFLARE tries to schedule a waiting job every second, without giving up.
            part["args"] = {"max_jobs": 1, "min_schedule_interval": 1.0, "max_schedule_interval": 1.0}
            part["args"]["max_schedule_count"] = 1_000_000_000


def on_loopback(tree: dict[str, Any]) -> None:
    """Bind the administration port in ``startup/fed_server.json`` to the loopback interface."""
    for server in tree["servers"]:
        server["admin_host"] = "127.0.0.1"


def quiet(tree: dict[str, Any]) -> None:
    """Send logs to files only."""
    tree["handlers"].pop("consoleHandler", None)
    for logger in tree["loggers"].values():
        logger["handlers"] = [handler for handler in logger["handlers"] if handler != "consoleHandler"]


AUTHORIZATION = {
    "format_version": "1.0",
    "permissions": {
        # The administrator may only run and stop jobs. No shell, no code, no restart of other machines.
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
"""Permissions for the server and for each site, which checks its own copy."""

SITE_TEMPLATE = """\
# Configuration of this site. No server can override it.
data:
  path: /path/to/our/volumes     # folder with images/ and labels/, or any layout that `flapsam data list` shows
state: state                     # folder for the state of runs, unpacked volumes, the log and the adapters
min_cases: 10                    # with fewer cases to train on, this site takes part in no run
min_validation_cases: 3          # with fewer validation cases, no Dice leaves this site
min_test_patients: 5             # with fewer test patients, no test score leaves this site
metrics: true                    # false: losses, validation Dice, steps and times do not leave this site
device: cpu                      # cpu, cuda, mps or auto
# threads: 8                     # all cores by default
# weights: sam_vit_b.pth         # checkpoint of the backbone, if `flapsam backbone get` did not download it

# Uncomment these to accept only some strategies and aggregators, a number of rounds over all runs, and so much memory:
# strategies: [flap, lora]
# aggregators: [flexlora-aligned, fedavg]
# max_rounds: 100
# memory_gib: 16

# Uncomment this to accept only runs with differential privacy that together reveal at most this much about a patient:
# privacy: {epsilon: 8, delta: 1.0e-5}

# Uncomment this to accept only runs with secure aggregation, with these partners, whose keys `flapsam federation key` shows:
# secure: {partners: {ANOTHER_SITE: ITS_KEY, A_THIRD_SITE: ITS_KEY}}
"""
