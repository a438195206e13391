"""A server or a site in the foreground. NVFLARE runs as a child process, and all that it starts ends with this one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import psutil
from cryptography.x509.oid import NameOID

from flapsam.base.errors import FlapsamError
from flapsam.base.files import alone
from flapsam.federation.engines.nvflare.executor import SITE_CONFIG
from flapsam.federation.engines.nvflare.kits import FEW_DAYS, HEARTBEAT_SECONDS, Kit, change_json, read_kit
from flapsam.federation.hospitals.site_config import read_site_config

LOG, OUTPUT = "log.txt", "output.txt"
MODULE = "flapsam.federation.engines.nvflare.process"
SOCKETS = "FLAPSAM_SOCKETS"
"""Environment variable with the folder for the sockets between a participant's processes. Only its user may enter it."""
NEWS = (
    (r"Server started", "The server is up."),
    (r"Successfully registered client", "Connected to the server."),
    (r"Client: New client (\S+)@\S+ joined", "{0} has connected."),
    (r"Re-activate the client: (\S+) at", "{0} is back."),
    (r"Client Name:(\S+) left", "{0} has left."),
    (r"this is not the definition of a job of flapsam", "Refused: a job that is not flapsam's own."),
    (r"dropped from (\S+): (.+)", "Refused from {0}: {1}."),
    (r"authenticated as '(\S+)' but claimed endpoint '(\S+)'", "Refused: {0}'s certificate, used as {1}."),
    (r"failed to verify client identity", "Refused: a connection whose certificate does not match its name."),
    (r"PEER_DID_NOT_RETURN_A_CERTIFICATE", "Refused: a connection without a certificate."),
    (r"CERTIFICATE_VERIFY_FAILED", "Refused: the other side's certificate is not from this federation."),
)
"""Patterns in NVFLARE's log that users should know of, each with the sentence to show."""
LEAN = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "2"}
"""Environment variables that make glibc return the memory of large packets to the system."""
PATIENCE_SECONDS = 20
"""Seconds without news after which a site is reported as not connected yet."""


def launch(folder: Path, role: Literal["server", "site"], say: Callable[[str], None], *, site_config: Path | None) -> None:
    """Run a server or a site until it is stopped.

    Args:
        folder: the participant's kit.
        role: role that the kit must have.
        say: receives sentences for the user.
        site_config: path of the site's configuration. None: ``site.yaml`` in the kit.

    Raises:
        FlapsamError: the folder is not a kit of this role, another process uses it, the site's configuration is invalid, or
            NVFLARE fails.
    """
    kit = read_kit(folder, role)
    environment = {**os.environ, **LEAN}
    if role == "site":
        path = site_config or kit.folder / "site.yaml"
        site = read_site_config(path)
        if not site.data.path.is_dir():
            raise FlapsamError(f"{path}: data.path: the folder {site.data.path} does not exist")
        environment[SITE_CONFIG] = str(path.absolute())
    with alone(kit.folder / "running.lock", wait=False):
        _place_storage(kit)
        code = _run_nvflare(kit, environment, say)
    if code:
        raise FlapsamError(f"NVFLARE exited with code {code}; see {kit.folder / LOG} and {OUTPUT} beside it")


