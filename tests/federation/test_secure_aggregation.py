"""Secure aggregation: exact sums, and a server and sites that deceive."""

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from flapsam.base.errors import FlapsamError
from flapsam.experiments.simulation import simulate
from flapsam.federation.aggregation import AGGREGATORS, Reply, aggregator
from flapsam.federation.client import Client
from flapsam.federation.packets import PacketRefused
from flapsam.federation.secure_aggregation import crypto
from flapsam.federation.secure_aggregation.collector import Collector
from flapsam.federation.secure_aggregation.identity import Identity, is_signed
from flapsam.federation.secure_aggregation.member import NOTHING, Member, capped, envelope_key
from flapsam.federation.secure_aggregation.messages import (
    Answered,
    Confirmations,
    Envelopes,
    Offer,
    Opening,
    Revealed,
    Roster,
    Shares,
    digest,
    read,
    threshold,
    written,
)
from flapsam.federation.secure_aggregation.ring import Ring
from flapsam.federation.state import ServerState
from flapsam.run.config import RunConfig
from flapsam.run.reading import read_config
from tests.helpers.command import flapsam
from tests.helpers.ledgers import read_events
from tests.helpers.sites import make_sites, write_run

RUN = "0" * 32
RANGES = {"w": 1.0}


@dataclass
class Round:
    """Sites and a server that carry out rounds, and may be made to deceive."""

    folder: Path
    names: list[str]
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shares = self.shares or dict.fromkeys(self.names, 1 / len(self.names))
        identities = {name: Identity(self.folder / name / "identity.key") for name in self.names}
        keys = {name: identity.public for name, identity in identities.items()}
        self.members = {
            name: Member(RUN, name, identity, keys, self.folder / name / "secure") for name, identity in identities.items()
        }
        self.restart()

    def restart(self) -> None:
        """The server starts again, with what is on its disk."""
        self.server = Collector(RUN, self.folder / "server", self.shares)
        self.masked: dict[str, np.ndarray] = {}

    def step(self, gone: Iterable[str] = ()) -> None:
        """Carry one step's messages between the server and all sites that are not gone."""
        for name in [name for name in self.names if self.server.asks(name) and name not in gone]:
            self.server.take(name, self.members[name].answer(self.server.message(name)))

    def fit(self, changes: Mapping[str, np.ndarray], number: int = 1, gone: Iterable[str] = ()) -> None:
        for name in [name for name in self.names if self.server.asks(name) and name not in gone]:
            self.members[name].begin(number, self.server.message(name), NOTHING)
            self.masked[name] = self.members[name].masked(number, changes[name])

    def carry_out(
        self, changes: Mapping[str, np.ndarray], gone: Mapping[str, Iterable[str]] | None = None, number: int = 1
    ) -> np.ndarray:
        """A whole round. ``gone`` says which sites no longer answer from which step on."""
        left: set[str] = set()
        for step in self.server.begin(number, RANGES, arrived=self.masked):
            left |= set((gone or {}).get(step, ()))
            if step == "keys":
                self.masked = {}
            if step == "fit":
                self.fit(changes, number, left)
            else:
                self.step(left)
            self.server.end(self.masked)
        return self.server.total(self.masked, len(next(iter(changes.values()))))


def changes_of(names: Iterable[str], count: int = 1000) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(-9, 10, count).astype(np.int32) for name in names}


def expected(changes: Mapping[str, np.ndarray], names: Iterable[str], bits: int) -> np.ndarray:
    return np.sum([changes[name].astype(np.int64) for name in names], axis=0) % 2**bits


FIVE = list("abcde")
SIX = list("abcdef")


# Arithmetic


