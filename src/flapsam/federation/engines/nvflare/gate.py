"""The gate of every NVFLARE process of flapsam: it drops each message that a run does not need.

NVFLARE delivers whatever a connected party sends: it takes the sender's word for a message's origin, relays messages from
site to site, and runs the handler of any channel and topic. Here, who sent a message follows from the certificate of the
connection, and ``REQUESTS`` lists what stays. A channel or topic that a new version of NVFLARE adds is dropped, too.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nvflare.fuel.f3.cellnet import core_cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessageType
from nvflare.fuel.f3.connection import Connection
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.byte_receiver import RxTask
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_ACK_TOPIC,
    STREAM_CHANNEL,
    STREAM_DATA_TOPIC,
    STREAM_ERROR_TOPIC,
    StreamHeaderKey,
)
from nvflare.private.defs import CellMessageHeaderKeys

from flapsam.federation.engines.nvflare.intake import INTAKE
from flapsam.federation.engines.nvflare.kits import ADMINISTRATOR
from flapsam.federation.engines.nvflare.sockets import SCHEME

log = logging.getLogger(__name__)
REQUEST_BYTES = 1 << 20
"""Maximum size of a streamed request. Packets do not travel in requests; the receiver downloads them in pieces."""
REPLY_BYTES = 4 << 20
"""Maximum size of a streamed reply at the server's job, unless more was agreed."""
STREAMS = 32
"""Number of streams that one sender may have open at a process."""
REPORTED = 200
"""Number of different dropped messages that are logged. Then the log stays silent, so that nobody can fill the disk."""


class Role(Enum):
    """What an NVFLARE process is. Each has one cell, the end of its connections."""

    SERVER = "server"
    SERVER_JOB = "server's job"
    SITE = "site"
    SITE_JOB = "site's job"
    COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Cell:
    """The name of a cell: its participant and, for a process that runs a job, the job."""

    participant: str
    job: str = ""

    @classmethod
    def named(cls, name: object) -> "Cell | None":
        """Parse NVFLARE's name of a cell, such as ``site_1.<job>``. None if flapsam has no such cell."""
        parts = name.split(".") if isinstance(name, str) else []
        return cls(*parts) if 1 <= len(parts) <= 2 and all(parts) else None

    @property
    def role(self) -> Role:
        """The role of the cell's process."""
        if self.participant == "server":
            return Role.SERVER_JOB if self.job else Role.SERVER
        if self.participant.startswith("_admin_"):
            return Role.COORDINATOR
        return Role.SITE_JOB if self.job else Role.SITE


JOIN = {
    "task:challenge": "the server asks for a signature, which proves that the certificate is the sender's",
    "task:register": "the sender gets its token",
}
BYE = {"cellnet.channel:bye": "the sender closes its connection"}
DOWNLOAD = {"stream download_service__:download_service__download": "a packet travels in pieces that the receiver asks for"}
REQUESTS: Mapping[tuple[Role, Role], Mapping[str, str]] = {
    (Role.SITE, Role.SERVER): {
        **JOIN,
        **BYE,
        "task:heart_beat": "the site is connected",
        "task:quit": "the site leaves",
        "task:report_job_failure": "the site's process of a job died",
    },
    (Role.SERVER, Role.SITE): {**BYE, "admin:admin": "a job begins or ends; `commands.py` lists the commands that stay"},
    (Role.SITE_JOB, Role.SITE): {**BYE, "admin:train.notify_job_status": "the job has started or is over"},
    (Role.SITE, Role.SITE_JOB): {**BYE, "client_command:abort": "the job is over"},
    (Role.SITE_JOB, Role.SERVER): BYE,
    (Role.SITE_JOB, Role.SERVER_JOB): {
        **DOWNLOAD,
        "stream server_command:get_task": "the site asks for work",
        "stream server_command:submit_update": "the site answers a request",
        "stream aux_communication:__sync_runner__": "the site's job waits until the server's job is ready",
        "stream aux_communication:__task_check__": "the site asks whether its answer is still wanted",
        "stream aux_communication:__job_heartbeat__": "the site's job is alive",
        "stream aux_communication:flapsam.alive": "the site's fit is alive",
    },
    (Role.SERVER_JOB, Role.SITE_JOB): {**DOWNLOAD, "stream aux_communication:__end_run__": "the job is over"},
    (Role.SERVER_JOB, Role.SERVER): {
        **BYE,
        "server_parent_listener:get_clients": "the job learns which sites are connected",
        "server_parent_listener:heartbeat": "the job is alive",
        "server_parent_listener:update_run_status": "the job has started or is over",
    },
    (Role.SERVER, Role.SERVER_JOB): {
        **BYE,
        "stream server_command:abort": "the coordinator stops the run",
        "stream server_command:app_command": "the coordinator asks to regroup",
        "stream server_command:handle_dead_job": "a site's process of the job died",
    },
    (Role.COORDINATOR, Role.SERVER): {
        **JOIN,
        **BYE,
        "stream hci_channel:command": "a command of the coordinator; `commands.py` lists those that stay",
        "stream aux_communication:ObjectStreamer.Request": "the definition of a job is uploaded",
        "stream aux_communication:ObjectStreamer.Abort": "the upload is over",
    },
    (Role.SERVER, Role.COORDINATOR): BYE,
}
"""What each role may ask of another, with the reason. Answers to these requests stay, too. Everything else is dropped."""


