"""Seeds. These values must never change, so that a run has the same result after a restart and in the next version."""

import pytest

from flapsam.base.seeds import seed_for


@pytest.mark.parametrize(
    ("purpose", "seed"),
    [
        # The output of printf %s TEXT | sha256sum: its first 16 hexadecimal digits as a number, halved.
        ((0,), 0x5FECEB66FFC86F38 // 2),
        ((0, 1, "a", "fit"), 0x2B97B5EB2EECABAC // 2),
        ((12, "site_b", "validation split"), 0xCC4264C047A347BD // 2),
    ],
)
def test_a_seed_is_the_hash_of_its_purpose(purpose: tuple[int | str, ...], seed: int):
    assert seed_for(*purpose) == seed  # type: ignore[arg-type]


def test_seeds_are_distinct_and_in_the_range_of_numpy_and_torch():
    seeds = {seed_for(run, number, purpose) for run in range(5) for number in range(5) for purpose in ("fit", "split")}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
