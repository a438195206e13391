"""The tables of what stays in NVFLARE's processes, against the NVFLARE that is installed."""

import importlib.util
import io
import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("flapsam[nvflare] is not installed", allow_module_level=True)

import nvflare
from nvflare.fuel.f3.cellnet.defs import CellChannel
from nvflare.private.fed.client import client_req_processors

from flapsam.federation.engines.nvflare import commands
from flapsam.federation.engines.nvflare.definition import (
    CONFIG,
    SERVER_PART,
    SITE_PART,
    is_definition,
    server_part,
    site_part,
    write_job,
)
from flapsam.federation.engines.nvflare.gate import REQUESTS, Cell, Role, authentic, needed
from flapsam.federation.engines.nvflare.intake import Budget, Intake, Unwanted
from flapsam.federation.engines.nvflare.process import OneLineRecord

JOB = "00000000-0000-0000-0000-000000000000"
KNOWN_PROCESSORS = {
    *("AbortAppProcessor", "AbortTaskProcessor", "CancelResourceProcessor", "CheckResourceProcessor", "ClientInfoProcessor"),
    *("ClientStatusProcessor", "ConfigureJobLogProcessor", "ConfigureSiteLogProcessor", "DeleteRunNumberProcessor"),
    *("DeployProcessor", "NotifyJobStatusProcessor", "ReportEnvProcessor", "ReportResourcesProcessor"),
    *("ReportVersionProcessor", "RestartClientProcessor", "ScopeInfoProcessor", "ShellCommandProcessor"),
    *("ShutdownClientProcessor", "StartJobProcessor", "SysInfoProcessor"),
}
"""All request processors of NVFLARE 2.9. A new one would not run, but somebody should look at it."""
KNOWN_CHANNELS = {
    *("admin", "aux_communication", "cellnet.channel", "client_command", "client_sub_worker_command", "edge_request"),
    *("hci_channel", "multi_process_executor", "return_only", "server_command", "server_parent_listener"),
    *("simulator_runner", "task"),
}
"""All channels that NVFLARE 2.9 names in one place. Messages of a new one would be dropped."""


def test_an_upgrade_that_brings_a_new_processor_or_channel_is_noticed():
    processors = {type(p).__name__ for p in client_req_processors.ClientRequestProcessors.request_processors}
    assert processors in (KNOWN_PROCESSORS, {processor.__name__ for processor in commands.PROCESSORS})
    channels = {value for name, value in vars(CellChannel).items() if not name.startswith("_") and isinstance(value, str)}
    assert channels == KNOWN_CHANNELS
    used = {content.removeprefix("stream ").split(":")[0] for asked in REQUESTS.values() for content in asked}
    assert used <= channels | {"download_service__"}


def test_the_processors_that_stay_serve_exactly_the_listed_commands():
    topics = [topic for processor in commands.PROCESSORS for topic in processor().get_topics()]
    assert sorted(topics) == sorted(commands.SITE_COMMANDS)


def test_every_entry_has_a_reason():
    reasons = [reason for asked in REQUESTS.values() for reason in asked.values()]
    reasons += [*commands.SITE_COMMANDS.values(), *commands.COORDINATOR_COMMANDS.values()]
    assert all(len(reason.split()) >= 3 for reason in reasons)


@pytest.mark.parametrize(
    ("sender", "receiver", "content", "expected"),
    [
        (Role.SITE, Role.SITE, "admin:admin", False),
        (Role.SITE, Role.SITE, "reply admin:admin", False),
        (Role.SITE, Role.SITE, "ack", False),
        (Role.SITE_JOB, Role.SITE_JOB, "stream aux_communication:__end_run__", False),
        (Role.SITE, Role.SERVER, "admin:admin", False),
        (Role.SITE, Role.SERVER, "stream hci_channel:command", False),
        (Role.SITE_JOB, Role.SERVER, "server_parent_listener:get_clients", False),
        (Role.SITE, Role.SERVER_JOB, "stream server_command:submit_update", False),
        (Role.SITE_JOB, Role.SERVER_JOB, "stream server_command:submit_update", True),
        (Role.SITE_JOB, Role.SERVER_JOB, "server_command:submit_update", False),
        (Role.SITE_JOB, Role.SERVER_JOB, "stream server_command:abort", False),
        (Role.COORDINATOR, Role.SITE, "admin:admin", False),
        (Role.COORDINATOR, Role.SERVER_JOB, "stream server_command:abort", False),
        (Role.SERVER, Role.SITE, "admin:admin", True),
        (Role.SITE, Role.SERVER, "reply admin:admin", True),
        (Role.SERVER, Role.SITE, "client_command:abort", False),
        (Role.SERVER, Role.SITE_JOB, "client_command:abort", False),
        (Role.SERVER_JOB, Role.SITE, "admin:admin", False),
        (Role.SERVER, Role.SITE, "cellnet.net_manager:stop_cell", False),
        (Role.SERVER, Role.SITE, "a new channel:x", False),
    ],
)
def test_only_what_a_run_needs_passes(sender: Role, receiver: Role, content: str, expected: bool):
    assert needed(sender, receiver, content) == expected


A, B, SERVER = Cell("site_a"), Cell("site_b"), Cell("server")
A_JOB, B_JOB, SERVER_JOB = Cell("site_a", JOB), Cell("site_b", JOB), Cell("server", JOB)


