"""The examples of docs/extending.md pass the tests that every entry of a registry passes."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flapsam.base.errors import FlapsamError
from flapsam.experiments.simulation import simulate
from flapsam.federation.aggregation import AGGREGATORS
from flapsam.federation.compression import CODECS, VALUES
from flapsam.federation.traffic import strategy_table
from flapsam.run.presets import PRESETS
from flapsam.run.reading import read_config
from flapsam.sam import ARCHITECTURES, STRATEGIES
from flapsam.sam.sources import SOURCES
from flapsam.sites import DATASETS
from flapsam.volumes import FORMATS, Volume, formats
from tests.federation import test_aggregation, test_compression
from tests.helpers.docs import DOCS, blocks
from tests.helpers.families import small_run
from tests.helpers.ledgers import read_events
from tests.helpers.sites import make_sites
from tests.sam import test_checkpoints, test_strategies
from tests.sites import test_datasets
from tests.volumes import test_formats

TABLES: list[Any] = [
    *(STRATEGIES, ARCHITECTURES, SOURCES, AGGREGATORS, VALUES, CODECS, DATASETS, FORMATS, PRESETS),
    *(test_strategies.EXPECTED, test_aggregation.EXPECTED, test_compression.BOUNDS),
]
PAGE = DOCS / "extending.md"


@pytest.fixture(autouse=True)
def _restore_tables() -> Iterator[None]:
    before, miniatures = [dict(table) for table in TABLES], list(test_datasets.MINIATURES)
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)
    test_datasets.MINIATURES[:] = miniatures


def example(section: str) -> SimpleNamespace:
    """Execute the blocks of a section and return the names they define.

    A block that begins with the path of a test file can use the names of that file.
    """
    defined: dict[str, Any] = {}
    for block in blocks(PAGE, "python"):
        if block.section == section:
            first = block.text.splitlines()[0]
            module = first.removeprefix("# ").removesuffix(".py").replace("/", ".")
            available = vars(import_module(module)) if module.startswith("tests.") else {}
            names = {**available, "__name__": "example"}
            exec(block.text, names)
            defined |= names
    return SimpleNamespace(**defined)


def test_every_section_with_code_is_tested_here():
    sections = [
        "A strategy",
        "A backbone",
        "An aggregator",
        "A codec",
        "A data set",
        "An image format",
        "A preset",
        "An engine",
    ]
    assert list(dict.fromkeys(block.section for block in blocks(PAGE, "python"))) == sections


def test_the_strategy_example_passes(tmp_path: Path):
    example("A strategy")
    parameters, gib, less = test_strategies.EXPECTED["lora-masks"]
    (row,) = (row for row in strategy_table("sam-vit-b", image_size=224) if row.strategy == "lora-masks")
    assert row.parameters == parameters
    assert row.gib == pytest.approx(gib, abs=5e-5)
    assert row.less == pytest.approx(less, abs=5e-3)
    test_strategies.test_a_loaded_adapter_predicts_the_same("lora-masks", tmp_path)
    test_strategies.test_only_travelling_parameters_get_a_gradient("lora-masks")


def test_the_backbone_example_passes():
    example("A backbone")
    test_checkpoints.test_the_architecture_is_inferred_from_the_tensors("sam-vit-s")
    test_checkpoints.test_every_source_has_an_architecture_and_a_scaling()
    test_strategies.test_counts_of_other_backbones_add_up("sam-vit-s")


@pytest.mark.parametrize("weights", test_aggregation.WEIGHTS.values(), ids=test_aggregation.WEIGHTS)
@pytest.mark.parametrize("ranks", [[4], [2, 4, 3]], ids=["equal ranks", "mixed ranks"])
def test_the_aggregator_example_passes(ranks: list[int], weights: list[float]):
    example("An aggregator")
    test_aggregation.test_aggregators_match_numpy("uniform", 5, ranks, weights)
    test_aggregation.test_a_client_of_weight_0_is_ignored("uniform")
    test_aggregation.test_a_total_weight_of_0_is_an_error("uniform")
    test_aggregation.test_unchanged_factors_are_returned_if_the_basis_is_kept("uniform")


def test_the_codec_example_passes():
    example("A codec")
    test_compression.test_round_trips_stay_within_the_error_bound("fp16")
    test_compression.test_the_same_seed_gives_the_same_entries("fp16")
    test_compression.test_with_feedback_the_mean_of_many_sends_approaches_the_tensor("fp16")


def test_the_data_set_example_passes(tmp_path: Path):
    example("A data set")
    miniature = test_datasets.MINIATURES[-1]
    test_datasets.test_every_data_set_has_a_miniature()
    test_datasets.test_every_data_set_reads_its_miniature(miniature, tmp_path)
    (tmp_path / "north-1_mask.nii.gz").unlink()
    assert DATASETS["flat"].read(tmp_path).problems == [
        f"{tmp_path / 'north-1_mask.nii.gz'}: the label map is missing; add it or leave the image out"
    ]


@pytest.mark.parametrize("codes", ["RAS", "PIR"])
def test_the_image_format_example_passes(codes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    example("An image format")
    # The module builds this list from the registry on import, when an entry in the sources would already be there.
    monkeypatch.setattr(formats, "_ENDS", [".npz", *formats._ENDS])

    def save_as(volume: Volume, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, image=volume.array, affine=volume.affine)
        return path

    monkeypatch.setattr(test_formats, "save_as", save_as)
    test_formats.test_images_and_label_maps_round_trip_with_their_geometry("NumPy", ".npz", codes, tmp_path)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(FlapsamError, match=r"broken\.npz: not an archive with the arrays image and affine"):
        formats.read_image(tmp_path / "broken.npz")


def test_the_preset_example_passes(tmp_path: Path):
    example("A preset")
    path = tmp_path / "run.yaml"
    path.write_text("preset: quick\ndata: {path: ., labels: {a: 1}}\n")
    config = read_config(path)
    assert (config.rounds.count, config.lora.rank, config.training.batch_size) == (5, 8, 12)


@pytest.mark.usefixtures("small_families")
def test_an_engine_matches_the_local_one_and_tolerates_a_lost_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = make_sites(tmp_path / "data", sites=2, cases=4)
    config = read_config(small_run(tmp_path / "run.yaml", data, rounds={"count": 2, "min_sites": 1}))
    simulate(config)
    run_over_bad_connections = example("An engine").run_over_bad_connections
    cut: list[tuple[str, int]] = []

    def run_rounds(cohort, server, clients, ledger, observer, workers):
        run_over_bad_connections(server, cohort, clients, ledger, lambda site, number: (site, number) in cut)

    monkeypatch.setattr("flapsam.experiments.simulation.run_rounds", run_rounds)
    simulate(config.model_copy(update={"output": tmp_path / "same"}))
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "same" / adapter).read_bytes() == (tmp_path / "run" / adapter).read_bytes()
    cut.append(("site_0", 2))
    simulate(config.model_copy(update={"output": tmp_path / "cut"}))
    missing = [event for event in read_events(tmp_path / "cut") if event["event"] == "missing"]
    assert [(event["site"], event["round"], event["reason"]) for event in missing] == [("site_0", 2, "connection lost")]
    assert (tmp_path / "cut" / adapter).read_bytes() != (tmp_path / "run" / adapter).read_bytes()
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["traffic"]["ratio"] > 1