def needed(sender: Role, receiver: Role, content: str) -> bool:
    """Whether a run needs messages with this content, as ``content_of`` describes it, from one role to another."""
    asked = REQUESTS.get((receiver, sender), {})
    if content.startswith("reply "):
        return content.removeprefix("reply ") in asked
    if content.startswith("stream return_only:"):
        return "stream " + content.removeprefix("stream return_only:") in asked
    mine = REQUESTS.get((sender, receiver), {})
    if content == "ack":
        return any(request.startswith("stream ") for request in (*mine, *asked))
    return content in mine


def content_of(message: Message) -> str | None:
    """Describe a message: ``channel:topic`` of a request, the same after ``reply`` or ``stream``, or ``ack``
    for the acknowledgement or the failure of a stream, which name the stream's own random number.

    Returns:
        The description, or None for a message that no process of flapsam sends.
    """
    keys = (MessageHeaderKey.MSG_TYPE, MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC)
    kind, channel, topic = (message.get_header(key) for key in keys)
    if kind in (MessageType.REPLY, MessageType.RETURN):
        return f"reply {channel}:{topic}"
    if kind != MessageType.REQ:
        return None
    if channel != STREAM_CHANNEL:
        return f"{channel}:{topic}"
    # With an error in it, a piece of a stream only ends that stream.
    if topic in (STREAM_ACK_TOPIC, STREAM_ERROR_TOPIC) or message.get_header(StreamHeaderKey.ERROR_MSG):
        return "ack"
    if topic != STREAM_DATA_TOPIC:
        return None
    return f"stream {message.get_header(StreamHeaderKey.CHANNEL)}:{message.get_header(StreamHeaderKey.TOPIC)}"


def authentic(own: Cell, peer: Cell, identity: object, internal: bool, origin: Cell, destination: Cell) -> bool:
    """Whether the other end of a connection may bring this process a message.

    Args:
        own: this process.
        peer: the name that the other end has given.
        identity: the name in the other end's certificate, where the connection has one.
        internal: whether the connection is a Unix socket between processes of one participant.
        origin: whom the message says that it comes from.
        destination: whom it is for.
    """
    if internal:
        if peer.participant != own.participant:
            return False
        # Only the server relays, and only between a job of its own and the sites of that job.
        if own.role is Role.SERVER_JOB:
            return destination == own
        relayed = own.role is Role.SERVER and destination.job == peer.job
        return origin == peer and (destination == own or relayed)
    if own.role is Role.SERVER:
        certified = ADMINISTRATOR if peer.role is Role.COORDINATOR else peer.participant
        sites_job = destination.role is Role.SERVER_JOB and destination.job == peer.job
        return (
            identity == certified and peer.participant != "server" and origin == peer and (destination == own or sites_job)
        )
    if own.role is Role.SERVER_JOB:
        return False
    # A site and the coordinator have verified the server's certificate and host name, as the connection is their own.
    return peer == Cell("server") and origin.participant == "server" and origin.job in ("", own.job) and destination == own


