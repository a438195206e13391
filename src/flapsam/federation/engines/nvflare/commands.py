"""The commands that stay: those of the server to a site, and those of the coordinator to the server.

NVFLARE's processes also run shell commands, show files, environments and logs, restart, shut down, delete and call
components, and a site looks at a command's authorization only if its sender asks for it. Here, a command that is not listed
does not exist, and the definition of a job is compared with flapsam's own before it is unpacked.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.message import Message as CellMessage
from nvflare.fuel.hci.proto import InternalCommands
from nvflare.fuel.hci.reg import CommandRegister
from nvflare.fuel.hci.server.reg import ServerCommandRegister
from nvflare.fuel.sec.authz import AuthorizationService, AuthzContext, Person
from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory
from nvflare.private.admin_defs import Message, MsgHeader, ReturnCode, error_reply
from nvflare.private.defs import JobFailureMsgKey, RequestHeader, TrainingTopic, new_cell_message
from nvflare.private.fed.client import client_req_processors, scheduler_cmds, training_cmds
from nvflare.private.fed.client.admin import FedAdminAgent
from nvflare.private.fed.server import admin as server_admin
from nvflare.private.fed.server.fed_server import FederatedServer
from nvflare.private.fed.utils.app_deployer import AppDeployer
from nvflare.private.scheduler_constants import ShareableHeader

from flapsam.federation.engines.nvflare.definition import CONFIG, SITE_PART, is_definition

SITE_COMMANDS: Mapping[str, str] = {
    TrainingTopic.CHECK_RESOURCE: "the server asks whether the site can take a job",
    TrainingTopic.CANCEL_RESOURCE: "the job does not begin after all",
    TrainingTopic.DEPLOY: "a job is announced, with its definition",
    TrainingTopic.START_JOB: "the job begins; the site starts a process for it",
    TrainingTopic.ABORT: "the job is over; the site ends its process",
    TrainingTopic.NOTIFY_JOB_STATUS: "the job's own process says that it has started or is over",
}
"""The commands that a site obeys, with the reason why each stays."""
OWN_COMMANDS = (TrainingTopic.NOTIFY_JOB_STATUS,)
"""The commands that come from a site's own processes. All others come from the server."""
PROCESSORS = (
    scheduler_cmds.CheckResourceProcessor,
    scheduler_cmds.CancelResourceProcessor,
    training_cmds.DeployProcessor,
    scheduler_cmds.StartJobProcessor,
    training_cmds.AbortAppProcessor,
    training_cmds.NotifyJobStatusProcessor,
)
"""NVFLARE's request processors that stay. Together they serve exactly ``SITE_COMMANDS``."""
COORDINATOR_COMMANDS: Mapping[str, str] = {
    InternalCommands.CERT_LOGIN: "the coordinator proves that the certificate is its own",
    InternalCommands.LOGOUT: "the connection ends",
    InternalCommands.GET_CMD_LIST: "NVFLARE's client asks for the commands when it connects",
    InternalCommands.CHECK_SESSION: "NVFLARE's client asks whether it is still logged in",
    "check_status": "`flapsam federation status`, and which sites are connected",
    "submit_job": "a run begins or resumes",
    "list_jobs": "`flapsam federation stop` looks for waiting jobs",
    "get_job_meta": "whether a job is over",
    "abort_job": "`flapsam federation stop`",
    "app_command": "a site that has returned is to take part",
}
"""The coordinator's commands that the server obeys, with the reason why each stays."""
JOB = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Form of a job's id. It becomes the name of a folder."""
JOBS = 2
"""Number of processes for jobs that a site has at a time: the last one may still be ending when the next one starts."""
META = (
    *("name", "min_clients", "deploy_map", "study", "job_id", "job_folder_name", "job_clients"),
    *("submitter_name", "submitter_org", "submitter_role"),
)
"""Entries of a job's description that reach a site. Those that choose a launcher or a privacy scope are not among them."""
META_BYTES = 1 << 20
"""Maximum size of a job's description as JSON."""
NOT_OURS = "this is not the definition of a job of flapsam"
TEXT = 500
"""Number of characters of a site's answer that the server keeps."""


def install() -> None:
    """Remove all other commands from this process, whichever it is."""
    client_req_processors.ClientRequestProcessors.request_processors = [processor() for processor in PROCESSORS]
    FedAdminAgent._dispatch_request = _guarded(FedAdminAgent._dispatch_request)
    ServerCommandRegister.get_command_entries = _only_listed
    server_admin.send_requests = _reading_replies(server_admin.send_requests)
    FederatedServer.process_job_failure = _without_verdict(FederatedServer.process_job_failure)
    AppDeployer.deploy = _checking(AppDeployer.deploy)
    # HOCON and OmegaConf read files, variables and addresses while they are parsed.
    ConfigFactory._fmt2Loader = {ConfigFormat.JSON: ConfigFactory._fmt2Loader[ConfigFormat.JSON]}


def _guarded(dispatch: Callable[..., CellMessage]) -> Callable[..., CellMessage]:
    """NVFLARE's function that runs a site's commands, behind the checks of this file."""

    def guarded(self: Any, request: CellMessage) -> CellMessage:
        command = request.payload
        server = request.get_header(MessageHeaderKey.ORIGIN) == "server"
        refusal = _refusal(command, server, self.app_ctx.get_all_job_ids())
        if refusal:
            return new_cell_message({}, error_reply(refusal))
        return dispatch(self, CellMessage(request.headers, _cleaned(command)))

    return guarded


