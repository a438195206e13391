"""Participants with valid certificates attack others, with real processes that run NVFLARE's own programs."""

import importlib.util
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.hospitals import Hospitals, kill_all, until

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("flapsam[nvflare] is not installed", allow_module_level=True)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """A server and two sites. A third kit is the attacker's."""
    federation = Hospitals(tmp_path_factory.mktemp("federation"), ["site_a", "site_b", "site_c"], proxied=False)
    federation.make_data()
    (federation.folder / "secret").write_text("PATIENT-4711\n")
    try:
        federation.start_server()
        for site in ("site_a", "site_b"):
            federation.start_site(site)
        until(lambda: all("Connected to the server" in federation.said(site) for site in ("site_a", "site_b")))
        yield federation
    finally:
        federation.stop_all()


def attack(hospitals: Hospitals, role: str, kit: Path, *targets: str) -> list[tuple[str, bool, object]]:
    """Attack, and return question, whether it was asked in the server's name, and answer."""
    answers = hospitals.folder / f"{role}-answers.json"
    with (hospitals.folder / "attacker.out").open("ab") as output:
        command = [sys.executable, "-m", "tests.helpers.attacker", role, str(kit), str(answers), *targets]
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    hospitals.running["attacker"] = process
    until(lambda: answers.exists() or process.poll() is not None, 150)
    assert answers.exists(), hospitals.said("attacker")
    kill_all(process)
    return [tuple(json.loads(line)) for line in answers.read_text().splitlines()]


def answered(answers: list[tuple[str, bool, object]]) -> list[tuple[str, bool, object]]:
    return [answer for answer in answers if not (isinstance(answer[2], dict) and "refused" in answer[2])]


def alive(hospitals: Hospitals) -> bool:
    return all(
        hospitals.running[name].poll() is None for name in ("server", "site_a", "site_b") if name in hospitals.running
    )


def test_no_process_listens_to_other_users_of_the_machine(hospitals: Hospitals):
    """Only the server listens, on its two ports. All other connections are sockets in a folder of the user's own."""
    ports = {}
    folders = set()
    for name in ("server", "site_a", "site_b"):
        family = [psutil.Process(hospitals.running[name].pid)]
        family += family[0].children(recursive=True)
        listening = {c.laddr.port for process in family for c in process.net_connections("tcp") if c.status == "LISTEN"}
        ports[name] = listening
        folders |= {Path(str(c.laddr)).parent for process in family for c in process.net_connections("unix") if c.laddr}
    assert ports == {"server": {hospitals.port, hospitals.admin_port}, "site_a": set(), "site_b": set()}
    assert folders
    for folder in folders:
        about = folder.stat()
        assert (stat.S_IMODE(about.st_mode), about.st_uid) == (0o700, os.getuid())


def test_a_site_learns_nothing_from_other_sites_and_ends_nothing(hospitals: Hospitals):
    answers = attack(hospitals, "site", hospitals.kit("site_c"), "site_a", "site_b", "server")
    assert len(answers) > 200
    assert "PATIENT-4711" not in json.dumps(answers)
    got = answered(answers)
    # What a site may ask of the server is answered. Nothing is answered in the server's name, or by another site.
    assert {json.loads(question)[3] for question, _, _ in got} <= {"server"}, got
    assert not [question for question, lie, _ in got if lie]
    assert {tuple(json.loads(question)[:2]) for question, _, _ in got} <= {("task", "challenge"), ("task", "register")}
    assert alive(hospitals)
    said = hospitals.said("server")
    assert "Refused from site_c: a message for 'site_a'" in said


def test_a_server_reads_nothing_at_its_sites_and_ends_nothing(hospitals: Hospitals):
    kill_all(hospitals.running.pop("server"))
    answers = attack(hospitals, "server", hospitals.kit("server"), "site_a", "site_b")
    assert len(answers) > 100
    assert "PATIENT-4711" not in json.dumps(answers)
    for question, _, answer in answered(answers):
        channel, topic, command, _ = json.loads(question)
        assert (channel, topic) in {("admin", "admin")} or (channel, topic) == ("cellnet.channel", "bye"), (question, answer)
        # A site answers every command in this channel, and obeys none of these.
        assert answer in {"unknown command", "the job has no valid id", "this command is not the sender's to give"}, (
            command,
            answer,
        )
    assert alive(hospitals)
    assert any("Refused from server" in hospitals.said(site) for site in ("site_a", "site_b"))
