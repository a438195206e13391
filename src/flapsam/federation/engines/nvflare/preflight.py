"""Check before a run whether a site can take part: certificate, network, data, disk, memory and a rehearsal of the run."""

import logging
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flapsam.base.device import find_device
from flapsam.base.errors import FlapsamError
from flapsam.federation.engines.nvflare.kits import FEW_DAYS, Kit, read_kit
from flapsam.federation.hospitals.handshake import REASONS, Presence, Proposal, SiteFailed, read_message
from flapsam.federation.hospitals.run_config import read_federated_config
from flapsam.federation.hospitals.site_config import SiteConfig, read_site_config
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.federation.hospitals.words import in_words
from flapsam.federation.privacy.budget import Budget, Ceiling
from flapsam.learning.memory import free_bytes, training_bytes
from flapsam.run.config import ClassValues, Data, RunConfig
from flapsam.run.observer import Observer
from flapsam.sites import read_site
from flapsam.sites.check import check_sites

SECONDS = 5
"""Timeout of the test connection."""
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""Start of an HTTP/2 connection: the preface and an empty SETTINGS frame (RFC 9113)."""
DISK_GIB = 5
"""Free disk space in GiB that a site should have."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    what: str
    """What was checked."""
    fine: bool
    """Whether the check passed."""
    about: str
    """What was found, in words."""


def check_site(folder: Path, site_yaml: Path | None, run_yaml: Path | None, observer: Observer) -> Iterator[Finding]:
    """Check everything that a site needs to take part.

    Args:
        folder: the site's kit.
        site_yaml: path of the site's configuration. None: ``site.yaml`` in the kit.
        run_yaml: path of the configuration of a run to rehearse up to the first fit, if any.
        observer: follows the cases that are read.

    Yields:
        The result of each check.

    Raises:
        FlapsamError: the folder is not a site's kit, or a configuration is invalid.
    """
    kit = read_kit(folder, "site")
    run = read_federated_config(run_yaml) if run_yaml else None
    site = read_site_config(site_yaml or folder / "site.yaml")
    until = kit.certificate.not_valid_after_utc.date()
    yield Finding("certificate", kit.days_left >= FEW_DAYS, f"valid until {until}, {kit.days_left} days left")
    yield _network(kit)
    yield from _data(kit.card.name, site, run, observer)
    if site.privacy:
        yield _privacy(site, site.privacy)
    place = next(folder for folder in (site.state, *site.state.parents) if folder.exists())
    disk = shutil.disk_usage(place).free / 2**30
    yield Finding("disk", disk >= DISK_GIB, f"{disk:.0f} GiB free in {place}")
    free = free_bytes(find_device(site.device)) / 2**30
    if run is None:
        needed = f"{site.free_memory_gib:g} GiB needed (free_memory_gib)"
        yield Finding("memory", free >= site.free_memory_gib, f"{free:.1f} GiB free on {site.device}, {needed}")
    else:
        yield from _rehearsal(kit.card.name, site, run, free)


def _network(kit: Kit) -> Finding:
    """Connect as NVFLARE does, and wait for the server's first bytes. A server that refuses the certificate sends none."""
    host, port = kit.card.server.rsplit(":", 1)
    startup = kit.folder / "startup"
    try:
        context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
        context.load_cert_chain(startup / "client.crt", startup / "client.key")
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port)), SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=host) as connection,
        ):
            connection.sendall(GREETING)
            if not connection.recv(9):
                raise ConnectionResetError
    except ssl.SSLCertVerificationError as error:
        return Finding("network", False, f"{host}:{port} is not the server of this federation ({error.verify_message})")
    except (ConnectionResetError, ssl.SSLError):
        return Finding("network", False, f"{host}:{port} refuses this kit's certificate; ask the coordinator for a new kit")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return Finding("network", False, f"{host}:{port} cannot be reached ({reason}); allow outgoing connections to it")
    return Finding("network", True, f"{host}:{port} answers and accepts this kit's certificate")


def _data(name: str, site: SiteConfig, run: RunConfig | None, observer: Observer) -> Iterator[Finding]:
    """Read every case, with the run's labels if a run is given."""
    own = site.data
    labels: dict[str, ClassValues] = dict(run.data.labels) if run else {"any": 1}
    data = Data(path=own.path, layout=own.layout, table=own.table, labels=labels)
    try:
        cases = read_site(data, run.seed if run else 0, name, own.site)
    except FlapsamError as error:
        yield Finding("data", False, str(error))
        return
    observer.begin("cases", len(cases.cases))
    checked = check_sites([cases], [], data if run else None, observer.step)
    observer.end()
    for problem in checked.problems:
        yield Finding("data", False, problem)
    for note in checked.notes:
        yield Finding("data", True, note)
    training = len(cases.of("train"))
    enough = training >= site.min_cases
    yield Finding("data", enough, f"{len(cases.cases)} cases, {training} for training (min_cases is {site.min_cases})")


def _privacy(site: SiteConfig, most: Ceiling) -> Finding:
    """Compare what earlier runs have revealed with the site's ceiling."""
    try:
        epsilon, delta = Budget(site.privacy_spent).total() if site.privacy_spent.exists() else (0.0, 0.0)
    except FlapsamError as error:
        return Finding("privacy", False, str(error))
    spent = f"runs have spent ε = {epsilon:.3g} of {most.epsilon:g} and δ = {delta:.3g} of {most.delta:g}"
    return Finding("privacy", epsilon < most.epsilon and delta < most.delta, spent)


def _rehearsal(name: str, site: SiteConfig, run: RunConfig, free: float) -> Iterator[Finding]:
    """Rehearse a run up to its first fit, with a temporary state."""
    with tempfile.TemporaryDirectory() as folder:
        rehearsed = site.model_copy(update={"state": Path(folder)})
        for name_of in ("journal", "split", "privacy_spent"):
            own, copy = getattr(site, name_of), getattr(rehearsed, name_of)
            if own.exists():
                shutil.copy(own, copy)
        side = SiteSide(name, rehearsed)
        errors: list[str] = []
        listener = _Listener(errors)
        logger = logging.getLogger("flapsam")
        logger.addHandler(listener)
        try:
            proposal = Proposal.of("0" * 32, run).model_dump_json().encode()
            presence = read_message(Presence, side.join(proposal))
        except SiteFailed as failure:
            yield Finding("run", False, errors[-1] if errors else REASONS[str(failure)])
            return
        finally:
            logger.removeHandler(listener)
        config = side.config
        size = f" with {presence.training_cases} training cases, {presence.training_slices} slices"
        yield Finding("run", True, f"takes part{'' if config.privacy else size}, backbone {presence.backbone[:12]}…")
        for sentence in in_words(config, site):
            yield Finding("asks", True, sentence)
        needed = training_bytes(side.network, config.training, config.precision) / 2**30
        yield Finding("memory", needed < free, f"a step needs {needed:.1f} GiB, {free:.1f} GiB free on {site.device}")


class _Listener(logging.Handler):
    """Collects the messages of logged errors."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(record.getMessage())
