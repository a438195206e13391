"""Whether a site can take part in a federation, before it does: certificate, network, data, memory, and a run itself."""

import logging
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flapsam.check import check_sites
from flapsam.config import ClassValues, Data, RunConfig
from flapsam.device import find_device
from flapsam.errors import FlapsamError
from flapsam.federation.engines.nvflare.kits import FEW_DAYS, Kit
from flapsam.federation.handshake import REASONS, Presence, Proposal, SiteFailed, read_message
from flapsam.federation.observer import Observer
from flapsam.federation.site import Participant
from flapsam.federation.site_file import SiteFile
from flapsam.memory import free_bytes, training_bytes
from flapsam.sites import read_site

SECONDS = 5
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""What HTTP/2 begins with: the preface, and settings without any."""
DISK_GIB = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    fine: bool
    about: str


def check_site(kit: Kit, file: SiteFile, run: RunConfig | None, observer: Observer) -> Iterator[Finding]:
    """Look at all that a site needs.

    Args:
        kit: the site's.
        file: its own.
        run: a run that it may be asked to take part in; its part up to the first fit is tried out then.
        observer: is told of the cases.
    """
    until = kit.certificate.not_valid_after_utc.date()
    yield Finding("certificate", kit.days_left >= FEW_DAYS, f"valid until {until}, {kit.days_left} days")
    yield _network(kit)
    yield from _data(kit.card.name, file, run, observer)
    folder = next(folder for folder in (file.state, *file.state.parents) if folder.exists())
    disk = shutil.disk_usage(folder).free / 2**30
    yield Finding("disk", disk >= DISK_GIB, f"{disk:.0f} GiB free in {folder}")
    free = free_bytes(find_device(file.device)) / 2**30
    if run is None:
        wanted = f"{file.free_memory_gib:g} GiB are asked for (free_memory_gib)"
        yield Finding("memory", free >= file.free_memory_gib, f"{free:.1f} GiB free on {file.device}, {wanted}")
    else:
        yield from _rehearsal(kit.card.name, file, run, free)


def _network(kit: Kit) -> Finding:
    """Connect as NVFLARE will, and wait for the server's first bytes: who is refused gets none."""
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
        return Finding("network", False, f"{host}:{port} is not the server of this federation: {error.verify_message}")
    except (ConnectionResetError, ssl.SSLError):
        return Finding("network", False, f"{host}:{port} refuses this kit's certificate; ask for a new kit")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return Finding(
            "network", False, f"{host}:{port} is not reached ({reason}); outgoing connections to it must be allowed"
        )
    return Finding("network", True, f"{host}:{port} answers, and takes this kit's certificate")


def _data(name: str, file: SiteFile, run: RunConfig | None, observer: Observer) -> Iterator[Finding]:
    own = file.data
    labels: dict[str, ClassValues] = dict(run.data.labels) if run else {"any": 1}
    data = Data(path=own.path, layout=own.layout, table=own.table, labels=labels)
    try:
        site = read_site(data, run.seed if run else 0, name, own.site)
    except FlapsamError as error:
        yield Finding("data", False, str(error))
        return
    observer.begin("cases", len(site.cases))
    found = check_sites([site], [], data if run else None, observer.step)
    observer.end()
    for problem in found.problems:
        yield Finding("data", False, problem)
    training = len(site.of("train"))
    enough = training >= file.min_cases
    yield Finding("data", enough, f"{len(site.cases)} cases, {training} to train with; min_cases is {file.min_cases}")


def _rehearsal(name: str, file: SiteFile, run: RunConfig, free: float) -> Iterator[Finding]:
    """All of a run's beginning, with a state of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        participant = Participant(name, file.model_copy(update={"state": Path(folder)}))
        said: list[str] = []
        listener = _Listener(said)
        logger = logging.getLogger("flapsam")
        logger.addHandler(listener)
        try:
            proposal = Proposal.of("0" * 32, run).model_dump_json().encode()
            presence = read_message(Presence, participant.join(proposal))
        except SiteFailed as failure:
            yield Finding("run", False, said[-1] if said else REASONS[str(failure)])
            return
        finally:
            logger.removeHandler(listener)
        brings = (
            f"{presence.training_cases} training cases, {presence.training_slices} slices, backbone {presence.backbone[:12]}"
        )
        yield Finding("run", True, f"takes part with {brings}…")
        config = participant.config
        needed = training_bytes(participant.network, config.training, config.precision) / 2**30
        yield Finding("memory", needed < free, f"a step takes {needed:.1f} GiB, {free:.1f} GiB are free on {file.device}")


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
