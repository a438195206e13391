"""The main workflow from end to end, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flapsam import __version__
from flapsam.cli.console import TrackerName
from flapsam.report.tracking import TRACKERS
from flapsam.sam import STRATEGIES
from tests.helpers.command import flapsam
from tests.helpers.families import small_run
from tests.helpers.ledgers import read_events
from tests.helpers.sites import load, make_sites

pytestmark = pytest.mark.usefixtures("small_families")

FIELDS = {"modes": ["local", "federated", "centralised"], "rounds": {"count": 2}}


@pytest.fixture(scope="module")
def run(small_families: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run in all modes."""
    from flapsam.experiments.simulation import simulate
    from flapsam.run.reading import read_config

    root = tmp_path_factory.mktemp("main")
    config = small_run(root / "run.yaml", make_sites(root / "data", sites=2, cases=5), **FIELDS)
    simulate(read_config(config))
    return root / "run"


def test_the_run_folder_is_complete(run: Path):
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file() and "state" not in path.parts}
    assert files == {
        "run.yaml",
        "environment.json",
        "events.jsonl",
        "results.json",
        *(f"predictions/{mode}/site_{i}/{name}" for mode in FIELDS["modes"] for i, name in enumerate(_tested(run))),
        *(
            f"{folder}/{file}"
            for folder in ("adapter", "adapter-centralised", "adapter-local/site_0", "adapter-local/site_1")
            for file in ("README.md", "flapsam.json", "adapter_config.json", "adapter_model.safetensors")
        ),
    }


def test_only_the_owner_can_read_the_run(run: Path):
    assert [path for path in (run, *run.rglob("*")) if path.stat().st_mode & 0o077] == []


def _tested(run: Path) -> list[str]:
    """The one test case of each site."""
    return [f"{e['case']}.nii.gz" for e in read_events(run) if e["event"] == "test"][:2]


def test_the_ledger_records_the_whole_run(run: Path):
    events = read_events(run)
    fits = [(e["federation"], e["round"], e["site"]) for e in events if e["event"] == "fit"]
    assert fits == [
        *(("local/site_0", number, "site_0") for number in (1, 2)),
        *(("local/site_1", number, "site_1") for number in (1, 2)),
        *(("federated", number, f"site_{i}") for number in (1, 2) for i in (0, 1)),
        *(("centralised", number, "centralised") for number in (1, 2)),
    ]
    validations = {(e["federation"], e["round"]) for e in events if e["event"] == "validation"}
    assert validations == {(name, number) for name, number, _ in fits}
    assert all({"kidney", "ball"} & set(e["dice"]) for e in events if e["event"] == "validation")
    assert events[-1]["event"] == "end"


def test_the_ledgers_bytes_match_the_packets(run: Path):
    federated = [e for e in read_events(run) if e.get("federation") == "federated"]
    fits = [e for e in federated if e["event"] == "fit"]
    last = {e["site"]: e["bytes_up"] for e in fits if e["round"] == 2}
    kept = {p.parent.name: p.stat().st_size for p in (run / "state/federated/sites").rglob("reply-*.packet")}
    assert last == kept
    traffic = json.loads((run / "results.json").read_text())["traffic"]
    assert traffic["up"] == pytest.approx(sum(e["bytes_up"] for e in fits) / len(fits))
    assert traffic["down"] == pytest.approx(sum(e.get("bytes_down", 0) for e in federated) / len(fits))


def test_local_training_is_never_aggregated(run: Path):
    """A locally trained adapter has exactly the tensors of its site's last reply."""
    import torch

    from flapsam.adapters.store import read_tensors
    from flapsam.federation.packets import Contract, decode
    from flapsam.run.reading import read_config
    from flapsam.sam import assemble_run, travelling_state

    tensors = read_tensors(run / "adapter-local" / "site_0")
    (reply,) = (run / "state/local/site_0/sites/site_0").glob("reply-*.packet")
    config = read_config(run / "run.yaml")
    contract = Contract.of(travelling_state(assemble_run(config).network))
    _, sent = decode(reply.read_bytes(), lambda header: contract, contract.tensor_bytes)
    assert all(torch.equal(sent[name], tensors[name]) for name in tensors)


