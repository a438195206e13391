"""The ensemble of the adapters that sites trained alone: no federation, and the cheap rival of one."""

import json
from pathlib import Path

import numpy as np
import pytest

import flapsam
from flapsam.experiments.bench import bench
from flapsam.learning.inference import PredictionOptions
from flapsam.report.run import read_run
from flapsam.report.status import read_status
from flapsam.run.reading import read_config
from flapsam.volumes import read_image, read_label
from tests.helpers.command import flapsam as command
from tests.helpers.families import small_run
from tests.helpers.sites import make_sites

pytestmark = pytest.mark.usefixtures("small_families")


def test_an_ensemble_averages_the_probabilities_of_the_sites_that_trained_alone(tmp_path: Path, capfd):
    data = make_sites(tmp_path / "data")
    # Nobody is waited for in a simulation, whatever a run between hospitals requires.
    fields = {"rounds": {"count": 1, "require": 2}, "modes": ["local", "ensemble"], "output": "run"}
    outcome = command(capfd, "simulate", small_run(tmp_path / "run.yaml", data, **fields), "--json")
    assert outcome.code == 0, outcome.err
    run, results = tmp_path / "run", json.loads(outcome.out)
    # Both adapters score the cases of both sites together, while each alone has only its own.
    sites = sorted(path.name for path in (run / "adapter-local").iterdir())
    assert len(sites) == 2
    cases = [(score["site"], score["case"]) for score in results["cases"]["ensemble"]]
    assert sorted(cases) == sorted((score["site"], score["case"]) for score in results["cases"]["local"])
    models = [flapsam.load(run / "adapter-local" / site) for site in sites]
    for site, case in cases:
        image = read_image(next((data / site / "images").glob(f"{case}.*")))
        found = [model.segment(image, PredictionOptions(probabilities=True), site=site) for model in models]
        mean = np.mean([one.probabilities for one in found if one.probabilities is not None], axis=0)
        written = read_label(run / "predictions" / "ensemble" / site / f"{case}.nii.gz").array
        # Merged adapters round otherwise in the last bit, which may turn a voxel where two classes are equal.
        assert (mean.argmax(-1) != written).mean() < 1e-3
    # It needs no rounds, has no adapter of its own, and stands in report and status beside the others.
    assert not (run / "adapter-ensemble").exists()
    assert read_run(run).modes == ["local", "ensemble"]
    assert {str(cohort) for cohort in read_status(run).standing.cohorts} == {f"local/{site}" for site in sites}
    assert command(capfd, "report", run, "--no-images").code == 0
    assert "ensemble" in (run / "report" / "index.html").read_text()
    again = command(capfd, "simulate", tmp_path / "run.yaml", "--resume", "--json")
    assert json.loads(again.out)["cases"] == results["cases"]

    # A cell of a bench is the same, and says what it takes to send every adapter to the other site.
    cell = small_run(tmp_path / "bench.yaml", data, rounds={"count": 1}, output="bench", bench=[{"modes": ["ensemble"]}])
    (result,) = bench(read_config(cell)).results.values()
    assert [(score.case, score.dice) for score in result.scores] == [
        (score["case"], score["dice"]) for score in results["cases"]["ensemble"]
    ]
    bytes_of = [sum(f.stat().st_size for f in (run / "adapter-local" / site).glob("*.safetensors")) for site in sites]
    assert result.bytes_up == result.bytes_down == sum(bytes_of) / 2


@pytest.mark.parametrize("modes", [["ensemble"], ["federated", "ensemble"], ["ensemble", "local"]])
def test_an_ensemble_needs_sites_that_trained_alone(modes: list[str], tmp_path: Path, capfd):
    outcome = command(capfd, "simulate", small_run(tmp_path / "run.yaml", tmp_path, modes=modes))
    assert outcome.code == 2 and "put local before it" in outcome.err
