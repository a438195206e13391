"""Start-up kits: their contents, the limits that they set for jobs, renewal, and errors."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.x509.oid import NameOID

from flapsam.base.errors import FlapsamError
from tests.helpers.command import flapsam

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("flapsam[nvflare] is not installed", allow_module_level=True)

from flapsam.federation.engines.nvflare.kits import read_kit

FEDERATION = {"name": "kidney", "server": {"host": "fl.example.org"}, "sites": ["hospital_b", "hospital_a"]}


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**FEDERATION, **changes}))
    return path


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    command = [sys.executable, "-m", "flapsam.cli", "federation", "provision", str(write(folder / "f.yaml")), "-o"]
    subprocess.run([*command, str(folder / "kits")], check=True, capture_output=True)
    return folder / "kits"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_each_participant_has_a_kit_with_its_own_certificate(kits: Path):
    assert sorted(path.name for path in kits.iterdir()) == ["authority", "coordinator", "hospital_a", "hospital_b", "server"]
    root = x509.load_pem_x509_certificate((kits / "server/startup/rootCA.pem").read_bytes())
    names = {"server": "fl.example.org", "hospital_a": "hospital_a", "hospital_b": "hospital_b"}
    for name, expected in names.items():
        certificate = read_kit(kits / name, "server", "site").certificate
        assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == expected
        certificate.verify_directly_issued_by(root)
    # Only the authority's folder holds the root's key.
    keys = {path.read_bytes() for path in kits.rglob("*.key")}
    assert len(keys) == 4 and b"PRIVATE" not in b"".join(
        (kits / "hospital_a/startup").glob("*.pem").__next__().read_bytes().split()
    )


def test_only_their_owner_can_read_kits(kits: Path):
    for path in [
        kits / "authority",
        kits / "authority/state/cert.json",
        *kits.glob("hospital_a/**/*"),
        *kits.glob("server/**/*"),
    ]:
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize(("name", "key", "mode"), [("hospital_a", "client", 0o640), ("server", "server", 0o604)])
def test_a_kit_whose_key_others_can_read_is_refused(name: str, key: str, mode: int, kits: Path, tmp_path: Path, capfd):
    shutil.copytree(kits / name, tmp_path / "my kit")
    path = tmp_path / "my kit" / "startup" / f"{key}.key"
    path.chmod(mode)
    outcome = flapsam(capfd, "federation", "server" if name == "server" else "check", tmp_path / "my kit")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert f"Error: {path}: other users of this machine can read this private key" in outcome.err
    command = outcome.err.rpartition("run: ")[2]
    assert command == f"chmod -R go-rwx '{tmp_path}/my kit'\n"
    subprocess.run(command, shell=True, check=True)
    assert read_kit(tmp_path / "my kit", "server", "site").card.name == name


@pytest.mark.parametrize(
    "card",
    [
        {"name": "../x"},
        {"name": "a\nExecStart=x"},
        {"federation": "a\nb"},
        {"server": "no port"},
        {"sites": ["a", "A"]},
        {"name": 1},
    ],
    ids=str,
)
def test_a_kit_with_a_false_description_is_refused(card: dict, kits: Path, tmp_path: Path):
    shutil.copytree(kits / "hospital_a", tmp_path / "kit")
    (tmp_path / "kit" / "kit.json").write_text(json.dumps(read(kits / "hospital_a" / "kit.json") | card))
    with pytest.raises(FlapsamError, match="not a start-up kit"):
        read_kit(tmp_path / "kit", "site")


@pytest.mark.parametrize("name", ["server", "hospital_a", "hospital_b"])
def test_policies_are_hardened(name: str, kits: Path):
    local = kits / name / "local"
    rights = read(local / "authorization.json")["permissions"]
    assert {role for role, value in rights.items() if value != "none"} == {"project_admin"}
    allowed = {right for right, value in rights["project_admin"].items() if value != "none"}
    assert allowed == {"submit_job", "manage_job", "app_command", "view"}
    resources = read(local / "resources.json")
    assert resources["class_list_enforcement_mode"] == "enforce"
    (allowed_class,) = resources["class_allow_list"]
    assert allowed_class.startswith("flapsam.federation.engines.nvflare.") and not allowed_class.endswith(".")
    assert resources["allow_log_streaming"] is False
    assert not [part for part in resources["components"] if "log" in part["id"]]
    assert not list((kits / name).rglob("*.sh"))


def test_connections_use_mutual_tls_and_administration_stays_on_the_machine(kits: Path):
    (server,) = read(kits / "server/startup/fed_server.json")["servers"]
    assert (server["connection_security"], server["admin_host"], server["admin_port"]) == ("mtls", "127.0.0.1", 8003)
    client = read(kits / "hospital_a/startup/fed_client.json")
    assert client["client"]["connection_security"] == "mtls"
    assert client["servers"][0]["service"]["target"] == "fl.example.org:8002"
    assert "hospital_b" not in "".join(path.read_text() for path in (kits / "hospital_a").rglob("*") if path.is_file())


def test_a_new_site_gets_a_kit_and_the_other_kits_stay_unchanged(kits: Path, tmp_path: Path, capfd):
    before = {path: path.read_bytes() for path in kits.rglob("*") if path.is_file() and "authority" not in path.parts}
    federation = write(tmp_path / "f.yaml", sites=["hospital_a", "hospital_b", "hospital_c"])
    assert flapsam(capfd, "federation", "provision", federation, "-o", kits).code == 0
    assert {path: path.read_bytes() for path in before} == before
    root = x509.load_pem_x509_certificate((kits / "server/startup/rootCA.pem").read_bytes())
    read_kit(kits / "hospital_c", "site").certificate.verify_directly_issued_by(root)


def test_a_renewed_kit_has_a_new_certificate_from_the_same_authority(kits: Path, tmp_path: Path, capfd):
    old = {name: read_kit(kits / name, "site").certificate for name in ("hospital_a", "hospital_b")}
    path = write(tmp_path / "f.yaml")
    assert flapsam(capfd, "federation", "provision", path, "-o", kits, "--renew", "hospital_a").code == 0
    new = {name: read_kit(kits / name, "site").certificate for name in old}
    assert new["hospital_a"].serial_number != old["hospital_a"].serial_number
    assert new["hospital_b"] == old["hospital_b"]
    new["hospital_a"].verify_directly_issued_by(
        x509.load_pem_x509_certificate((kits / "server/startup/rootCA.pem").read_bytes())
    )


def test_a_systemd_unit_restarts_a_participant(kits: Path, capfd):
    outcome = flapsam(capfd, "federation", "server", kits / "server", "--unit")
    assert f"federation server {kits / 'server'}" in outcome.out and "Restart=always" in outcome.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": []}, "'sites'"),
        ({"sites": ["a b"]}, "'a b' is not a valid site name"),
        ({"sites": ["../x"]}, "'../x' cannot be a name, because it contains a slash"),
        ({"sites": ["server"]}, "'server' is not a valid site name"),
        ({"sites": ["Authority"]}, "'Authority' is not a valid site name"),
        ({"sites": ["a", "a"]}, "'a' is listed twice"),
        ({"sites": ["a", "A"]}, "'a' and 'A' count as the same name"),
        ({"server": {"host": "../x"}}, "'server.host': '../x' cannot be a name"),
        ({"server": {"host": "x", "port": 0}}, "'server.port'"),
        ({"server": {}}, "'server.host' is missing"),
        ({"name": "../x"}, "'name'"),
        ({"site": ["a"]}, "unknown key 'site'"),
    ],
)
def test_an_invalid_federation_file_is_reported_in_one_sentence(changes: dict, message: str, tmp_path: Path, capfd):
    outcome = flapsam(capfd, "federation", "provision", write(tmp_path / "f.yaml", **changes), "-o", tmp_path / "kits")
    assert outcome.code == 2 and message in outcome.err.replace("\n", " "), outcome.err
    assert not (tmp_path / "kits").exists()


def test_user_errors_are_reported_in_one_sentence(kits: Path, tmp_path: Path, capfd):
    run = tmp_path / "run.yaml"
    run.write_text("data: {labels: {a: 1}, sites: [elsewhere]}\nbackbone: {weights: random}\n")
    (tmp_path / "site.yaml").write_text("data: {path: nowhere}\n")
    for arguments, message in (
        (("server", tmp_path), "not a start-up kit"),
        (("server", kits / "hospital_a"), "this kit is for a site, not for a server"),
        (("site", kits / "hospital_a", "--data", tmp_path / "site.yaml"), "data.path: the folder"),
        (("run", run, "--kit", kits / "server"), "this kit is for a server, not for a coordinator"),
        (("run", run, "--kit", kits / "coordinator"), "data.sites: unknown site 'elsewhere'"),
        (("provision", write(tmp_path / "f.yaml"), "-o", kits, "--renew", "nobody"), "--renew nobody: unknown participant"),
        (("provision", write(tmp_path / "g.yaml", name="liver"), "-o", kits), "the kits here belong to another federation"),
    ):
        outcome = flapsam(capfd, "federation", *arguments)
        assert outcome.code == 2 and message in outcome.err.replace("\n", " "), outcome.err


def test_without_nvflare_the_error_says_what_to_install(capfd, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nvflare" else real(name, *rest))
    outcome = flapsam(capfd, "federation", "status")
    assert outcome.code == 2 and "pip install 'flapsam[nvflare]'" in outcome.err


def test_a_site_shows_its_own_key_which_the_coordinator_never_had(kits: Path, tmp_path: Path, capfd):
    shutil.copytree(kits / "hospital_a", tmp_path / "hospital_a")
    own, names = tmp_path / "hospital_a", {path.name for path in kits.rglob("*")}
    shown = flapsam(capfd, "federation", "key", own)
    line, advice = shown.out.splitlines()
    public = line.removeprefix("hospital_a: ")
    assert shown.code == 0 and len(bytes.fromhex(public)) == 32 and "secure.partners" in advice
    assert json.loads(flapsam(capfd, "federation", "key", own, "--json").out) == {"hospital_a": public}
    assert (own / "state" / "identity.key").stat().st_mode & 0o077 == 0 and "identity.key" not in names
    assert flapsam(capfd, "federation", "key", kits / "server").code == 2