@pytest.mark.parametrize("bits", [8, 11, 16, 24])
def test_packed_numbers_are_restored_and_take_their_bits(bits: int):
    rng = np.random.default_rng(bits)
    for count in (0, 1, 7, 65_536, 65_543):
        numbers = rng.integers(0, 2**bits, count, dtype=np.uint32)
        packed = Ring(bits).packed(numbers)
        assert packed.dtype == np.uint8 and len(packed) == Ring(bits).size(count) == -(-count * bits // 8)
        assert (Ring(bits).unpacked(packed, count) == numbers).all()


def test_a_change_becomes_the_whole_numbers_that_arithmetic_by_hand_gives():
    # Of 8 bits, the largest number is 127. A quarter of it is 31.75, so half of the range is 15.875: 15 or 16.
    numbers, beyond = Ring(8).whole({"w": torch.tensor([0.0, 0.5, -0.976, 0.976])}, {"w": 1.0}, 0.25, seed=0)
    assert numbers[0] == 0 and numbers[1] in (15, 16) and -numbers[2] in (30, 31) and numbers[3] in (30, 31) and not beyond
    # The range is the tensor's own, and a change beyond it is scaled down to 31 steps as a whole.
    numbers, beyond = Ring(8).whole(
        {"v": torch.tensor([1.0]), "w": torch.tensor([20.0, -10.0, 5.0])}, {"v": 2.0, "w": 1.0}, 0.25, seed=0
    )
    assert beyond == ["w"] and numbers[0] in (15, 16)
    assert numbers[1] == 31 and numbers[2] in (-15, -16) and numbers[3] in (7, 8)


def test_a_tiny_range_does_not_tell_the_signs_of_the_sites_numbers():
    """Cut one by one, numbers would be as many different whole numbers as there are sites, with the sites' signs."""
    draw = torch.Generator().manual_seed(1)
    changes = [torch.randn(4000, generator=draw) for _ in range(3)]
    for range_ in (1e-20, 1e-3, 1.0):
        signs = [torch.from_numpy(Ring(8).whole({"w": c}, {"w": range_}, 0.3, n)[0]).sign() for n, c in enumerate(changes)]
        assert all((sign != change.sign()).float().mean() > 0.02 for sign, change in zip(signs, changes, strict=True))


def test_rounding_at_random_is_right_on_average():
    values = torch.full((40_000,), 0.3)
    numbers, _ = Ring(8).whole({"w": values}, {"w": 1.0}, 0.1, seed=1)
    exact = 0.3 * 12.7
    assert set(numbers.tolist()) == {3, 4}
    assert numbers.mean() == pytest.approx(exact, abs=4 * 0.5 / 200)


@pytest.mark.parametrize("shares", [[1 / 3] * 3, [0.1] * 10, [0.01] * 100, [0.7, 0.25, 0.04, 0.01], [1.0]])
def test_sums_never_leave_the_ring_and_are_right_to_one_step_per_site(shares: list[float]):
    ring = Ring.of(shares)
    assert min(shares) * ring.largest >= 8
    rng = np.random.default_rng(3)
    changes = [torch.tensor(rng.uniform(-1, 1, 500), dtype=torch.float32) for _ in shares]
    # Where all are at the end of the range, the sum is the largest.
    for change in changes:
        change[:2] = torch.tensor([1.0, -1.0])
    total = np.zeros(500, np.uint32)
    for number, (change, share) in enumerate(zip(changes, shares, strict=True)):
        total = ring.reduced(total + ring.reduced(ring.whole({"w": change}, RANGES, share, number)[0]))
    mean = ring.mean(total, {"w": (500,)}, RANGES, sum(shares))["w"]
    exact = sum(share * change.double() for share, change in zip(shares, changes, strict=True)) / sum(shares)
    assert torch.is_tensor(exact)
    assert (mean - exact).abs().max() <= len(shares) / ring.largest
    assert mean[0] > 0.8 and mean[1] < -0.8


def test_eight_bits_are_enough_for_ten_sites_and_few_more_for_a_hundred():
    assert Ring.of([0.1] * 10).bits == 8
    assert Ring.of([0.01] * 100).bits == 11
    with pytest.raises(ValueError, match="too small"):
        Ring.of([0.5, 0.5, 1e-9])


def test_the_threshold_is_above_two_thirds_and_never_below_three():
    assert {count: threshold(count) for count in (3, 4, 5, 6, 10, 100)} == {3: 3, 4: 3, 5: 4, 6: 5, 10: 7, 100: 67}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_is_a_sum_if_the_mean_alone_gives_the_same_result(name: str):
    draw = torch.Generator().manual_seed(0)
    shapes = {"l.weight": (6, 5), "l.lora_A.weight": (2, 5), "l.lora_B.weight": (6, 2), "n": (4,)}
    for number in (1, 2):
        method = aggregator(name, 2)
        before = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
        names = [key for key in before if method.up(key, number) and key != "l.weight"]
        sites = [{key: before[key] + torch.randn(before[key].shape, generator=draw) for key in names} for _ in range(3)]
        weights = [0.2, 0.3, 0.5]
        mean = {key: sum(w * site[key] for w, site in zip(weights, sites, strict=True)) for key in names}
        each = method.aggregate([Reply.of(s, w) for s, w in zip(sites, weights, strict=True)], before, number)
        alone = method.aggregate([Reply.of(mean, 1.0)], before, number)  # type: ignore[arg-type]
        same = all(torch.allclose(each[key], alone[key], atol=1e-5) for key in before)
        assert same == method.sums


# Rounds


@pytest.mark.parametrize("count", [3, 4, 10])
def test_a_sum_is_the_plain_one(count: int, tmp_path: Path):
    names = [f"site_{number}" for number in range(count)]
    parts = Round(tmp_path, names)
    changes = changes_of(names)
    for number in (1, 2):
        assert (parts.carry_out(changes, number=number) == expected(changes, names, 8)).all()


@pytest.mark.parametrize("step", ["keys", "shares", "fit", "confirm", "reveal"])
def test_a_site_may_drop_out_in_any_step(step: str, tmp_path: Path):
    parts, changes = Round(tmp_path, SIX), changes_of(SIX)
    # Before its masked change has come, it is not in the sum. Afterwards it is.
    summed = SIX if step in ("confirm", "reveal") else SIX[:-1]
    total = parts.carry_out(changes, {step: ["f"]})
    assert parts.server.summed == summed
    assert (total == expected(changes, summed, 8)).all()
    assert parts.server.share == pytest.approx(len(summed) / 6)


@pytest.mark.parametrize("step", ["keys", "shares", "fit", "confirm", "reveal"])
def test_too_few_sites_end_the_round_and_a_later_attempt_succeeds(step: str, tmp_path: Path):
    parts, changes = Round(tmp_path, SIX), changes_of(SIX)
    gone = {step: ["a", "c", "d", "e"]} if step == "keys" else {step: ["c", "f"]}
    with pytest.raises(FlapsamError, match=r"round 1: \d sites have taken part in step .* are needed"):
        parts.carry_out(changes, gone)
    # The server and the sites start again, as after a crash.
    again = Round(tmp_path, SIX)
    if step == "reveal":
        # Some may have revealed their shares, so the round ends with these masks or not at all.
        assert again.server.holds_answers and again.server.begin(1, RANGES, arrived=SIX)[0] == step
        again.masked = parts.masked
    assert (again.carry_out(changes) == expected(changes, SIX, 8)).all()


def test_what_the_server_sees_of_a_site_is_noise(tmp_path: Path):
    """The server sees everything but the site's own secrets, and the site's change is the plainest one there is."""
    count = 64_000
    parts = Round(tmp_path, FIVE)
    changes = {name: np.zeros(count, np.int32) for name in FIVE}
    changes["a"][::2] = 9
    for step in parts.server.begin(1, RANGES):
        parts.fit(changes) if step == "fit" else parts.step()
        parts.server.end(parts.masked)
        if step == "fit":
            break
    seen = parts.masked["a"]
    assert chisquare(np.bincount(seen, minlength=256)).pvalue > 1e-6
    for other in (*changes.values(), *(parts.masked[name] for name in "bcde")):
        if other.std() > 0 and other is not seen:
            assert abs(np.corrcoef(seen, other)[0, 1]) < 5 / count**0.5
    # The same attack finds what is not masked, and the sum of all sites but one is still noise.
    assert chisquare(np.bincount(changes["a"] % 256, minlength=256)).pvalue == 0
    four = sum(parts.masked[name].astype(np.int64) for name in "abcd") % 256
    assert chisquare(np.bincount(four, minlength=256)).pvalue > 1e-6
    # Of the sum of all, only the seeds' masks are left.
    everything = sum(parts.masked[name].astype(np.int64) for name in FIVE) % 256
    assert chisquare(np.bincount(everything, minlength=256)).pvalue > 1e-6


def test_fewer_shares_than_the_threshold_do_not_tell_a_secret():
    secret = bytes(range(32))
    shares = crypto.shared_out(secret, 6, 5)
    assert crypto.joined({number: shares[number - 1] for number in (1, 2, 4, 5, 6)}) == secret
    assert crypto.joined({number: shares[number - 1] for number in (1, 2, 3, 4)}) != secret


# A server that deceives


def opened_round(parts: Round, until: str, changes: Mapping[str, np.ndarray] | None = None) -> None:
    """Carry out the steps before one."""
    for step in parts.server.begin(1, RANGES):
        if step == until:
            return
        parts.fit(changes or changes_of(parts.names)) if step == "fit" else parts.step()
        parts.server.end(parts.masked)


def refused(parts: Round, name: str, message: Any, reason: str) -> None:
    with pytest.raises(PacketRefused, match=reason):
        parts.members[name].answer(written(message))


def roster_of(parts: Round, **changes: Any) -> Roster:
    return read(parts.server.message("a"), Roster).model_copy(update=changes)


def left_out_of(parts: Round) -> dict[str, str]:
    """Whom the server leaves out once it has the keys, with the reason."""
    left_out: dict[str, str] = {}
    parts.server.begin(1, RANGES)
    parts.step()
    parts.server.end(on_left_out=left_out.__setitem__)
    return left_out


def test_a_stranger_in_the_roster_is_refused(tmp_path: Path):
    parts, stranger = Round(tmp_path / "real", FIVE), Round(tmp_path / "strange", [*FIVE, "x"])
    opened_round(parts, "shares")
    opened_round(stranger, "shares")
    real, strange = roster_of(parts), roster_of(stranger)
    x = strange.keys[-1]
    refused(
        parts,
        "a",
        real.model_copy(update={"keys": [*real.keys, x], "shares": {**real.shares, "x": 0.1}}),
        "names 'x', which is none of this site's partners",
    )
    # Under a partner's name, the stranger cannot sign.
    disguised = x.model_copy(update={"site": "e"})
    refused(parts, "a", real.model_copy(update={"keys": [*real.keys[:-1], disguised]}), "keys of e that e has not signed")
    own = x.model_copy(update={"site": "e", "identity": real.keys[-1].identity})
    refused(parts, "a", real.model_copy(update={"keys": [*real.keys[:-1], own]}), "keys of e that e has not signed")


ROSTERS: dict[str, tuple[Callable[[Roster], dict[str, Any]], str]] = {
    "too few": (
        lambda roster: {"keys": roster.keys[:2], "shares": {"a": 0.5, "b": 0.5}},
        "2 sites take part, and a requires 3",
    ),
    "a site twice": (lambda roster: {"keys": [*roster.keys, roster.keys[-1]]}, "not in order, or names a site twice"),
    "without itself": (
        lambda roster: {"keys": roster.keys[1:], "shares": dict.fromkeys("bcde", 0.2)},
        "does not name this site",
    ),
    "another key of its own": (
        lambda roster: {"keys": [roster.keys[0].model_copy(update={"mask_key": "1" * 64}), *roster.keys[1:]]},
        "keys of a that a has not signed",
    ),
    "others asked for something else": (
        lambda roster: {"keys": [*roster.keys[:-1], roster.keys[-1].model_copy(update={"asked": "1" * 64})]},
        "it asks something else of e than of this site",
    ),
    "others with too few levels": (
        lambda roster: {"shares": dict.fromkeys("abcde", 1e-3)},
        "too few levels",
    ),
    "another round's keys": (
        lambda roster: {"keys": [*roster.keys[:-1], roster.keys[-1].model_copy(update={"round": 2})]},
        "keys of e from another round or attempt",
    ),
}


@pytest.mark.parametrize("name", ROSTERS)
def test_a_false_roster_is_refused(name: str, tmp_path: Path):
    change, reason = ROSTERS[name]
    parts = Round(tmp_path, FIVE)
    opened_round(parts, "shares")
    refused(parts, "a", roster_of(parts, **change(roster_of(parts))), reason)


def test_one_key_for_two_sites_is_refused(tmp_path: Path):
    """Two partners that work for the server could otherwise have their masks cancel."""
    parts = Round(tmp_path, FIVE)
    opened_round(parts, "shares")
    d, e = roster_of(parts).keys[3:]
    same = e.model_copy(update={"mask_key": d.mask_key})
    same = same.model_copy(update={"signature": parts.members["e"].identity.sign(same.signed)})
    refused(parts, "a", roster_of(parts, keys=[*roster_of(parts).keys[:4], same]), "the same key for two sites")


def test_keys_of_an_earlier_attempt_cannot_be_used_again(tmp_path: Path):
    parts = Round(tmp_path, FIVE)
    opened_round(parts, "shares")
    earlier = roster_of(parts)
    parts.restart()
    opened_round(parts, "shares")
    refused(parts, "a", earlier, "from another round or attempt")
    refused(parts, "a", Opening(run=RUN, round=1, attempt=1), "attempt 2 has begun")
    refused(parts, "a", Opening(run="1" * 32, round=1, attempt=9), "another run")


def test_two_lists_of_sites_are_found(tmp_path: Path):
    """The server tells some sites that f has answered and others that it has not, and so asks for both of its secrets."""
    parts = Round(tmp_path, SIX)
    opened_round(parts, "confirm")
    named = parts.server.named
    confirmed = {}
    for name in SIX[:5]:
        sites = SIX if name in "abc" else SIX[:5]
        answer = json.loads(parts.members[name].answer(written(Answered(roster=named, sites=sites))))
        confirmed[name] = answer["signature"]
    for name in SIX[:5]:
        refused(parts, name, Confirmations(roster=named, signatures=confirmed), "has not confirmed the same lists")
    # Without those that saw another list, there are too few.
    for some in ("abc", "de"):
        signatures = {name: confirmed[name] for name in some}
        refused(parts, some[0], Confirmations(roster=named, signatures=signatures), "only . of 6 sites take part, and 5 are")
    refused(parts, "a", Answered(roster=named, sites=SIX[:5]), "a second list of the sites that answered")


def test_a_second_list_of_envelopes_and_other_tensors_are_refused_before_training(tmp_path: Path):
    """Otherwise, whether a change differs from the first could be asked by trying (and fits take hours)."""
    parts = Round(tmp_path, SIX)
    opened_round(parts, "fit")
    member, message = parts.members["a"], parts.server.message("a")
    fewer = json.loads(message)
    del fewer["sealed"]["f"]
    with pytest.raises(PacketRefused, match="sends other tensors than its roster says"):
        member.begin(1, message, "1" * 64)
    member.begin(1, message, NOTHING)
    with pytest.raises(PacketRefused, match="sends other envelopes than before"):
        member.begin(1, json.dumps(fewer).encode(), NOTHING)


def test_a_site_that_masked_without_another_does_not_let_it_be_summed(tmp_path: Path):
    parts, changes = Round(tmp_path, SIX), changes_of(SIX)
    opened_round(parts, "fit")
    for name in SIX:
        envelopes = json.loads(parts.server.message(name))
        if name == "a":
            del envelopes["sealed"]["f"]
        parts.members[name].begin(1, json.dumps(envelopes).encode(), NOTHING)
        parts.masked[name] = parts.members[name].masked(1, changes[name])
    parts.server.end(parts.masked)
    refused(parts, "a", Answered(roster=parts.server.named, sites=SIX), "names sites without masks")


def test_tensors_on_which_others_change_nothing_spoil_the_masks(tmp_path: Path):
    """If the server tells some sites of other tensors, it tells them of another roster, whose masks do not cancel."""
    parts, changes = Round(tmp_path, SIX), {name: np.zeros(4000, np.int32) for name in SIX}
    opened_round(parts, "shares")
    real, dead = roster_of(parts), roster_of(parts, start="1" * 64)
    for name in SIX:
        message = written(real if name == "a" else dead)
        named = digest(message)
        shares = read(parts.members[name].answer(message), Shares)
        parts.server.progress.shares[name] = shares.model_copy(update={"roster": parts.server.named})  # type: ignore[union-attr]
        assert shares.roster == named
    for name in SIX:
        sealed = {sender: shares.sealed[name] for sender, shares in parts.server.progress.shares.items() if sender != name}  # type: ignore[union-attr]
        named = digest(written(real if name == "a" else dead))
        message = json.dumps({"roster": named, "sealed": {k: base64.b64encode(v).decode() for k, v in sealed.items()}})
        parts.members[name].begin(1, message.encode(), NOTHING if name == "a" else "1" * 64)
        parts.masked[name] = parts.members[name].masked(1, changes[name])
    seeds = [bytes.fromhex(parts.members[name]._current.seed) for name in SIX]
    total = sum(parts.masked[name].astype(np.int64) for name in SIX) - sum(
        crypto.mask(seed, 4000, 8).astype(np.int64) for seed in seeds
    )
    # Even with all seeds, the sum is noise, whereas that of the five alone is their change.
    assert chisquare(np.bincount(total % 256, minlength=256)).pvalue > 1e-6
    with pytest.raises(PacketRefused):
        parts.members["b"].answer(written(Answered(roster=digest(written(real)), sites=SIX)))


SHARES = {
    "one outweighs": {"a": 0.55, "b": 0.15, "c": 0.1, "d": 0.1, "e": 0.1},
    # Others than the site that checks.
    "another outweighs": {"a": 0.1, "b": 0.55, "c": 0.15, "d": 0.1, "e": 0.1},
    # With one that works with the server and one that drops out, c hides a.
    "two outweigh": {"a": 0.4, "b": 0.4, "c": 0.1, "d": 0.05, "e": 0.05},
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_that_would_show_a_sites_change_are_refused_by_all(name: str, tmp_path: Path):
    parts = Round(tmp_path, FIVE)
    opened_round(parts, "shares")
    for site in FIVE:
        bits = Ring.of(SHARES[name].values()).bits
        refused(
            parts, site, roster_of(parts, shares=SHARES[name], bits=bits), "counts for more than the others that hide it"
        )


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        (None, {"a": 0.4, "b": 0.3, "c": 0.3}),
        ({"a": 2, "b": 1, "c": 1}, {"a": 0.4, "b": 0.3, "c": 0.3}),
        # A site without a weight counts for nothing.
        ({"a": 1, "b": 1}, {"a": 0.3, "b": 0.3, "c": 0.3}),
    ],
)
def test_shares_other_than_the_runs_weights_are_refused(weights: dict | None, shares: dict, tmp_path: Path):
    """With other shares in every round, sums of the same sites would be as many equations as sites."""
    parts = Round(tmp_path, list("abc"))
    opened_round(parts, "shares")
    parts.members["a"].weights = weights
    refused(parts, "a", roster_of(parts, shares=shares), "other shares than follow from the run's weights")