def refusal(own: Cell, endpoint: Endpoint, connection: Connection, message: Message) -> str | None:
    """Why a message is dropped, in a phrase for the log. None if it is delivered."""
    origin, destination = (
        Cell.named(message.get_header(key)) for key in (MessageHeaderKey.ORIGIN, MessageHeaderKey.DESTINATION)
    )
    content, peer = content_of(message), Cell.named(endpoint.name)
    if peer is None or origin is None or destination is None or content is None:
        return "is of no kind that flapsam sends"
    if not needed(origin.role, destination.role, content):
        return f"({content!r}) is not needed in a run"
    identity = connection.get_conn_properties().get(DriverParams.PEER_CN.value)
    internal = connection.connector.params.get(DriverParams.SCHEME.value) == SCHEME
    if not authentic(own, peer, identity, internal, origin, destination):
        return "is not the sender's to send"
    if destination == own and content.startswith("stream "):
        problem = _problem_of_stream(own, content, message)
        if problem:
            return f"({content!r}) {problem}"
    name = message.get_header(CellMessageHeaderKeys.CLIENT_NAME)
    if origin.role in (Role.SITE, Role.SITE_JOB) and name not in (None, origin.participant):
        return "names another site"
    # Nothing between flapsam's processes is encrypted a second time, and NVFLARE would answer with a certificate.
    return "is encrypted" if message.get_header(MessageHeaderKey.SECURE) else None


def _problem_of_stream(own: Cell, content: str, message: Message) -> str:
    """What is wrong with the beginning of a stream: it announces too much, or its sender has too many streams open."""
    if message.get_header(MessageHeaderKey.TOPIC) != STREAM_DATA_TOPIC or message.get_header(StreamHeaderKey.SEQUENCE) != 0:
        return ""
    size = message.get_header(StreamHeaderKey.SIZE)
    # A stream of unknown size has size 0. The server takes none from a site, since it could be of any size.
    if not isinstance(size, int) or size < (own.participant == "server"):
        return "announces no size"
    if not content.startswith("stream return_only:"):
        limit = REQUEST_BYTES
    elif own.role is Role.SERVER_JOB:
        limit = max(REPLY_BYTES, INTAKE.limit)
    else:
        # A site and the coordinator get only what they have asked the server for, and it may be a whole packet.
        limit = size
    if size > limit:
        return f"announces {size} bytes, the limit is {limit}"
    name = message.get_header(MessageHeaderKey.ORIGIN)
    # NVFLARE keeps streams that are over for a while.
    tasks = [task for (sender, _), task in list(RxTask.rx_task_map.items()) if sender == name]
    if sum(not (task.completed or task.failed) for task in tasks) > STREAMS:
        return "is one of too many streams at once"
    return ""


class Gate:
    """Drops messages and logs each kind of them once."""

    def __init__(self) -> None:
        self.reported: set[tuple[str, str]] = set()

    def admits(self, own: str, endpoint: Endpoint, connection: Connection, message: Message) -> bool:
        """Whether a message may be delivered.

        Args:
            own: the name of this process's cell.
            endpoint: the other end of the connection.
            connection: the connection that the message came by.
            message: the message, whose headers may be anything.
        """
        if connection.connector.driver is None:
            # NVFLARE's loopback, by which a process sends to itself.
            return True
        cell = Cell.named(own)
        reason = refusal(cell, endpoint, connection, message) if cell else "is for an unknown process"
        if reason is not None:
            self._report(endpoint.name, own, reason, message)
        return reason is None

    def _report(self, sender: str, own: str, reason: str, message: Message) -> None:
        what = (sender, reason)
        if what in self.reported or len(self.reported) >= REPORTED:
            return
        self.reported.add(what)
        destination = str(message.get_header(MessageHeaderKey.DESTINATION))[:100]
        participant = own.split(".")[0]
        to_own_job = participant != "server" and destination != own and destination.startswith(f"{participant}.")
        if sender.split(".")[0] == participant or to_own_job:
            # When a job ends, NVFLARE tries to reach its processes through their parents. That is no attack.
            log.info("not relayed from %s: a message for %r %s", sender, destination, reason[:200])
        else:
            log.warning("dropped from %s: a message for %r %s", sender, destination, reason[:200])


def install() -> None:
    """Put the gate in front of every message that this process receives."""
    gate, deliver = Gate(), core_cell.CoreCell.process_message

    def process_message(self: Any, endpoint: Endpoint, connection: Connection, app_id: int, message: Message) -> None:
        if gate.admits(self.my_info.fqcn, endpoint, connection, message):
            deliver(self, endpoint, connection, app_id, message)

    core_cell.CoreCell.process_message = process_message
