"""What a robust aggregator says at the start of a run about the false sites that it bears."""

from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.federation.borne import check_borne, false_sites_borne
from flapsam.report.standing_view import event_line
from flapsam.run.config import RunConfig
from flapsam.run.reading import read_config
from tests.helpers.sites import write_run


def config(folder: Path, name: str) -> RunConfig:
    return read_config(write_run(folder / "run.yaml", folder, aggregator=name))


@pytest.mark.parametrize(
    ("name", "sites", "said"),
    [
        ("median", 3, "median bears 1 false of 3 sites; in a round with only 2 answers, 0"),
        ("median", 7, "median bears 3 false of 7 sites; in a round with only 2 answers, 0"),
        ("trimmed-mean", 10, "trimmed-mean bears 2 false of 10 sites; in a round with only 2 answers, 0"),
        ("median", 2, "median bears 0 false of 2 sites"),
    ],
)
def test_the_sentence_says_how_many(name: str, sites: int, said: str, tmp_path: Path):
    event = false_sites_borne(config(tmp_path, name), sites, least=2)
    assert event is not None and event_line(event, None) == said


@pytest.mark.parametrize("name", ["fedavg", "flexlora", "flexlora-aligned"])
def test_other_aggregators_promise_nothing(name: str, tmp_path: Path):
    assert false_sites_borne(config(tmp_path, name), 5, least=2) is None
    check_borne(config(tmp_path, name), 1)


@pytest.mark.parametrize(
    ("name", "sites", "enough"), [("median", 1, 3), ("median", 2, 3), ("trimmed-mean", 3, 5), ("trimmed-mean", 4, 5)]
)
def test_an_aggregator_that_bears_none_is_refused(name: str, sites: int, enough: int, tmp_path: Path):
    with pytest.raises(FlapsamError) as error:
        check_borne(config(tmp_path, name), sites)
    count = "1 site" if sites == 1 else f"{sites} sites"
    advice = f"use at least {enough} sites, or choose another aggregator"
    assert str(error.value) == f"aggregator: {name} bears no false site among {count}; {advice}"
    check_borne(config(tmp_path, name), enough)
