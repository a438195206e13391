"""The bench: many runs, one table."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from flapsam.base.errors import FlapsamError
from flapsam.experiments import bench as module
from flapsam.experiments import simulation
from flapsam.experiments.bench import Row, RowSummary, cell_file, cells_of, front
from flapsam.experiments.bench import suggest as choose
from flapsam.experiments.paired import compare, holm
from flapsam.experiments.settings import SETTINGS, read_settings
from flapsam.run.reading import read_config
from tests.helpers.command import flapsam
from tests.helpers.families import small_run
from tests.helpers.places import ROOT
from tests.helpers.sites import make_sites

pytestmark = pytest.mark.usefixtures("small_families")

GRIDS = [
    {"strategies": ["lora", "partial-decoder"], "modes": ["federated", "local"]},
    {"strategies": ["lora"], "seeds": [0, 1]},
    {"strategies": ["lora"], "leave_one_out": True},
]
NAMES = [
    "lora, federated, flexlora-aligned, seed 0",
    "partial-decoder, federated, flexlora-aligned, seed 0",
    "lora, local, seed 0",
    "partial-decoder, local, seed 0",
    "lora, federated, flexlora-aligned, seed 1",
    "lora, federated, flexlora-aligned, seed 0, without site_0",
    "lora, federated, flexlora-aligned, seed 0, without site_1",
]

WHOLE = "[!.]*.json"
"""Results of cells, without the hidden file that is about to become one, or was when its process was killed."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("data"))


def write_bench(folder: Path, data: Path, **fields: object) -> Path:
    run = {"rounds": {"count": 1}, "bench": GRIDS, "output": "bench", **fields}
    return small_run(folder / "run.yaml", data, **run)


def test_cells_are_the_combinations_of_the_grids_without_duplicates(data: Path, tmp_path: Path):
    cells = cells_of(read_config(write_bench(tmp_path, data)))
    assert sorted(cell.name for cell in cells) == sorted(NAMES)
    left_out = next(config for cell, config in cells.items() if cell.unseen == "site_1")
    assert (left_out.data.unseen, left_out.strategy, left_out.modes) == (["site_1"], "lora", ["federated"])


def test_a_variant_changes_fields(data: Path, tmp_path: Path):
    variants = {"small": {"lora.rank": 1}, "": {}}
    cells = cells_of(read_config(write_bench(tmp_path, data, bench=[{"variants": variants}])))
    assert {cell.name: config.lora.rank for cell, config in cells.items()} == {
        "flap, small, federated, flexlora-aligned, seed 0": 1,
        "flap, federated, flexlora-aligned, seed 0": 2,
    }


def test_paired_differences_match_a_hand_calculation():
    first = {"a": 0.9, "b": 0.7, "c": 0.5, "only here": 0.0}
    second = {"a": 0.8, "b": 0.5, "c": 0.5}
    difference = compare(first, second, {"a": "p", "b": "p", "c": "q"})
    assert difference is not None
    assert difference.mean == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    # Two draws from the two subjects are p twice (0.15), q twice (0), or one of each.
    assert difference.low == pytest.approx(0.0)
    assert difference.high == pytest.approx(0.15)
    assert (difference.cases, difference.subjects) == (3, 2)


def test_one_subject_gives_no_interval_and_no_common_case_no_difference():
    difference = compare({"a": 1.0}, {"a": 0.5}, {"a": "p"})
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == (0.5, None, None)
    assert compare({"a": 1.0}, {"b": 0.5}, {}) is None


