"""NVFLARE's handling of sites' requests in a job at the server, without the means by which a site could end the job.

A site's answer is decoded, downloaded and written only if the intake expects one.
"""

from collections.abc import Callable
from typing import Any

from nvflare.apis.fl_constant import ReservedKey, ServerCommandNames
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet import cell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.cacheable import ItemConsumer
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
from nvflare.fuel.utils.fobs.decomposers.via_downloader import ViaDownloaderDecomposer
from nvflare.private.defs import CellMessageHeaderKeys
from nvflare.private.fed.server.server_command_agent import ServerCommandAgent
from nvflare.private.fed.server.server_runner import ServerRunner

from flapsam.federation.engines.nvflare.intake import INTAKE, Unwanted


def install() -> None:
    """Put the intake in front of NVFLARE's handling of answers, and take from sites the means to end a job.

    It is for the process of a job at the server.
    """
    cell.Adapter.call = _asked_for(cell.Adapter.call)
    ItemConsumer.consume = _counted(ItemConsumer.consume)
    ViaDownloaderDecomposer._download_from_remote_cell = _from_sender(ViaDownloaderDecomposer._download_from_remote_cell)
    ServerCommandAgent.execute_command = _as_itself(ServerCommandAgent.execute_command)
    ServerCommandAgent.aux_communicate = _as_itself(ServerCommandAgent.aux_communicate)
    # NVFLARE ends the job, or its process, when a site's answer has one of these codes or cannot be decoded.
    ServerRunner.ABORT_RETURN_CODES = []
    cell._is_server_job_cell = lambda my_info: False


def participant(message: Message) -> str:
    """The participant that sent a message. The gate has compared it with the certificate."""
    return str(message.get_header(MessageHeaderKey.ORIGIN, "")).split(".")[0]


def _asked_for(call: Callable[..., None]) -> Callable[..., None]:
    """NVFLARE's function that decodes a streamed request, for answers only if they were asked for."""

    def asked_for(self: Any, future: Any, *arguments: Any, **options: Any) -> None:
        route = tuple(future.headers.get(key) for key in (StreamHeaderKey.CHANNEL, StreamHeaderKey.TOPIC))
        if route != (CellChannel.SERVER_COMMAND, ServerCommandNames.SUBMIT_UPDATE):
            return call(self, future, *arguments, **options)
        with INTAKE.receiving(participant(Message(future.headers))):
            return call(self, future, *arguments, **options)

    return asked_for


def _counted(consume: Callable[..., Any]) -> Callable[..., Any]:
    """NVFLARE's function that takes a downloaded piece, which counts it against the budget of its answer."""

    def counted(self: Any, ref_id: str, state: Any, data: Any) -> Any:
        budget = INTAKE.budget
        if budget is not None:
            budget.spend(sum(len(item) for item in data))
        return consume(self, ref_id, state, data)

    return counted


def _from_sender(download: Callable[..., Any]) -> Callable[..., Any]:
    """NVFLARE's function that downloads a packet, but only as a part of an answer, and from the site that sends it."""

    def from_sender(self: Any, fobs_ctx: dict[str, Any], ref: dict[str, Any]) -> Any:
        owner = str(ref.get("fqcn", "")).split(".")[0]
        if owner != INTAKE.sender:
            raise Unwanted("the answer points to somebody else")
        return download(self, fobs_ctx, ref)

    return from_sender


def _as_itself(execute: Callable[..., Message]) -> Callable[..., Message]:
    """NVFLARE's function that serves a site's request, in which the site cannot pass for another one."""

    def as_itself(self: Any, request: Message) -> Message:
        site, data = participant(request), request.payload
        if site == "server":
            return execute(self, request)
        client = self._get_client(request.get_header(CellMessageHeaderKeys.TOKEN))
        if client is None or client.name != site or not isinstance(data, Shareable):
            return make_reply(ReturnCode.UNAUTHENTICATED)
        context = data.get_peer_props()
        if isinstance(context, dict):
            data.set_peer_props({**context, ReservedKey.IDENTITY_NAME: site})
        return execute(self, request)

    return as_itself
