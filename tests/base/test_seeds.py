"""Seeds. That a run gives the same bits after a restart, and in the next version, rests on these values."""

import pytest

from flapsam.base.seeds import seed_for


@pytest.mark.parametrize(
    ("purpose", "seed"),
    [
        # printf %s TEXT | sha256sum, its first 16 hexadecimal digits as a number, halved.
        ((0,), 0x5FECEB66FFC86F38 // 2),
        ((0, 1, "a", "fit"), 0x2B97B5EB2EECABAC // 2),
        ((12, "site_b", "validation split"), 0xCC4264C047A347BD // 2),
    ],
)
def test_a_seed_is_the_hash_of_what_it_is_for(purpose: tuple[int | str, ...], seed: int):
    assert seed_for(*purpose) == seed  # type: ignore[arg-type]


def test_every_purpose_has_a_seed_of_its_own_that_numpy_and_torch_take():
    seeds = {seed_for(run, number, purpose) for run in range(5) for number in range(5) for purpose in ("fit", "split")}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