def test_weights_of_the_run_are_those_of_the_sum(tmp_path: Path):
    weights = {"a": 4, "b": 3, "c": 3, "d": 0}
    parts = Round(tmp_path, list("abc"), {"a": 0.4, "b": 0.3, "c": 0.3})
    for member in parts.members.values():
        member.weights = weights
    changes = changes_of("abc")
    assert (parts.carry_out(changes) == expected(changes, "abc", 8)).all()


def test_all_sites_see_to_the_number_of_sites_that_one_of_them_demands(tmp_path: Path):
    """A site's seed is revealed by others, which need not ask it."""
    parts = Round(tmp_path, SIX)
    parts.members["f"].least = 6
    with pytest.raises(PacketRefused, match=r"5 sites take part, and f requires 6 \(secure.min_sites\)"):
        parts.carry_out(changes_of(SIX), {"fit": ["a"]})


def test_a_site_that_demands_too_many_is_left_out_and_the_others_go_on(tmp_path: Path):
    parts = Round(tmp_path, SIX)
    parts.members["f"].least = 9
    parts.members["e"].least = 6
    assert left_out_of(parts) == {
        "f": "it requires 9 sites (secure.min_sites)",
        "e": "it requires 6 sites (secure.min_sites)",
    }


def test_a_minority_cannot_have_an_honest_site_left_out(tmp_path: Path):
    names = list("abcdefghij")
    parts = Round(tmp_path, names)
    for name, victim in zip("abc", "def", strict=True):
        del parts.members[name].partners[victim]
    assert left_out_of(parts).keys() == set("abc")