def _run_nvflare(kit: Kit, environment: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Run NVFLARE until it exits or is stopped from here.

    Returns:
        Its exit code, or 0 if it was stopped from here.
    """
    logs = [kit.folder / name for name in (LOG, OUTPUT)]
    for log in logs:
        log.touch()
    news = News(logs, say)
    say(f"{kit.card.name} of {kit.card.federation}, server {kit.card.server}. Log: {logs[0]}. Press Ctrl-C to stop.")
    if kit.days_left < FEW_DAYS:
        say(f"The certificate expires in {kit.days_left} days. Ask the coordinator for a new kit.")
    # SIGTERM, from systemd or a script, stops it as Ctrl-C does. SIGINT is set too, because background jobs ignore it.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    with contextlib.ExitStack() as opened:
        # In the system's folder for temporary files, because the path of a Unix socket has at most 107 bytes.
        sockets = opened.enter_context(tempfile.TemporaryDirectory(prefix="flapsam-"))
        output = opened.enter_context((kit.folder / OUTPUT).open("ab"))
        return _watch(kit, {**environment, SOCKETS: sockets}, output, news)


def _watch(kit: Kit, environment: Mapping[str, str], output: BinaryIO, news: "News") -> int:
    """Run NVFLARE's process and report its news. Returns as ``_run_nvflare`` does."""
    process = subprocess.Popen(
        command(kit), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
    )
    since = time.monotonic()
    try:
        while process.poll() is None:
            news.report()
            if not news.said and time.monotonic() - since > PATIENCE_SECONDS:
                news.say_once(f"Not connected yet. Still trying. To find out why, run flapsam federation check {kit.folder}")
            time.sleep(0.3)
        news.report()
        return process.returncode
    except KeyboardInterrupt:
        return 0
    finally:
        end_all(process.pid)
        process.wait()


class News:
    """Reports news from NVFLARE's logs to the user."""

    def __init__(self, logs: Sequence[Path], say: Callable[[str], None]) -> None:
        self.files = [log.open(encoding="utf-8", errors="replace") for log in logs]
        for file in self.files:
            file.seek(0, os.SEEK_END)
        self.say = say
        self.said = ""
        """The last sentence. It is not repeated directly, because NVFLARE retries without end."""

    def report(self) -> None:
        """Report what has been logged since the last call."""
        for file in self.files:
            for line in file:
                for pattern, sentence in NEWS:
                    if match := re.search(pattern, line):
                        self.say_once(sentence.format(*match.groups()))

    def say_once(self, sentence: str) -> None:
        """Say a sentence, unless it was the last one said."""
        if sentence != self.said:
            self.say(sentence)
        self.said = sentence


def command(kit: Kit) -> list[str]:
    """Command that starts NVFLARE for a server's or a site's kit."""
    organisation = kit.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
    site = kit.card.role == "site"
    own = [f"uid={kit.card.name}", f"heart_beat_interval={HEARTBEAT_SECONDS // 5}"] if site else []
    return [
        *(sys.executable, "-u", "-m", MODULE, kit.card.role, "-m", str(kit.folder)),
        *("-s", "fed_client.json" if site else "fed_server.json"),
        *("--set", "secure_train=true", f"org={organisation}", "config_folder=config", *own),
    ]


def unit_of(folder: Path, role: Literal["server", "site"], site_config: Path | None) -> str:
    """Systemd unit that keeps a server or a site running. The arguments are those of ``launch``."""
    kit = read_kit(folder, role)
    arguments = [sys.executable, "-m", "flapsam.cli", "federation", role, str(kit.folder)]
    if site_config is not None:
        arguments += ["--data", str(site_config.absolute())]
    return f"""\
# /etc/systemd/system/flapsam-{kit.card.name}.service; then: systemctl enable --now flapsam-{kit.card.name}
[Unit]
Description=flapsam {role} {kit.card.name} of {kit.card.federation}
After=network-online.target
Wants=network-online.target

[Service]
User=flapsam
ExecStart={" ".join(f'"{part}"' if " " in part else part for part in arguments)}
Restart=always
RestartSec=5
KillMode=control-group
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


def end_all(pid: int) -> None:
    """End a process and all of its descendants."""
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.terminate()
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(family, timeout=3)
    for member in left:
        member.kill()


def _place_storage(kit: Kit) -> None:
    """Write absolute paths into a server's kit. NVFLARE needs them for its jobs, and the kit may have been moved."""
    if kit.card.role != "server":
        return

    def place(tree: dict[str, Any]) -> None:
        tree["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit.folder / "snapshots")
        for part in tree["components"]:
            if part["id"] == "job_manager":
                part["args"]["uri_root"] = str(kit.folder / "jobs" / "store")

    change_json(kit.folder / "local" / "resources.json", place)