def test_predict_reproduces_the_runs_label_maps(run: Path, tmp_path: Path, capfd):
    data = run.parent / "data"
    outcome = flapsam(capfd, "predict", run, data, "--split", "test", "-o", tmp_path / "out", "--threads", "1", "--json")
    assert outcome.code == 0, outcome.err
    written = [Path(path) for path in json.loads(outcome.out)["written"]]
    assert len(written) == 2
    for path in written:
        expected = run / "predictions" / "federated" / path.relative_to(tmp_path / "out")
        assert path.read_bytes() == expected.read_bytes()
        assert load(path).get_data_dtype() == np.uint8


def test_evaluate_reproduces_the_runs_scores(run: Path, capfd):
    data, predictions = run.parent / "data", run / "predictions" / "federated"
    outcome = flapsam(capfd, "evaluate", predictions, data, "--adapter", run, "--json")
    assert outcome.code == 0, outcome.err
    evaluated, expected = json.loads(outcome.out), json.loads((run / "results.json").read_text())
    assert evaluated["cases"] == expected["cases"]["federated"]
    assert evaluated["pooled"] == expected["summaries"]["federated"]["pooled"]


def test_evaluate_without_an_adapter_scores_label_values(run: Path, capfd):
    data, predictions = run.parent / "data", run / "predictions" / "federated"
    outcome = flapsam(capfd, "evaluate", predictions, data, "--json")
    expected = json.loads((run / "results.json").read_text())["summaries"]["federated"]["pooled"]["dice"]
    assert list(json.loads(outcome.out)["pooled"]["dice"].values()) == list(expected.values())