def _refusal(command: object, server: bool, running: Sequence[str]) -> str:
    """Why a site does not obey a command. Empty if it does.

    Args:
        command: what was received.
        server: whether it comes from the server, and not from a process of the site's own.
        running: ids of the jobs that have a process at the site.
    """
    if not isinstance(command, Message) or not isinstance(command.topic, str) or command.topic not in SITE_COMMANDS:
        return "unknown command"
    if server == (command.topic in OWN_COMMANDS):
        return "this command is not the sender's to give"
    job, meta = (command.get_header(key) for key in (RequestHeader.JOB_ID, RequestHeader.JOB_META))
    if not isinstance(job, str) or not JOB.fullmatch(job):
        return "the job has no valid id"
    if command.topic not in (TrainingTopic.DEPLOY, TrainingTopic.START_JOB):
        return ""
    if not isinstance(meta, dict) or meta.get("job_id") != job or not _is_small(meta):
        return "the job has no valid description"
    if command.topic == TrainingTopic.DEPLOY and not is_definition(command.body, SITE_PART):
        return NOT_OURS
    if command.topic == TrainingTopic.START_JOB and len({*running, job}) > JOBS:
        return "another job is running here"
    person = Person(*(str(meta.get(f"submitter_{entry}", "")) for entry in ("name", "org", "role")))
    authorized, error = AuthorizationService.authorize(AuthzContext(user=person, submitter=person, right="submit_job"))
    return "" if authorized else str(error or "not authorized")


def _is_small(meta: Mapping[str, Any]) -> bool:
    try:
        return len(json.dumps({name: meta.get(name) for name in META})) < META_BYTES
    except (TypeError, ValueError, RecursionError):
        return False


def _cleaned(command: Message) -> Message:
    """A copy of a command with nothing in it but what the listed commands need."""
    body = (
        {} if command.topic in (TrainingTopic.CHECK_RESOURCE, TrainingTopic.CANCEL_RESOURCE, TrainingTopic.START_JOB) else ""
    )
    clean = Message(command.topic, command.body if command.topic == TrainingTopic.DEPLOY else body)
    clean.id = command.id
    clean.set_header(RequestHeader.JOB_ID, command.get_header(RequestHeader.JOB_ID))
    if command.topic in (TrainingTopic.DEPLOY, TrainingTopic.START_JOB):
        meta = cast(dict[str, Any], command.get_header(RequestHeader.JOB_META))
        clean.set_header(RequestHeader.JOB_META, {name: meta[name] for name in META if name in meta} | {"resource_spec": {}})
    if command.topic == TrainingTopic.DEPLOY:
        clean.set_header(RequestHeader.APP_NAME, SITE_PART)
    token = command.get_header(ShareableHeader.RESOURCE_RESERVE_TOKEN)
    if isinstance(token, str):
        clean.set_header(ShareableHeader.RESOURCE_RESERVE_TOKEN, token)
    status = command.get_header(RequestHeader.JOB_STATUS)
    if isinstance(status, int):
        clean.set_header(RequestHeader.JOB_STATUS, status)
    return clean


def _only_listed(self: Any, cmd_name: str) -> list[Any]:
    """The commands of the coordinator with this name, with or without its scope: none if the name is not listed."""
    return [entry for entry in CommandRegister.get_command_entries(self, cmd_name) if entry.name in COORDINATOR_COMMANDS]


def _checking(deploy: Callable[..., Any]) -> Callable[..., Any]:
    """NVFLARE's function that unpacks a job's definition, which must be one of flapsam's."""

    def checking(self: Any, *, job_id: str, app_name: str, app_data: bytes, **others: Any) -> Any:
        if not JOB.fullmatch(job_id) or app_name not in CONFIG or not is_definition(app_data, app_name):
            return NOT_OURS
        return deploy(self, job_id=job_id, app_name=app_name, app_data=app_data, **others)

    return checking


def _reading_replies(send: Callable[..., Any]) -> Callable[..., Any]:
    """NVFLARE's function that sends commands to sites, whose replies are checked, since a site may send anything."""

    def reading(*arguments: Any, **options: Any) -> Any:
        replies = send(*arguments, **options)
        for reply in replies:
            reply.reply = sound_reply(reply.request.topic, reply.reply)
        return replies

    return reading


def sound_reply(topic: str, reply: object) -> Message:
    """A site's reply to a command, reduced to what the server reads.

    Args:
        topic: the command.
        reply: what the site sent.
    """
    if not isinstance(reply, Message):
        return error_reply("the site sent no valid reply")
    if reply.get_header(MsgHeader.RETURN_CODE, ReturnCode.OK) != ReturnCode.OK:
        return error_reply(str(reply.body)[:TEXT])
    body: Any = str(reply.body)[:TEXT]
    if topic == TrainingTopic.CHECK_RESOURCE:
        if not isinstance(reply.body, Shareable):
            return error_reply("the site sent no valid reply")
        ready, token = (
            reply.body.get_header(key)
            for key in (ShareableHeader.IS_RESOURCE_ENOUGH, ShareableHeader.RESOURCE_RESERVE_TOKEN)
        )
        body = Shareable()
        body.set_header(ShareableHeader.IS_RESOURCE_ENOUGH, ready is True)
        body.set_header(ShareableHeader.RESOURCE_RESERVE_TOKEN, token[:TEXT] if isinstance(token, str) else "")
    return Message("reply", body)


def _without_verdict(process: Callable[..., CellMessage]) -> Callable[..., CellMessage]:
    """NVFLARE's function for a site's report that its job failed, which must not end the job for all."""

    def heard(self: Any, request: CellMessage) -> CellMessage:
        report = request.payload
        job = report.get(JobFailureMsgKey.JOB_ID) if isinstance(report, dict) else None
        request.payload = {JobFailureMsgKey.JOB_ID: job if isinstance(job, str) else ""}
        return process(self, request)

    return heard