def test_the_same_sites_are_not_summed_with_other_shares_or_ranges(tmp_path: Path):
    """Three sums of the same three changes with other shares would be three equations."""
    names, changes = list("abc"), changes_of("abc")
    parts = Round(tmp_path, names)
    first = parts.carry_out(changes)
    parts.server.progress.step = "keys"  # type: ignore[union-attr]
    for shares, ranges in (({"a": 0.3, "b": 0.3, "c": 0.3}, RANGES), (parts.shares, {"w": 2.0})):
        parts.server.shares = shares
        (parts.folder / "server" / "codings.json").unlink(missing_ok=True)
        with pytest.raises(PacketRefused, match="wants to repeat round 1 with other shares or ranges than in its sum"):
            for step in parts.server.begin(1, ranges):
                parts.fit(changes) if step == "fit" else parts.step()
                parts.server.end(parts.masked)
    # The server notes the first ones, so that a round can be repeated although the model has changed.
    parts = Round(tmp_path / "again", names)
    first = parts.carry_out(changes)
    parts.server.progress.step = "keys"  # type: ignore[union-attr]
    for step in parts.server.begin(1, {"w": 3.0}):
        parts.fit(changes) if step == "fit" else parts.step()
        parts.server.end(parts.masked)
    assert (parts.server.total(parts.masked, 1000) == first).all()