def test_predict_accepts_files_and_folders(run: Path, tmp_path: Path, capfd):
    images = run.parent / "data" / "site_0" / "images"
    image = sorted(images.iterdir())[0]
    assert flapsam(capfd, "predict", run / "adapter", image, "-o", tmp_path / "one").code == 0
    records = {"labels.txt", "predictions.jsonl", "volumes.csv"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == {image.name, *records}
    assert flapsam(capfd, "predict", run, images, "-o", tmp_path / "folder").code == 0
    assert len(list((tmp_path / "folder").glob("*.nii.gz"))) == 5
    assert flapsam(capfd, "predict", run, run.parent / "data", "-o", tmp_path / "sites").code == 0
    assert len(list((tmp_path / "sites").rglob("*.nii.gz"))) == 10


def test_simulate_prints_tables(tmp_path: Path, capfd):
    config = small_run(
        tmp_path / "run.yaml", make_sites(tmp_path / "data"), rounds={"count": 1}, modes=["local", "federated"]
    )
    outcome = flapsam(capfd, "simulate", config)
    assert outcome.code == 0, outcome.err
    for text in ("local-only", "federated", "gain", "site_0", "all cases", "reduction", "HD95"):
        assert text in outcome.out
    assert "random weights (not pretrained)" in outcome.err.replace("\n", " ")
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.usefixtures("no_report")
def test_an_automatic_micro_batch_is_kept_on_resuming(tmp_path: Path, capfd):
    training = {"micro_batch": "auto", "checkpointing": True, "batch_size": 4}
    config = small_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"), rounds={"count": 1}, training=training)
    for resume in ((), ("--resume",)):
        outcome = flapsam(capfd, "simulate", config, *resume)
        assert outcome.code == 0, outcome.err
        assert "micro_batch: 4 of the 4 windows of a batch" in outcome.err.replace("\n", " ")
    events = read_events(tmp_path / "run")
    assert [event["windows"] for event in events if event["event"] == "micro_batch"] == [4]


def test_memory_prints_a_table(capfd):
    outcome = flapsam(capfd, "memory", "--backbone", "sam-tiny", "--size", "64")
    assert outcome.code == 0, outcome.err
    assert "with checkpointing" in outcome.out
    rows = json.loads(flapsam(capfd, "memory", "--backbone", "sam-tiny", "--size", "64", "--json").out)
    assert [row["slices"] for row in rows] == [1, 2, 4, 8, 16]
    assert flapsam(capfd, "memory", "--precision", "fp8").code == 2


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs_and_is_deterministic(strategy: str, tmp_path: Path, capfd):
    data = make_sites(tmp_path / "data", sites=2, cases=3)
    adapters = []
    for name in ("a", "b"):
        fields = {"rounds": {"count": 1}, "training": {"window": 3, "batch_size": 3, "warmup_steps": 2}}
        config = small_run(tmp_path / f"{name}.yaml", data, strategy=strategy, output=name, **fields)
        outcome = flapsam(capfd, "simulate", config, "--json")
        assert outcome.code == 0, outcome.err
        folder = tmp_path / name / "adapter"
        adapters.append({path.name: path.read_bytes() for path in folder.glob("*.safetensors")})
    assert adapters[0] and adapters[0] == adapters[1]


@pytest.mark.usefixtures("no_report")
def test_another_seed_changes_the_adapter(tmp_path: Path, capfd):
    data = make_sites(tmp_path / "data", sites=2, cases=3)
    adapters = []
    for seed in (0, 1):
        config = small_run(tmp_path / f"{seed}.yaml", data, seed=seed, output=str(seed), rounds={"count": 1})
        assert flapsam(capfd, "simulate", config).code == 0
        adapters.append((tmp_path / str(seed) / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1]


@pytest.mark.usefixtures("no_report")
def test_a_class_that_a_site_does_not_label_is_not_scored_there(tmp_path: Path, capfd):
    data = make_sites(tmp_path / "data")
    config = small_run(tmp_path / "run.yaml", data, rounds={"count": 1})
    outcome = flapsam(capfd, "simulate", config, "--json", "--set", "data.site_labels={site_1: {ball: [1, 2], core: null}}")
    assert outcome.code == 0, outcome.err
    summaries = json.loads(outcome.out)["summaries"]["federated"]
    assert summaries["site_1"]["dice"]["core"] is None
    assert summaries["site_1"]["dice"]["ball"] is not None
    assert summaries["site_0"]["dice"]["core"] is not None


def test_traffic_prints_a_table_of_all_strategies(capfd):
    outcome = flapsam(capfd, "traffic")
    assert outcome.code == 0
    rows = {line.split("│")[1].strip(): line for line in outcome.out.splitlines() if line.startswith("│")}
    for name, parameters, gib in (
        ("full", "90,532,927", "67.452"),
        ("attention", "30,053,104", "22.391"),
        ("decoder", "3,902,195", "2.907"),
        ("partial-decoder", "478,320", "0.356"),
        ("lora", "1,368,064", "1.019"),
        ("lora-decoder", "5,270,259", "3.927"),
        ("flap", "1,846,384", "1.376"),
    ):
        assert parameters in rows[name] and gib in rows[name]
    tiny_rows = json.loads(flapsam(capfd, "traffic", "--backbone", "sam-tiny", "--json").out)
    assert [row["strategy"] for row in tiny_rows] == list(STRATEGIES)


def test_doctor_version_and_phantom(tmp_path: Path, capfd):
    report = json.loads(flapsam(capfd, "doctor", "--json").out)
    assert report["packages"]["torch"] and report["cores"] >= 1
    assert "memory gib" in flapsam(capfd, "doctor").out
    assert flapsam(capfd, "--version").out.strip().count(".") == 2
    assert flapsam(capfd, "data", "phantom", tmp_path, "--sites", "1", "--cases", "2").code == 0
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 4


def test_the_command_line_offers_every_registered_tracker():
    assert list(TrackerName) == list(TRACKERS)


def test_the_command_line_runs_as_a_module():
    """Systemd units printed by earlier versions run ``python -m flapsam.cli``."""
    version = subprocess.check_output([sys.executable, "-m", "flapsam.cli", "--version"], text=True)
    assert version.strip() == __version__
