"""User errors: one clear sentence, exit code 2, no traceback, and nothing half-written."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from flapsam.run.config import Backbone, Lora
from flapsam.sam import assemble, travelling_state
from tests.helpers.adapters import saved
from tests.helpers.command import flapsam
from tests.helpers.sites import AFFINE, SHAPE, make_sites, save, write_run

pytestmark = pytest.mark.usefixtures("no_report")

IMAGE, LABEL = Path("site_0/images/site_0_0.nii.gz"), Path("site_0/labels/site_0_0.nii.gz")


def label_of_other_shape(data: Path) -> None:
    save(np.zeros((20, 16, 5), np.uint8), data / LABEL)


def label_of_other_affine(data: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 3] = 12
    save(np.zeros(SHAPE, np.uint8), data / LABEL, affine)


def label_value_of_no_class(data: Path) -> None:
    for path in (data / "site_0" / "labels").iterdir():
        save(np.full(SHAPE, 3, np.uint8), path)


def site_without_training_case(data: Path) -> None:
    rows = ["case,site,split", *(f"site_0_{i},site_0,train" for i in range(4)), "site_1_0,site_1,test"]
    (data / "sites.csv").write_text("\n".join(rows) + "\n")


def not_a_number(data: Path) -> None:
    for path in (data / "site_0" / "images").iterdir():
        array = np.ones(SHAPE, np.float32)
        array[0, 0, 0] = np.nan
        save(array, path)


def truncated(data: Path) -> None:
    for path in (data / "site_0" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-200])


def two_dimensions(data: Path) -> None:
    save(np.zeros((20, 16), np.float32), data / IMAGE)


def no_gzip_inside(data: Path) -> None:
    (data / IMAGE).write_bytes(gzip.compress(b"not an image"))


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "shapes differ": (label_of_other_shape, "site_0_0.nii.gz: its shape (20, 16, 5) differs from the image's (20, 16, 6)"),
    "affines differ": (label_of_other_affine, "site_0_0.nii.gz: its affine differs from the image's"),
    "label outside the classes": (label_value_of_no_class, "label value 3 belongs to no class; add it to data.labels"),
    "no training case": (site_without_training_case, "site site_1: it has no training case"),
    "not a number": (not_a_number, "1 voxels are NaN or infinite"),
    "truncated": (truncated, "the file is truncated or damaged"),
    "two dimensions": (two_dimensions, "a 3-D volume is needed, but this file has 2 dimensions"),
    "no image": (no_gzip_inside, "not a readable NIfTI file"),
}


def one_sentence(error: str) -> str:
    """The line of the error, without the output before it."""
    lines = [line for line in error.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, error
    assert error.rstrip().endswith(lines[0])
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_simulate_reports_broken_data(spoil: Callable[[Path], None], message: str, tmp_path: Path, capfd):
    data = make_sites(tmp_path / "data")
    spoil(data)
    outcome = flapsam(capfd, "simulate", write_run(tmp_path / "run.yaml", data))
    assert outcome.code == 2
    assert message in one_sentence(outcome.err)
    assert not (tmp_path / "run" / "adapter").exists()
    assert not list((tmp_path / "run").rglob(".part-*"))


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_data_check_reports_broken_data(spoil: Callable[[Path], None], message: str, tmp_path: Path, capfd):
    data = make_sites(tmp_path / "data")
    spoil(data)
    outcome = flapsam(capfd, "data", "check", data, "--label", "1", "--label", "2")
    assert outcome.code == 2
    assert message in outcome.out + outcome.err


def test_data_check_accepts_good_data(tmp_path: Path, capfd):
    outcome = flapsam(capfd, "data", "check", make_sites(tmp_path), "--label", "1", "--label", "2")
    assert outcome.code == 0
    assert "8 cases at 2 sites, 0 problems" in outcome.out


def test_an_unknown_key_is_reported(tmp_path: Path, capfd):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"))
    run.write_text(yaml.safe_dump(yaml.safe_load(run.read_text()) | {"stratgy": "full"}))
    outcome = flapsam(capfd, "simulate", run)
    assert outcome.code == 2
    assert "run.yaml: unknown key 'stratgy'" in one_sentence(outcome.err)


NAMES = {
    "strategy": ("strategy=best", "strategy 'best' is unknown; choose one of full, attention"),
    "aggregator": ("aggregator=krum", "aggregator 'krum' is unknown"),
    "codec": ("compression.codec=zip", "compression.codec 'zip' is unknown; choose one of fp32, bf16"),
    "server optimizer": ("server.optimizer=sgd", "server.optimizer 'sgd' is unknown; choose one of none, fedavgm"),
    "rank of a site": ("site_ranks={site_0: 3}", "site_ranks.site_0: larger than lora.rank, 2"),
    "rank of no site": ("site_ranks={site_7: 1}", "site_ranks.site_7: unknown site; choose from site_0, site_1"),
    "backbone": ("backbone.name=sam-3", "backbone 'sam-3' is unknown"),
    "device": ("device=tpu9", "device 'tpu9' is not available on this machine"),
    "size": ("samples.size=100", "samples.size 100 is not a multiple of 16"),
    "checkpoint": ("backbone.weights=sam.pth", "sam.pth: no such checkpoint"),
}


def test_a_server_optimizer_needs_an_aggregator_that_keeps_the_basis(tmp_path: Path, capfd):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"), aggregator="flexlora")
    outcome = flapsam(capfd, "simulate", run, "--set", "server.optimizer=fedadam")
    assert outcome.code == 2
    assert "aggregator flexlora changes it; choose flexlora-aligned or fedavg" in one_sentence(outcome.err)


@pytest.mark.parametrize(("assignment", "message"), NAMES.values(), ids=NAMES)
def test_unknown_names_are_reported(assignment: str, message: str, tmp_path: Path, capfd):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"))
    outcome = flapsam(capfd, "simulate", run, "--set", assignment)
    assert outcome.code == 2
    assert message in one_sentence(outcome.err)


def test_an_output_folder_inside_a_file_is_reported(tmp_path: Path, capfd):
    (tmp_path / "file").write_text("in the way")
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"), output="file/run")
    outcome = flapsam(capfd, "simulate", run)
    assert outcome.code == 2
    assert "choose another output folder" in one_sentence(outcome.err)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_read_only_output_folder_is_reported(capfd, tmp_path: Path):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"), output="/proc/flapsam")
    outcome = flapsam(capfd, "simulate", run)
    assert outcome.code == 2
    assert "choose another output folder" in one_sentence(outcome.err)


def test_an_adapter_for_another_backbone_is_refused(tmp_path: Path, capfd):
    image = save(np.zeros(SHAPE, np.float32), tmp_path / "image.nii.gz")
    outcome = flapsam(capfd, "predict", saved(tmp_path / "a", seed=1), image, "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "this adapter belongs to another backbone" in one_sentence(outcome.err)
    assert not (tmp_path / "out").exists()


def test_predict_reports_a_missing_image(tmp_path: Path, capfd):
    outcome = flapsam(capfd, "predict", saved(tmp_path / "a"), tmp_path / "image.nii.gz", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "no such file or folder" in one_sentence(outcome.err)
    assert not (tmp_path / "out").exists()


def test_predict_reports_a_missing_adapter(tmp_path: Path, capfd):
    outcome = flapsam(capfd, "predict", tmp_path, tmp_path, "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "neither an adapter nor a finished run" in one_sentence(outcome.err)


def test_evaluate_reports_a_missing_label_map(tmp_path: Path, capfd):
    save(np.ones(SHAPE, np.uint8), tmp_path / "predictions" / "a.nii.gz")
    save(np.ones(SHAPE, np.uint8), tmp_path / "labels" / "b.nii.gz")
    outcome = flapsam(capfd, "evaluate", tmp_path / "predictions", tmp_path / "labels")
    assert outcome.code == 2
    assert "there is no label map for a in" in one_sentence(outcome.err)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, capfd):
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data", sites=1), rounds={"count": 1})
    outcome = flapsam(capfd, "simulate", run, "--resume")
    assert "there is no run here to resume" in one_sentence(outcome.err)
    assert flapsam(capfd, "simulate", run).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    outcome = flapsam(capfd, "simulate", run)
    assert "already holds a run; add --resume" in one_sentence(outcome.err)
    outcome = flapsam(capfd, "simulate", run, "--resume", "--set", "seed=1")
    assert "the run here has another configuration" in one_sentence(outcome.err)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capfd):
    from safetensors.torch import save_file

    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"), strategy="full")
    network = assemble(
        Backbone(name="sam-tiny", weights="random"),
        image_size=32,
        classes=2,
        strategy_name="full",
        lora=Lora(rank=2),
        seed=0,
    ).network
    save_file(travelling_state(network), tmp_path / "other.safetensors")
    outcome = flapsam(
        capfd, "simulate", run, "--set", f"backbone={{name: sam-vit-b, weights: {tmp_path}/other.safetensors}}"
    )
    assert outcome.code == 2
    assert "this is a sam-tiny, not a sam-vit-b; set backbone.name to sam-tiny" in one_sentence(outcome.err)


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, capfd, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"x": Code()}, tmp_path / "sam.pth")
    run = write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data"))
    outcome = flapsam(capfd, "simulate", run, "--set", f"backbone={{name: sam-tiny, weights: {tmp_path}/sam.pth}}")
    assert outcome.code == 2
    assert "not opened, since it holds more than tensors and could run code" in one_sentence(outcome.err)
    assert not (tmp_path / "executed").exists()


def test_usage_errors_exit_with_code_2(capfd):
    assert flapsam(capfd, "simulate").code == 2
    assert flapsam(capfd, "nonsense").code == 2