@pytest.mark.parametrize(
    ("shares", "cut"),
    [
        # Of three sites, none may drop out or work with the server, so two hide the third.
        ((0.8, 0.1, 0.1), (0.2, 0.1, 0.1)),
        ((0.3, 0.3, 0.4), (0.3, 0.3, 0.4)),
        # Of four, one may drop out and one may work with the server, so the smallest hides the others.
        ((0.5, 0.3, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1)),
        # Of five, two are left. First a is cut to 0.15 + 0.05, then b, too.
        ((0.4, 0.35, 0.15, 0.05, 0.05), (0.1, 0.1, 0.1, 0.05, 0.05)),
        ((0.2, 0.2, 0.2, 0.2, 0.2), (0.2, 0.2, 0.2, 0.2, 0.2)),
    ],
)
def test_large_shares_are_cut_so_that_no_site_outweighs_the_others_whoever_drops_out(shares: tuple, cut: tuple):
    result = capped(dict(zip("abcde", shares, strict=False)))
    assert list(result.values()) == pytest.approx(list(cut))


def test_nothing_is_revealed_before_enough_sites_have_confirmed(tmp_path: Path):
    parts = Round(tmp_path, FIVE)
    opened_round(parts, "reveal")
    confirmations = read(parts.server.message("a"), Confirmations)
    few = dict(list(confirmations.signatures.items())[:3])
    refused(parts, "a", confirmations.model_copy(update={"signatures": few}), "only 3 of 5 sites take part, and 4 are")
    forged = {**confirmations.signatures, "e": confirmations.signatures["d"]}
    refused(parts, "a", confirmations.model_copy(update={"signatures": forged}), "e has not confirmed")
    strange = {**confirmations.signatures, "x": confirmations.signatures["d"]}
    refused(parts, "a", confirmations.model_copy(update={"signatures": strange}), "x has not confirmed")


