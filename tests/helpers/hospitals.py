"""A real federation on loopback, as its users run it: processes of ``flapsam federation``, each with its own kit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from flapsam.federation.secure_aggregation.identity import Identity
from tests.helpers.ledgers import read_events
from tests.helpers.places import WRITTEN
from tests.helpers.recording_proxy import RecordingProxy
from tests.helpers.sites import make_site

FLAPSAM = (sys.executable, "-c", "from flapsam import cli; cli.main()")


BOUNDS: Mapping[str, object] = {"strategies": ["flap", "full"], "bounds": {"min_steps": 1}, "min_test_patients": 1}
"""What the sites allow, so that fits take seconds."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition holds. The test fails if it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.02)


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants with ``kill -9``, as when the machine loses power."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        # One of them may have ended by itself meanwhile.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@dataclass
class Hospitals:
    """Kits, data and running processes, all in one folder. The sites reach the server through a recording proxy."""

    folder: Path
    sites: list[str]
    own: str = "own"
    """Name of the folder with everything that belongs to the sites."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the sites' processes."""
    proxied: bool = True
    spare: list[str] = field(default_factory=list)
    """Further sites, which have kits and data, but which ``start_all`` does not start."""
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port, self.admin_port = free_port(), free_port()
        server = {"host": "localhost", "port": self.port, "admin_port": self.admin_port}
        federation = {"name": "test", "server": server, "sites": self.sites + self.spare}
        (self.folder / "federation.yaml").write_text(yaml.safe_dump(federation))
        self.flapsam("provision", self.folder / "federation.yaml", "-o", self.folder / "kits")
        for site in self.sites + self.spare:
            (self.folder / self.own / "kits").mkdir(parents=True, exist_ok=True)
            (self.folder / "kits" / site).rename(self.kit(site))
        if self.proxied:
            port = free_port()
            for site in self.sites + self.spare:
                self.point(site, port)
            self.proxy = RecordingProxy(port, self.port, self.kit("server"), self.kit)

    def kit(self, name: str) -> Path:
        return self.folder / (self.own if name in self.sites + self.spare else "") / "kits" / name

    def point(self, site: str, port: int) -> None:
        """Make a site look for the server at another port."""
        path = self.kit(site) / "startup" / "fed_client.json"
        tree = json.loads(path.read_text())
        tree["servers"][0]["service"]["target"] = f"localhost:{port}"
        path.write_text(json.dumps(tree))

    def use_earlier_kit(self, name: str) -> None:
        """Replace all but the keys and certificates of a kit by what version 0.1.0 wrote before its modules moved."""
        role = "site_a" if name in self.sites else name
        target = json.loads((self.kit(name) / "startup" / "fed_client.json").read_text()) if role == "site_a" else None
        for path in (WRITTEN / "kits-0.1.0" / role).rglob("*.*"):
            text = path.read_text().replace("58002", str(self.port)).replace("58003", str(self.admin_port))
            text = text.replace('"site_a"', f'"{name}"' if role == "site_a" else json.dumps(self.sites)[1:-1])
            (self.kit(name) / path.relative_to(WRITTEN / "kits-0.1.0" / role)).write_text(text)
        if target:
            self.point(name, int(target["servers"][0]["service"]["target"].rpartition(":")[2]))

    @property
    def data(self) -> Path:
        return self.folder / self.own / "data"

    def state_of(self, site: str) -> Path:
        return self.folder / self.own / "state" / site

    def make_data(self, cases: int = 3) -> None:
        for number, site in enumerate(self.sites + self.spare):
            make_site(self.data / site, cases, seed=number)

    def flapsam(self, *arguments: str | Path, code: int = 0, seconds: float = 240) -> str:
        """Run ``flapsam federation …`` to its end and return its output."""
        outcome = subprocess.run(
            [*FLAPSAM, "federation", *map(str, arguments)], capture_output=True, text=True, timeout=seconds, check=False
        )
        assert outcome.returncode == code, outcome.stdout + outcome.stderr
        assert "Traceback" not in outcome.stderr, outcome.stderr
        return outcome.stdout + outcome.stderr

    def start(self, name: str, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start ``flapsam federation …`` in the background, with its output in ``NAME.out``."""
        with (self.folder / f"{name}.out").open("ab") as output:
            self.running[name] = subprocess.Popen(
                [*FLAPSAM, "federation", *map(str, arguments)],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        return self.running[name]

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def partners_of(self, site: str) -> dict[str, object]:
        """The field ``secure`` of a site's file, with the public keys of all other sites.

        The keys are those of a simulation, so that changes are rounded as there.
        """
        keys = {name: Identity.simulated(0, name) for name in self.sites + self.spare}
        keys[site].keep(self.state_of(site) / "identity.key")
        return {"partners": {name: key.public for name, key in keys.items() if name != site}}

    def start_server(self) -> None:
        before = self.said("server").count("The server is up") if "server" in self.running else 0
        self.start("server", "server", self.kit("server"))
        until(lambda: self.said("server").count("The server is up") > before)

    def start_site(self, site: str, environment: Mapping[str, str] | None = None, **own: object) -> None:
        """Start a site. ``own`` are further fields of its file."""
        path = self.folder / self.own / f"{site}.yaml"
        fields = {"data": {"path": str(self.data / site)}, "state": str(self.state_of(site)), "threads": 1, **BOUNDS, **own}
        fields.setdefault(
            "secure", {**self.partners_of(site), "required": False} if len(self.sites + self.spare) > 2 else None
        )
        path.write_text(yaml.safe_dump(fields))
        environment = {**self.environment, **(environment or {})}
        self.start(site, "site", self.kit(site), "--data", path, environment=environment)

    def start_all(self) -> None:
        self.start_server()
        for site in self.sites:
            self.start_site(site)
        until(lambda: all("Connected to the server" in self.said(site) for site in self.sites))

    def follow(self, config: Path, *, seconds: float = 240, code: int = 0) -> str:
        """Wait until a run ends and return its output."""
        name = f"run-{config.stem}"
        try:
            returned = self.running[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end within {seconds} s:\n{self.said(name)}") from None
        assert returned == code, self.said(name)
        assert "Traceback" not in self.said(name)
        return self.said(name)

    def evaluate(self, output: Path, *adapters: Path) -> list[dict]:
        """Have the sites score adapters, and return what ``flapsam federation evaluate --json`` prints."""
        options = ["-o", output, "--kit", self.kit("coordinator"), "--json", "--quiet"]
        sites = [option for site in self.sites for option in ("--site", site)]
        text = self.flapsam("evaluate", *adapters, *options, *sites)
        return json.loads(text[text.index("[") : text.rindex("]") + 1])

    def start_run(self, config: Path, *options: str) -> None:
        self.start(f"run-{config.stem}", "run", config, "--kit", self.kit("coordinator"), *options)

    def stop_all(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                kill_all(process)
        self.running.clear()
        if self.proxied:
            self.proxy.close()


def rounds_done(run: Path) -> int:
    return len(read_events(run, "round"))


def adapter_of(run: Path, name: str = "adapter") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / name).glob("*.safetensors"))}