@pytest.fixture(scope="module")
def finished(small_families: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench that was interrupted in the fit of its third cell, then continued in part, and then completed."""
    config = read_config(write_bench(tmp_path_factory.mktemp("bench"), data))
    resumed = []

    def interrupted(cell_config, *, resume, workers, sites, observer):
        resumed.append(resume)
        if len(resumed) == 3:
            observer.step = interrupt
        return simulation.simulate(cell_config, resume=resume, sites=sites, observer=observer)

    def interrupt(count: int = 1) -> None:
        raise KeyboardInterrupt

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(module, "simulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.bench(config)
    assert len(list((config.output / "cells").glob(WHOLE))) == 2
    module.bench(config, only="partial*")
    module.bench(config)
    monkeypatch.undo()
    assert sum(resumed) == 1, "only the interrupted cell is resumed"
    return config.output


def test_an_interrupted_bench_ends_with_the_table_of_an_uninterrupted_one(finished: Path, data: Path, tmp_path: Path, capfd):
    path = write_bench(tmp_path, data)
    assert flapsam(capfd, "bench", path).code == 0
    repeated = flapsam(capfd, "bench", path.parent / "run.yaml", "--set", f"output={finished}")
    assert repeated.code == 0
    tables = [json.loads((folder / "bench.json").read_text()) for folder in (tmp_path / "bench", finished)]
    # A packet's header contains seconds, so its compressed size varies slightly.
    costs = [
        [[row.pop(key) for key in ("bytes_up", "bytes_down", "bytes_95", "seconds", "peak_bytes")] for row in table]
        for table in tables
    ]
    for first, second in zip(*costs, strict=True):
        assert first[:2] == pytest.approx(second[:2], rel=0.01)
    assert tables[0] == tables[1]
    assert "cell 1" not in repeated.err, "nothing is computed twice"


def test_a_bench_killed_in_its_second_cell_resumes(finished: Path, data: Path, tmp_path: Path, capfd):
    path = write_bench(tmp_path, data, bench=GRIDS[1:2])
    command = [sys.executable, "-m", "tests.helpers.small_cli", "bench", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    cells = tmp_path / "bench" / "cells"
    deadline = time.monotonic() + 120
    # Kill it when the second cell has written its first event, long before its end.
    while not (len(list(cells.glob(WHOLE))) == 1 and len(list(cells.glob("*/events.jsonl"))) == 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert flapsam(capfd, "bench", path).code == 0
    resumed, whole = (
        {cell.name: json.loads(cell.read_text())["scores"] for cell in (folder / "cells").glob(WHOLE)}
        for folder in (tmp_path / "bench", finished)
    )
    assert len(resumed) == 2
    assert resumed == {name: whole[name] for name in resumed}


def test_two_processes_compute_each_cell_once_and_one_takes_over_what_the_other_left(
    finished: Path, data: Path, tmp_path: Path
):
    path = write_bench(tmp_path, data)
    command = [sys.executable, "-m", "tests.helpers.small_cli", "bench", str(path)]
    cells = tmp_path / "bench" / "cells"
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    deadline = time.monotonic() + 240
    # Both are at work, each in a cell of its own. Then one is killed.
    while len(list(cells.glob("*/events.jsonl"))) < 2 or not any(cells.glob(WHOLE)):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.005)
    processes[0].kill()
    _, survivor = processes[1].communicate(timeout=240)
    _, killed = processes[0].communicate()
    assert processes[1].returncode == 0, survivor
    assert len(list(cells.glob(WHOLE))) == len(NAMES)
    begun = [[name for name in NAMES if f": {name}\n" in told] for told in (killed, survivor)]
    # The survivor computes every cell but those that the other had finished.
    assert set(begun[0]) | set(begun[1]) == set(NAMES)
    assert len(begun[0]) + len(begun[1]) <= len(NAMES) + 1
    for name in (cell.name for cell in cells.glob(WHOLE)):
        first, second = (json.loads((folder / name).read_text())["scores"] for folder in (cells, finished / "cells"))
        assert first == second


def test_shards_are_the_cells_in_turn(data: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    path = write_bench(tmp_path, data)
    computed: list[str] = []

    def compute(cell, config, file, *_) -> None:
        computed.append(cell.name)
        file.parent.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(module, "_compute", compute)
    monkeypatch.setattr(module, "read_bench", lambda config, cells: None)
    config = read_config(path)
    every = [cell.name for cell in cells_of(config)]
    for number in range(3):
        module.bench(config, shard=(number, 3))
        assert computed == every[number::3]
        computed.clear()
    for shard in ("3", "4/3", "a/b", "0/0", "-1/3"):
        outcome = flapsam(capfd, "bench", path, "--shard", shard)
        assert (outcome.code, f"--shard {shard}: is not a part" in outcome.err) == (2, True)


def test_a_cell_has_the_scores_of_the_same_simulation(finished: Path, data: Path, tmp_path: Path, capfd):
    run = small_run(tmp_path / "run.yaml", data, rounds={"count": 1}, strategy="lora", modes=["federated", "local"])
    outcome = flapsam(capfd, "simulate", run, "--json")
    assert outcome.code == 0
    expected = json.loads(outcome.out)
    flapsam(capfd, "bench", finished.parent / "run.yaml")
    row = json.loads((finished / "bench.json").read_text())[0]
    assert row["row"]["strategy"] == "lora"
    config = read_config(finished.parent / "run.yaml")
    files = {cell.name: cell_file(config, cell) for cell in cells_of(config)}
    federated, local = (json.loads(files[NAMES[number]].read_text()) for number in (0, 2))
    assert federated["scores"] == expected["cases"]["federated"]
    assert local["scores"] == expected["cases"]["local"]
    assert federated["parameters"] == expected["parameters"]
    assert (local["bytes_up"], local["bytes_down"]) == (0, 0)
    # In one round, a site receives the initial and the final tensors, and sends once.
    ledger = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    bytes_up = [e["bytes_up"] for e in ledger if e["event"] == "fit" and e["federation"] == "federated"]
    assert federated["bytes_up"] == pytest.approx(sum(bytes_up) / 2, rel=0.01)
    gains = [
        sum(a["dice"].values()) / 2 - sum(b["dice"].values()) / 2
        for a, b in zip(federated["scores"], local["scores"], strict=True)
    ]
    assert row["gain"]["mean"] == pytest.approx(sum(gains) / len(gains))


def test_an_unseen_site_is_tested_and_never_trains(finished: Path, capfd):
    flapsam(capfd, "bench", finished.parent / "run.yaml")
    rows = json.loads((finished / "bench.json").read_text())
    assert set(rows[0]["unseen"]) == {"site_0", "site_1"}
    run = next(path for path in (finished / "cells").iterdir() if path.is_dir() and path.name.endswith("without_site_1"))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert {event["site"] for event in events if event["event"] == "fit"} == {"site_0"}
    assert {event["site"] for event in events if event["event"] == "test"} == {"site_0", "site_1"}


def summary(name: str, parameters: int, dice: float, *, mode: str = "federated", done: int = 1) -> RowSummary:
    rest = dict.fromkeys(["unseen_dice", "gain", "difference", "bytes_up", "bytes_down", "seconds", "peak_bytes"])
    return RowSummary(
        Row(name, mode, ""),
        1,
        done,
        {},
        dice,
        {},
        {},
        {},
        parameters=parameters,
        **rest,  # pyright: ignore[reportArgumentType]
    )


def test_the_pareto_front_and_the_suggestion_match_hand_calculations():
    rows = [
        summary("large", 1000, 0.80),
        summary("small", 10, 0.60),
        summary("good", 100, 0.795),
        summary("beaten by good", 200, 0.79),
        summary("as good but larger", 150, 0.795),
        summary("local", 5, 0.9, mode="local"),
        summary("missing", 1, 0.9, done=0),
    ]
    assert [row.row.strategy for row in front(rows)] == ["small", "good", "large"]
    for tolerance, strategy in ((0.01, "good"), (0.001, "large"), (0.21, "small")):
        suggestion = choose(rows, tolerance)
        assert (suggestion.cheapest.row.strategy, suggestion.best.row.strategy) == (strategy, "large")
        assert suggestion.missing == [rows[-1].row.name]
    with pytest.raises(FlapsamError, match="nothing to suggest"):
        choose(rows[-2:], 0.01)


def test_suggest_and_the_pareto_plot(finished: Path, capfd):
    run = finished.parent / "run.yaml"
    assert flapsam(capfd, "bench", run).code == 0
    outcome = flapsam(capfd, "suggest", run, "--json")
    rows = json.loads((finished / "bench.json").read_text())
    federated = [row for row in rows if row["row"]["mode"] == "federated"]
    assert json.loads(outcome.out)["best"] == max(federated, key=lambda row: row["mean_dice"])
    assert "cheapest within 0.5: " in flapsam(capfd, "suggest", run, "--tolerance", "0.5").out
    picture = (finished / "bench.svg").read_text()
    assert picture.startswith("<?xml")
    assert "Pareto front" in picture


def test_missing_cells_are_marked_in_the_table(data: Path, tmp_path: Path, capfd):
    outcome = flapsam(capfd, "bench", write_bench(tmp_path, data), "--minutes", "0")
    assert outcome.code == 0
    assert "resume with cell 1 of 7" in outcome.err
    table = (tmp_path / "bench" / "bench.md").read_text().splitlines()
    assert table[2].startswith("| lora, federated, flexlora-aligned | missing | missing |")


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"bench": [{"strategies": ["flop"]}]}, [], "strategy 'flop' is unknown"),
        ({"bench": [{"variants": {"x": {"lora.rang": 1}}}]}, [], "lora.rang"),
        ({}, ["--set", "data.unseen=[nowhere]"], "no site 'nowhere'"),
        ({}, ["--set", "data.unseen=[site_0, site_1]", "--only", "*local*"], "none is left to train"),
        ({}, ["--only", "nothing*"], "matches no cell"),
    ],
)
def test_invalid_grids_are_reported(fields: dict, arguments: list[str], message: str, data: Path, tmp_path: Path, capfd):
    outcome = flapsam(capfd, "bench", write_bench(tmp_path, data, **fields), *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_cell_computed_with_another_configuration_is_refused(data: Path, tmp_path: Path, capfd):
    grid = [{"strategies": ["partial-decoder"]}]
    assert flapsam(capfd, "bench", write_bench(tmp_path, data, bench=grid)).code == 0
    outcome = flapsam(capfd, "bench", write_bench(tmp_path, data, bench=grid, lora={"rank": 3}))
    assert outcome.code == 2
    assert "computed with another configuration" in outcome.err


@pytest.mark.parametrize("name", SETTINGS)
def test_the_shipped_settings_are_valid(name: str, data: Path):
    config = read_settings(name, data)
    assert config.output == Path("runs") / name
    assert config.bench


def test_settings_need_a_data_folder(capfd):
    outcome = flapsam(capfd, "bench", "hippocampus")
    assert outcome.code == 2
    assert "--data" in outcome.err
    assert "neither a file nor settings" in flapsam(capfd, "bench", "hippo").err


def test_p_values_are_corrected_as_in_holms_paper():
    """By hand: 0.01 · 4, 0.02 · 3, 0.03 · 2 and 0.9 · 1, and each at least as large as the one before."""
    assert holm([0.03, 0.9, None, 0.01, 0.02]) == pytest.approx([0.06, 0.9, None, 0.04, 0.06])
    assert holm([0.7, 0.6]) == [1.0, 1.0]


def test_the_p_value_of_a_difference_is_that_of_scipy_over_subjects():
    rng = np.random.default_rng(0)
    first, second = ({str(number): float(value) for number, value in enumerate(rng.random(15))} for _ in range(2))
    difference = compare(first, second, {key: key for key in first})
    expected = wilcoxon([first[key] for key in first], [second[key] for key in first])[1]
    assert difference is not None and difference.p == pytest.approx(expected)
    same = compare(first, first, {key: key for key in first})
    assert same is not None and same.p == 1