def test_a_site_reveals_one_secret_of_each_site(tmp_path: Path):
    """With a site's mask key and its seed, its change would be bare."""
    parts = Round(tmp_path, SIX)
    parts.carry_out(changes_of(SIX), {"fit": ["f"]})
    for name, revealed in parts.server.progress.revealed.items():  # type: ignore[union-attr]
        member = parts.members[name]
        attempt = member._current
        for other in SIX:
            share = bytes.fromhex(revealed.shares[other])
            keys = next(keys for keys in read(attempt.roster.encode(), Roster).keys if keys.site == other)
            key = envelope_key(bytes.fromhex(attempt.envelope_key), keys, other, name, digest(attempt.roster.encode()))
            sealed = read(attempt.envelopes.encode(), Envelopes).sealed
            both = bytes.fromhex(attempt.own_share) if other == name else crypto.unseal(key, sealed[other])
            assert share == (both[:32] if other == "f" else both[32:])


def test_masks_cover_one_change_only(tmp_path: Path):
    """The same change gets the same answer, and another one none, even after a restart."""
    parts, changes = Round(tmp_path, FIVE), changes_of(FIVE)
    opened_round(parts, "confirm", changes)
    again = Round(tmp_path, FIVE).members["a"]
    assert (again.masked(1, changes["a"]) == parts.masked["a"]).all()
    with pytest.raises(PacketRefused, match="a second answer under the same masks"):
        again.masked(1, changes["a"] + 1)


def test_a_repeated_round_is_summed_over_the_same_sites_or_not_at_all(tmp_path: Path):
    """The difference of two sums of the same changes would be one site's change."""
    parts, changes = Round(tmp_path, SIX), changes_of(SIX)
    first = parts.carry_out(changes, {"fit": ["f"]})
    # The server claims to have lost the round.
    parts.server.progress.step = "keys"  # type: ignore[union-attr]
    parts.server._save()
    parts.restart()
    with pytest.raises(PacketRefused, match="a second sum of round 1, which is not the first one again"):
        parts.carry_out(changes)
    parts.restart()
    assert (parts.carry_out(changes, {"fit": ["f"]}) == first).all()


def test_a_site_requires_more_sites_if_its_file_says_so(tmp_path: Path):
    parts = Round(tmp_path, FIVE)
    parts.members["a"].least = 5
    opened_round(parts, "shares")
    four = roster_of(parts)
    four = four.model_copy(update={"keys": four.keys[:4], "shares": dict.fromkeys("abcd", 0.2)})
    refused(parts, "a", four, "4 sites take part, and a requires 5")


MESSAGES = [b"", b"{}", b"[]", b'{"kind": "keys"}', b'{"kind": "roster"}', b"\xff", b"[" * 100_000, b'{"kind": []}']


@pytest.mark.parametrize("message", MESSAGES)
def test_what_is_no_message_is_refused(message: bytes, tmp_path: Path):
    parts = Round(tmp_path, FIVE)
    with pytest.raises(PacketRefused):
        parts.members["a"].answer(message)
    parts.server.begin(1, RANGES)
    with pytest.raises(PacketRefused):
        parts.server.take("a", message)


# Sites that deceive


@pytest.mark.parametrize(
    ("names", "liar", "count"),
    # Of sixteen, the liar is the first holder in all sets of shares that come first in order.
    [(SIX, "b", 1000), ([f"{number:02d}" for number in range(16)], "00", 50)],
)
def test_false_shares_are_found_and_replaced_by_other_sites(names: list[str], liar: str, count: int, tmp_path: Path):
    parts, changes = Round(tmp_path, names), changes_of(names, count)
    opened_round(parts, "reveal", changes)
    for name in names:
        answer = read(parts.members[name].answer(parts.server.message(name)), Revealed)
        if name == liar:
            answer = answer.model_copy(update={"shares": dict.fromkeys(answer.shares, "1" * 64)})
        parts.server.take(name, written(answer))
    parts.server.end()
    assert (parts.server.total(parts.masked, count) == expected(changes, names, parts.server.ring.bits)).all()


def test_a_site_that_deals_out_false_shares_is_named(tmp_path: Path):
    parts, changes = Round(tmp_path, SIX), changes_of(SIX)
    opened_round(parts, "shares")
    roster = read(parts.server.message("b"), Roster)
    for name in SIX:
        answer = read(parts.members[name].answer(parts.server.message(name)), Shares)
        if name == "b":
            attempt = parts.members["b"]._current
            sealed = {
                keys.site: crypto.seal(
                    envelope_key(bytes.fromhex(attempt.envelope_key), keys, "b", keys.site, answer.roster), b"1" * 64
                )
                for keys in roster.keys
                if keys.site != "b"
            }
            answer = answer.model_copy(update={"sealed": sealed})
        parts.server.take(name, written(answer))
    parts.server.end()
    with pytest.raises(FlapsamError, match="the shares of b's secret do not fit together"):
        for step in ("fit", "confirm", "reveal"):
            parts.fit(changes) if step == "fit" else parts.step()
            parts.server.end(parts.masked)
        parts.server.total(parts.masked, 1000)


def with_keys(offer: Offer, **changes: Any) -> Offer:
    return offer.model_copy(update={"keys": offer.keys.model_copy(update=changes)})


def signed_again(offer: Offer, parts: Round, **changes: Any) -> Offer:
    offer = with_keys(offer, **changes)
    return with_keys(offer, signature=parts.members[offer.keys.site].identity.sign(offer.keys.signed))


