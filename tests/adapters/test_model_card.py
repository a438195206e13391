"""The model card says what the ledger says."""

import pytest

from flapsam.adapters.card import model_card
from flapsam.adapters.store import AdapterCard
from flapsam.run.ledger import CaseTested, Cohort, SiteJoined
from tests.helpers.adapters import trained


def site(name: str, train: int, test: int) -> SiteJoined:
    return SiteJoined(site=name, cases={"train": train, "val": 1, "test": test})


def case(federation: str, site: str, name: str, kidney: float, tumour: float | None) -> CaseTested:
    scores = {"kidney": kidney, "tumour": tumour}
    return CaseTested(cohort=Cohort.parse(federation), site=site, case=name, dice=scores, hd95=scores)


EVENTS = [
    site("north", 20, 5),
    site("south", 8, 2),
    *(case("federated", "north", f"n{i}", 0.8, 0.4) for i in range(5)),
    case("federated", "south", "s0", 0.5, None),
    case("federated", "south", "s1", 0.7, None),
    case("local/south", "south", "s0", 0.25, None),
    case("local/south", "south", "s1", 0.75, None),
]


@pytest.fixture
def card() -> AdapterCard:
    return trained("flap")[1]


def test_together(card: AdapterCard):
    lines = model_card(card, Cohort.parse("federated"), EVENTS).splitlines()
    assert "license: apache-2.0" in lines
    assert "# Segmentation of kidney, tumour" in lines
    assert "| north | 20 | 1 | 5 | 0.800 | 0.400 | 0.600 |" in lines
    assert "| south | 8 | 1 | 2 | 0.600 | – | 0.600 |" in lines
    # Kidney over seven cases: (5·0.8 + 0.5 + 0.7)/7; tumour over the five that are annotated.
    assert "| all | 28 | 2 | 7 | 0.743 | 0.400 | 0.571 |" in lines
    text = "\n".join(lines)
    assert "by 2 sites together" in text
    assert "Fewer than 5 test cases at south:" in text
    assert "A mean Dice of 0.400 for tumour" in text
    assert "mean Dice of 0.743" not in text
    assert "The backbone was not pretrained." in text
    assert card.backbone.checksum in text
    assert "not a medical device" in text


def test_one_site_alone(card: AdapterCard):
    text = model_card(card.model_copy(update={"mode": "local"}), Cohort.parse("local/south"), EVENTS)
    assert "| south | 8 | 1 | 2 | 0.500 | – | 0.500 |" in text
    assert "north" not in text
    assert "by one site alone" in text
    assert "8 cases of one site" in text


def test_without_test_cases(card: AdapterCard):
    text = model_card(card, Cohort.parse("federated"), [site("north", 20, 0)])
    assert "| north | 20 | 1 | 0 | – | – | – |" in text