@pytest.mark.parametrize(
    ("own", "peer", "identity", "internal", "origin", "destination", "expected"),
    [
        (SERVER, A, "site_a", False, A, SERVER, True),
        (SERVER, A, "site_b", False, A, SERVER, False),
        (SERVER, A, None, False, A, SERVER, False),
        (SERVER, A, "site_a", False, B, SERVER, False),
        (SERVER, A, "site_a", False, SERVER, A, False),
        (SERVER, SERVER, "server", False, SERVER, SERVER, False),
        (SERVER, A, "site_a", False, A, B, False),
        (SERVER, A_JOB, "site_a", False, A_JOB, B_JOB, False),
        (SERVER, A_JOB, "site_a", False, A_JOB, SERVER_JOB, True),
        (SERVER, A_JOB, "site_a", False, A_JOB, Cell("server", "another"), False),
        (SERVER, A, "site_a", False, A, SERVER_JOB, False),
        (SERVER, Cell("_admin_1"), "admin@flapsam.local", False, Cell("_admin_1"), A, False),
        (A, SERVER, None, False, SERVER, A, True),
        (A, SERVER, None, False, B, A, False),
        (A, B, None, False, B, A, False),
        (A, SERVER, None, False, SERVER, B, False),
        (A_JOB, SERVER, None, False, SERVER_JOB, A_JOB, True),
        (A_JOB, SERVER, None, False, Cell("server", "another"), A_JOB, False),
        (A, A_JOB, None, True, A_JOB, A, True),
        (A, A_JOB, None, True, SERVER, A, False),
        (A, B_JOB, None, True, B_JOB, A, False),
        (A, A_JOB, None, True, A_JOB, B, False),
        (SERVER, SERVER_JOB, None, True, SERVER_JOB, A_JOB, True),
        (SERVER, SERVER_JOB, None, True, SERVER_JOB, A, False),
        (SERVER_JOB, A_JOB, "site_a", False, A_JOB, SERVER_JOB, False),
    ],
)
def test_a_messages_origin_follows_from_its_connection(own, peer, identity, internal, origin, destination, expected):
    assert authentic(own, peer, identity, internal, origin, destination) == expected


@pytest.mark.parametrize("name", ["", ".", "a.", ".b", "a.b.c", None, 1, b"a"])
def test_a_name_of_no_cell_has_no_cell(name: object):
    assert Cell.named(name) is None


def zipped(files: Mapping[str, object]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, bytes) else json.dumps(content))
    return packed.getvalue()


SERVERS, SITES = server_part("/run"), site_part()
EVIL = {**SITES[CONFIG[SITE_PART]], "components": [{"id": "x", "path": "os.system", "args": {}}]}


@pytest.mark.parametrize(
    ("part", "packed", "expected"),
    [
        (SITE_PART, zipped(SITES), True),
        (SERVER_PART, zipped(SERVERS), True),
        (SITE_PART, zipped({**SITES, "config/": b"", ".__nvfl_sig.json": b"x", "config/.__nvfl_sig.json": b"x"}), True),
        (SITE_PART, zipped(SERVERS), False),
        (SERVER_PART, zipped(SITES), False),
        (SITE_PART, zipped({**SITES, "custom/spy.py": b"x"}), False),
        (SITE_PART, zipped({**SITES, "config/config_fed_client.conf": b"include file(x)"}), False),
        (SITE_PART, zipped({"config/config_fed_client.conf": SITES[CONFIG[SITE_PART]]}), False),
        (SITE_PART, zipped({**SITES, "config/../../x": b"x"}), False),
        (SITE_PART, zipped({**SITES, "custom/": b""}), False),
        (SITE_PART, zipped({CONFIG[SITE_PART]: EVIL}), False),
        (SITE_PART, zipped({CONFIG[SITE_PART]: [[[]]]}), False),
        (SITE_PART, zipped({CONFIG[SITE_PART]: b"[" * 100_000}), False),
        (SITE_PART, zipped({CONFIG[SITE_PART]: b" " * (1 << 21)}), False),
        (SERVER_PART, zipped({CONFIG[SERVER_PART]: {"workflows": []}}), False),
        (SITE_PART, b"PK", False),
        (SITE_PART, "text", False),
        (SITE_PART, None, False),
    ],
)
def test_only_flapsams_own_definition_is_one(part: str, packed: object, expected: bool):
    assert is_definition(packed, part) == expected


def test_a_job_that_flapsam_writes_is_a_definition(tmp_path: Path):
    job = write_job(tmp_path, "0" * 32, tmp_path / "run", ["site_a"], 1)
    for part in (SERVER_PART, SITE_PART):
        files = {str(path.relative_to(job / part)): path.read_bytes() for path in (job / part).rglob("*.json")}
        assert is_definition(zipped(files), part)


def test_an_answer_is_taken_once_for_each_request():
    intake = Intake()
    with pytest.raises(Unwanted), intake.receiving("site_a"):
        pass
    intake.expect("site_a", 1)
    with intake.receiving("site_a"):
        assert intake.sender == "site_a"
        with pytest.raises(Unwanted), intake.receiving("site_a"):
            pass
    assert not intake.take("site_a", 2)
    assert not intake.take("site_b", 1)
    assert intake.take("site_a", 1)
    assert not intake.take("site_a", 1)
    with pytest.raises(Unwanted), intake.receiving("site_a"):
        pass


def test_an_answer_brings_no_more_bytes_than_agreed():
    budget = Budget(10)
    budget.spend(9)
    budget.spend(0)
    with pytest.raises(Unwanted, match="larger than was agreed"):
        budget.spend(1)


def test_nvflare_has_the_version_that_the_tables_were_written_for():
    assert nvflare.__version__.startswith("2.9.")


def test_a_text_from_elsewhere_adds_no_entry_to_a_log():
    record = OneLineRecord("n", logging.INFO, "p", 1, "site %s left", ("a\n2026-01-01 ERROR b\x1b[2J",), None)
    assert record.getMessage() == r"site a\n2026-01-01 ERROR b\x1b[2J left"
