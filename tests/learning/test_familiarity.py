"""Whether an image looks like known ones, on made-up features whose distribution is known."""

from typing import Any

import numpy as np
import pytest

from flapsam.learning.familiarity import FEWEST, Familiar, Look

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(6, 40))
"""Six directions in which images differ, among forty features."""


def image(rng: np.random.Generator, *, shift: float = 0.0, away: float = 0.0, turned: bool = False) -> Look:
    """An image whose first direction says where a slice lies."""
    places = np.linspace(0, 1, 16)
    own = rng.normal(size=6) * 0.5 + rng.normal(size=(16, 6)) + shift
    own[:, 0] += 8 * (places[::-1] if turned else places)
    features = own @ MIX + 0.3 * rng.normal(size=(16, 40)) + away * rng.normal(size=(16, 40))
    return Look(features.astype(np.float32), places.astype(np.float32), (1.0, 1.0, 3.0))


@pytest.fixture(scope="module", params=[FEWEST, 60])
def familiar(request: pytest.FixtureRequest) -> Familiar:
    rng = np.random.default_rng(1)
    return Familiar.of([image(rng) for _ in range(request.param)])


def test_images_of_the_known_kind_are_usual(familiar: Familiar):
    rng = np.random.default_rng(2)
    assert sum(bool(familiar.unusual(image(rng))) for _ in range(300)) <= 6


@pytest.mark.parametrize("change", [{"shift": 12.0}, {"away": 2.0}])
def test_images_of_another_kind_are_unusual(change: dict[str, Any], familiar: Familiar):
    rng = np.random.default_rng(3)
    found = [familiar.unusual(image(rng, **change)) for _ in range(50)]
    assert sum(reasons == ["slices look different"] for reasons in found) >= 49


def test_slices_in_reverse_order_are_found_although_each_looks_usual(familiar: Familiar):
    rng = np.random.default_rng(4)
    found = [familiar.unusual(image(rng, turned=True)) for _ in range(50)]
    assert sum(reasons == ["slices seem to be in reverse order"] for reasons in found) >= 48


def test_nothing_is_said_of_the_order_where_slices_do_not_tell_it():
    rng = np.random.default_rng(5)
    looks = [image(rng) for _ in range(30)]
    mixed = [Look(rng.permutation(one.features), one.places, one.spacing) for one in looks]
    assert len(Familiar.of(looks).order) and not len(Familiar.of(mixed).order)


def test_images_of_one_patient_do_not_vouch_for_one_another():
    """Each patient has three equal images. Judged by one another, all of them would seem to be alike."""
    rng = np.random.default_rng(8)
    ones = [image(rng) for _ in range(20)]
    thrice = [Look(one.features, one.places, one.spacing, f"patient {n}") for n, one in enumerate(ones) for _ in range(3)]
    unnamed = [Look(one.features, one.places, one.spacing) for one in thrice]
    assert Familiar.of(thrice).usual[0] > Familiar.of(unnamed).usual[0]
    new = [image(rng) for _ in range(200)]
    assert sum(bool(Familiar.of(thrice).unusual(one)) for one in new) <= 6


def test_another_spacing_is_unusual(familiar: Familiar):
    rng = np.random.default_rng(6)
    known = image(rng)
    for spacing, usual in (((1.4, 1.0, 3.0), True), ((1.6, 1.0, 3.0), False), ((1.0, 1.0, 1.9), False)):
        reasons = familiar.unusual(Look(known.features, known.places, spacing))
        assert any("spacing" in reason for reason in reasons) != usual
    assert "spacing 1 × 1 × 1.9 mm, known are 1 × 1 × 3 to 1 × 1 × 3" in reasons


def test_a_single_slice_and_equal_images_are_judged(familiar: Familiar):
    one = image(np.random.default_rng(7))
    single = Look(one.features[:1], one.places[:1], one.spacing)
    assert isinstance(familiar.unusual(single), list)
    same = Familiar.of([one] * FEWEST)
    assert same.fits() and same.unusual(one) == []