FALSE_ANSWERS: dict[str, tuple[str, Callable[[Any, Round], Any], str]] = {
    "keys for another round": ("keys", lambda answer, parts: with_keys(answer, round=2), "something else"),
    "keys of another site": ("keys", lambda answer, parts: with_keys(answer, site="b"), "something else"),
    "keys without a signature": ("keys", lambda answer, parts: with_keys(answer, signature="0" * 128), "signed"),
    "unsafe keys": ("keys", lambda answer, parts: signed_again(answer, parts, mask_key="0" * 64), "not safe"),
    "shares for some": (
        "shares",
        lambda answer, parts: answer.model_copy(update={"sealed": {k: v for k, v in answer.sealed.items() if k != "c"}}),
        "not for the sites of the roster",
    ),
    "short shares": (
        "shares",
        lambda answer, parts: answer.model_copy(update={"sealed": {**answer.sealed, "c": b"short"}}),
        "right size",
    ),
    "another list": ("confirm", lambda answer, parts: answer.model_copy(update={"answered": list("abcd")}), "other lists"),
    "a forged confirmation": (
        "confirm",
        lambda answer, parts: answer.model_copy(update={"signature": "0" * 128}),
        "not signed",
    ),
    "shares of a stranger": (
        "reveal",
        lambda answer, parts: answer.model_copy(update={"shares": {"x": "0" * 64}}),
        "something else",
    ),
}
KINDS = {"keys": Offer, "shares": Shares, "reveal": Revealed}


@pytest.mark.parametrize("name", FALSE_ANSWERS)
def test_a_false_answer_is_refused_and_the_site_drops_out(name: str, tmp_path: Path):
    from flapsam.federation.secure_aggregation.messages import Confirmation

    step, change, reason = FALSE_ANSWERS[name]
    parts, changes = Round(tmp_path, FIVE), changes_of(FIVE)
    opened_round(parts, step, changes)
    answer = read(parts.members["a"].answer(parts.server.message("a")), {**KINDS, "confirm": Confirmation}[step])
    with pytest.raises(PacketRefused, match=reason):
        parts.server.take("a", written(change(answer, parts)))
    with pytest.raises(PacketRefused, match="nobody asked for it"):
        parts.server.take("x", written(answer))
    parts.step(gone=["a"])
    parts.server.end(parts.masked)
    for later in parts.server.begin(1, RANGES, arrived=parts.masked):
        parts.fit(changes, gone=["a"]) if later == "fit" else parts.step(gone=["a"])
        parts.server.end(parts.masked)
    assert (parts.server.total(parts.masked, 1000) == expected(changes, parts.server.summed, 8)).all()


def test_a_key_is_private_and_signs_for_its_owner_alone(tmp_path: Path):
    identity = Identity(tmp_path / "state" / "identity.key")
    assert (tmp_path / "state" / "identity.key").stat().st_mode & 0o077 == 0
    assert Identity(tmp_path / "state" / "identity.key").public == identity.public
    assert is_signed(b"content", identity.sign(b"content"), identity.public)
    assert not is_signed(b"other", identity.sign(b"content"), identity.public)
    assert not is_signed(b"content", identity.sign(b"content"), Identity(tmp_path / "other.key").public)
    (tmp_path / "state" / "identity.key").write_text("broken")
    with pytest.raises(FlapsamError, match="cannot read this site's key"):
        Identity(tmp_path / "state" / "identity.key")


def test_a_site_that_the_others_do_not_know_is_left_out_and_the_others_go_on(tmp_path: Path):
    """A site that has joined, one that was asked for something else, and one that accepts nobody."""
    names = list("abcdefgh")
    parts, changes = Round(tmp_path, names), changes_of(names)
    for name in "abcde":
        del parts.members[name].partners["f"]
    parts.members["g"].asked = "1" * 64
    parts.members["h"].partners = {"h": parts.members["h"].identity.public}
    assert left_out_of(parts) == {
        "f": "most other sites do not have its public key (secure.partners)",
        "g": "it was asked for something else",
        "h": "it lacks the public key of a site that the others know (secure.partners)",
    }
    for step in ("shares", "fit", "confirm", "reveal"):
        parts.fit(changes) if step == "fit" else parts.step()
        parts.server.end(parts.masked)
    assert (parts.server.total(parts.masked, 1000) == expected(changes, FIVE, 8)).all()


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("data"), sites=3, cases=3)


REFUSED = {
    "flexlora": ({"aggregator": "flexlora"}, "aggregator: flexlora needs every site's own tensors"),
    "median": ({"aggregator": "median"}, "choose one of fedavg, ffa-lora, rolora"),
    "max_change": ({"rounds": {"max_change": 3}}, "secure cannot be used with rounds.max_change"),
    "two sites": ({"rounds": {"min_sites": 2}}, "secure needs at least 3 sites in every sum"),
    "ranks": ({"site_ranks": {"site_0": 1}}, "secure cannot be used with site_ranks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_needs_single_answers_is_refused(name: str, data: Path, tmp_path: Path, capfd):
    fields, sentence = REFUSED[name]
    outcome = flapsam(capfd, "simulate", write_run(tmp_path / "run.yaml", data, secure=True, **fields))
    assert outcome.code == 2 and sentence in " ".join(outcome.err.split())


OF_ITS_OWN = {
    "labels of a site": {"data": {"site_labels": {"b": {"core": 7}}}},
    "ignored labels": {"data": {"labels": {"ball": 1, "core": 2, "ignore": 3}}},
    "intensities of a site": {"samples": {"site_clip": {"b": [0, 1]}}},
    "tensors of a site": {"personal": ["*norm*"]},
    "counts of the sites": {"rounds": {"weights": "slices"}},
    "moments of a site": {"training": {"moments": "keep"}},
}


@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_a_run_in_which_sites_change_by_what_is_their_own_is_refused(name: str):
    """Others could be made to change nothing, which hides nobody's change."""
    data = {"path": "data", "labels": {"ball": 1, "core": 2}}
    tree = {**OF_ITS_OWN[name], "data": {**data, **OF_ITS_OWN[name].get("data", {})}}
    RunConfig.model_validate(tree)
    with pytest.raises(ValueError, match=r"secure (needs|cannot be used with) "):
        RunConfig.model_validate({**tree, "secure": True})


def test_two_sites_are_too_few(tmp_path: Path, capfd):
    two = make_sites(tmp_path / "data", sites=2, cases=3)
    outcome = flapsam(capfd, "simulate", write_run(tmp_path / "run.yaml", two, secure=True))
    assert outcome.code == 2
    assert "secure: a sum needs at least 3 sites, and there are 2" in " ".join(outcome.err.split())


def test_a_change_that_hides_nobodys_is_not_sent(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server could have made the other sites' changes not finite, or nothing in the agreed range."""
    tiny = {"window": 1, "batch_size": 8, "warmup_steps": 2, "learning_rate": 1e-30}
    config = read_config(write_run(tmp_path / "tiny.yaml", data, secure=True, training=tiny, output="tiny"))
    with pytest.raises(FlapsamError, match="this site's change is too small for the agreed range"):
        simulate(config)
    real = Client._fit

    def spoilt(self: Client, *arguments: Any) -> Any:
        report = real(self, *arguments)
        if self.data.site == "site_1":
            next(parameter for parameter in self.network.parameters() if parameter.requires_grad).data.fill_(float("inf"))
        return report

    monkeypatch.setattr(Client, "_fit", spoilt)
    config = read_config(write_run(tmp_path / "spoilt.yaml", data, secure=True, output="spoilt"))
    with pytest.raises(FlapsamError, match="this site's change is not finite"):
        simulate(config)


def adapter(run: Path) -> bytes:
    return next((run / "adapter").glob("*.safetensors")).read_bytes()


@pytest.fixture(scope="module")
def secure(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A secure run."""
    folder = tmp_path_factory.mktemp("secure")
    config = read_config(write_run(folder / "run.yaml", data, secure=True, rounds={"count": 2}))
    simulate(config)
    return config, folder / "run"


def test_a_secure_run_sums_every_round_and_sends_eight_bits_a_number(secure: tuple[RunConfig, Path]):
    _, run = secure
    assert [event["sites"] for event in read_events(run, "summed")] == [["site_0", "site_1", "site_2"]] * 2
    fits = read_events(run, "fit")
    numbers = json.loads((run / "results.json").read_text())["parameters"]
    assert len(fits) == 6 and all(numbers < fit["bytes_up"] < numbers + 6000 for fit in fits)


def test_a_secure_run_that_crashes_in_any_step_resumes_with_the_same_bits(
    secure: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, run = secure
    again = config.model_copy(update={"output": tmp_path / "run"})
    ended, summed, closed, fitted = [], [], [], []
    real_end, real_mean = Collector.end, Collector.mean
    real_forget, real_fit = ServerState.forget_replies, Client._fit

    def end(self: Collector, *arguments: Any) -> None:
        ended.append(self.progress.step)  # type: ignore[union-attr]
        if len(ended) in crashes:
            raise KeyboardInterrupt
        real_end(self, *arguments)

    def mean(self: Collector, *arguments: Any) -> Any:
        summed.append(self.progress.step)  # type: ignore[union-attr]
        if len(summed) == 1:
            raise KeyboardInterrupt
        return real_mean(self, *arguments)

    def forget(self: ServerState) -> None:
        if self.rounds()[-1] == 1 and not closed:
            closed.append(1)
            raise KeyboardInterrupt
        real_forget(self)

    def fit(self: Client, *arguments: Any) -> Any:
        fitted.append(self.data.site)
        return real_fit(self, *arguments)

    monkeypatch.setattr(Collector, "end", end)
    monkeypatch.setattr(Collector, "mean", mean)
    monkeypatch.setattr(ServerState, "forget_replies", forget)
    monkeypatch.setattr(Client, "_fit", fit)
    # Before the shares, the confirmations and the revealed shares of round 1 are saved, before its sum, after its result but
    # before its masked changes are dropped, and before the confirmations of round 2.
    crashes = {2, 6, 11, 16}
    for number in range(6):
        with pytest.raises(KeyboardInterrupt):
            # Workers fit the sites in round 1.
            simulate(again, resume=number > 0, workers=2 if number == 1 else 1)
    simulate(again, resume=True)
    assert [ended[crash - 1] for crash in sorted(crashes)] == ["shares", "confirm", "reveal", "confirm"]
    assert adapter(tmp_path / "run") == adapter(run)
    # No site had to train again.
    assert fitted == ["site_0", "site_1", "site_2"]


def test_a_round_that_is_repeated_has_the_same_sum_and_other_masks(secure: tuple[RunConfig, Path]):
    config, run = secure
    state, first = run / "state/federated/server/secure.json", adapter(run)
    before = json.loads(state.read_text())
    # A change depends on nothing that the site has kept.
    for kept in (run / "state/federated/sites").rglob("moments-*"):
        kept.unlink()
    simulate(config, from_round=2)
    after = json.loads(state.read_text())
    assert adapter(run) == first
    assert after["attempt"] == before["attempt"] + 1 and after["round"] == before["round"] == 2
    assert after["keys"]["site_0"]["mask_key"] != before["keys"]["site_0"]["mask_key"]
