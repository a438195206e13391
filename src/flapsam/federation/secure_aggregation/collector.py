"""The server's side of secure aggregation: it carries the sites' messages and adds up what they masked."""

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import combinations, islice
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Size, Tensor

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder, write_text
from flapsam.federation.compression.codec import Shapes
from flapsam.federation.packets import PacketRefused
from flapsam.federation.secure_aggregation import crypto
from flapsam.federation.secure_aggregation.identity import is_signed
from flapsam.federation.secure_aggregation.member import NOTHING, capped, common_mask_key
from flapsam.federation.secure_aggregation.messages import (
    Answered,
    Confirmation,
    Confirmations,
    Envelopes,
    Keys,
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

Step = Literal["keys", "shares", "fit", "confirm", "reveal", "sum"]
STEPS: tuple[Step, ...] = ("keys", "shares", "fit", "confirm", "reveal", "sum")
"""The steps of a round, in order. In ``fit``, sites send their masked changes; ``sum`` asks nobody."""
TRIES = 500
"""How many sets of shares are tried, if some do not fit."""
ENVELOPE_BYTES = 2 * crypto.SECRET_BYTES + 16
"""Size of an envelope: two shares, and what authenticates them."""


class Progress(BaseModel):
    """What the server keeps of the current round."""

    model_config = ConfigDict(extra="forbid")

    round: int
    attempt: int
    step: Step = "keys"
    keys: dict[str, Keys] = {}
    roster: str = ""
    """The message to the sites, as it was sent."""
    shares: dict[str, Shares] = {}
    answered: list[str] = []
    """Sites whose masked changes arrived."""
    confirmations: dict[str, Confirmation] = {}
    revealed: dict[str, Revealed] = {}


class Coding(BaseModel):
    """How the changes of a round became whole numbers."""

    bits: int
    shares: dict[str, float]
    ranges: dict[str, float]


class Codings(BaseModel):
    """The codings of a run, by round."""

    rounds: dict[int, Coding]


class Collector:
    """The server's side of secure aggregation.

    The server is not trusted. What it checks here only finds sites that do not keep to the protocol. What keeps it from
    seeing a site's own change is in ``Member``.
    """

    def __init__(self, run: str, folder: Path, shares: Mapping[str, float]) -> None:
        """Continue the round that is on the disk, if there is one.

        Args:
            run: the run's id.
            folder: folder for the current round.
            shares: each site's share in the mean.

        Raises:
            FlapsamError: the saved round is damaged.
        """
        self.run = run
        self.shares = shares
        self._offers: dict[str, Offer] = {}
        self._right: tuple[int, ...] = ()
        """Holders whose shares fitted together last."""
        self.path = folder / "secure.json"
        try:
            self.progress = Progress.model_validate_json(self.path.read_text()) if self.path.exists() else None
        except (ValidationError, ValueError, OSError) as error:
            raise FlapsamError(f"{self.path}: cannot read the saved round; start a new run") from error

    @property
    def holds_answers(self) -> bool:
        """Whether sites may have revealed something, so that the round must end with the masked changes that arrived."""
        return self.progress is not None and self.progress.step in ("reveal", "sum")

    def begin(
        self, number: int, ranges: Mapping[str, float], start: str = NOTHING, arrived: Collection[str] = ()
    ) -> list[Step]:
        """Begin a round. Once sites may have revealed something, its attempt continues, otherwise a new one begins.

        Args:
            number: the round.
            ranges: tensor → range of its change.
            start: SHA-256 of the tensors that training begins with.
            arrived: the sites whose masked changes are on the disk.

        Returns:
            The steps that are left, in order. ``end`` closes each. If they begin with ``keys``, a new attempt begins, and
            masked changes that have arrived before are of no use.
        """
        known = self.progress
        continues = known is not None and known.round == number and self.holds_answers
        # They are not there if the run went back.
        if known is None or not continues or not set(known.answered).issubset(arrived):
            self.progress = Progress(round=number, attempt=known.attempt + 1 if known is not None else 1)
            self._offers = {}
            self._save()
        self.ranges, self.start = ranges, start
        return [step for step in STEPS[STEPS.index(self._now.step) :] if step != "sum"]

    def asks(self, site: str) -> bool:
        """Whether a site has a part in the current step."""
        now = self._now
        if now.step == "keys":
            return self.shares.get(site, 0) > 0
        if now.step == "shares":
            return site in now.keys
        return site in (now.shares if now.step == "fit" else now.answered)

    def message(self, site: str) -> bytes:
        """The message of the current step for a site."""
        now = self._now
        if now.step == "keys":
            return written(Opening(run=self.run, round=now.round, attempt=now.attempt))
        if now.step == "shares":
            return now.roster.encode()
        named = self.named
        if now.step == "fit":
            sealed = {
                sender: base64.b64encode(shares.sealed[site]) for sender, shares in now.shares.items() if sender != site
            }
            return written(Envelopes(roster=named, sealed=dict(sorted(sealed.items()))))
        if now.step == "confirm":
            return written(Answered(roster=named, sites=now.answered))
        signatures = {name: confirmation.signature for name, confirmation in sorted(now.confirmations.items())}
        return written(Confirmations(roster=named, signatures=signatures))

    def take(self, site: str, data: bytes) -> None:
        """Take a site's answer in any step but ``fit``.

        Args:
            site: the site that the engine received it from.
            data: the answer.

        Raises:
            PacketRefused: the answer cannot be used. The round continues without it.
        """
        if not self.asks(site):
            raise PacketRefused("nobody asked for it")
        now = self._now
        if now.step == "keys":
            offer = read(data, Offer)
            keys = offer.keys
            if (keys.run, keys.round, keys.attempt, keys.site) != (self.run, now.round, now.attempt, site):
                raise PacketRefused("its keys are for something else")
            if not is_signed(keys.signed, keys.signature, keys.identity):
                raise PacketRefused("its keys are not signed with its identity")
            try:
                for public in (keys.mask_key, keys.envelope_key):
                    crypto.common(crypto.new_key(), bytes.fromhex(public), "")
            except ValueError as error:
                raise PacketRefused("its keys are not safe ones") from error
            same = now.keys.setdefault(site, keys) == keys
            self._offers[site] = offer
        elif now.step == "shares":
            shares = read(data, Shares)
            if (shares.roster, shares.site) != (self.named, site) or shares.sealed.keys() != now.keys.keys() - {site}:
                raise PacketRefused("its shares are not for the sites of the roster")
            if any(len(sealed) != ENVELOPE_BYTES for sealed in shares.sealed.values()):
                raise PacketRefused("its shares do not have the right size")
            same = now.shares.setdefault(site, shares) == shares
        elif now.step == "confirm":
            confirmation = read(data, Confirmation)
            lists = self.named, site, sorted(now.shares), now.answered
            if (confirmation.roster, confirmation.site, confirmation.masking, confirmation.answered) != lists:
                raise PacketRefused("it confirms other lists")
            if not is_signed(confirmation.signed, confirmation.signature, now.keys[site].identity):
                raise PacketRefused("its confirmation is not signed with its identity")
            same = now.confirmations.setdefault(site, confirmation) == confirmation
        elif now.step == "reveal":
            revealed = read(data, Revealed)
            if (revealed.roster, revealed.site) != (self.named, site) or revealed.shares.keys() - now.shares.keys():
                raise PacketRefused("it reveals shares of something else")
            same = now.revealed.setdefault(site, revealed) == revealed
        else:
            raise PacketRefused("nobody asked for it")
        if not same:
            raise PacketRefused(f"{site} has already answered")

    def end(
        self,
        answered: Iterable[str] = (),
        on_left_out: Callable[[str, str], object] = lambda site, reason: None,
    ) -> None:
        """Close the current step, and save what has come.

        Args:
            answered: the sites whose masked changes arrived, after step ``fit``.
            on_left_out: called with each site that is left out of the sum, and the reason.

        Raises:
            FlapsamError: too few sites have answered, or a site's share is too small.
        """
        now = self._now
        if now.step == "keys" and self._offers:
            for site, reason in _left_out(self._offers).items():
                del now.keys[site]
                on_left_out(site, reason)
        if now.step == "fit":
            now.answered = sorted(site for site in answered if site in now.shares)
        come = {
            "keys": now.keys,
            "shares": now.shares,
            "fit": now.answered,
            "confirm": now.confirmations,
            "reveal": now.revealed,
        }[now.step]
        needed = threshold(len(now.keys))
        if len(come) < needed:
            few = f"{len(come)} sites have taken part in step '{now.step}' of secure aggregation, and {needed} are needed"
            raise FlapsamError(f"round {now.round}: {few}; see the ledger for the reasons")
        if now.step == "keys":
            now.roster = written(self._made_roster()).decode()
        if now.step == "confirm":
            self._note_coding()
        now.step = STEPS[STEPS.index(now.step) + 1]
        self._save()

    def _made_roster(self) -> Roster:
        keys = dict(sorted(self._now.keys.items()))
        before = self._coded.get(self._now.round)
        if before is not None and before.shares.keys() == keys.keys():
            # Sites let a round that was summed be repeated with the same shares and ranges only.
            return Roster(keys=list(keys.values()), start=self.start, **before.model_dump())
        shares = capped({site: self.shares[site] for site in keys})
        try:
            bits = Ring.of(shares.values()).bits
        except ValueError as error:
            smallest = min(shares, key=shares.__getitem__)
            raise FlapsamError(
                f"rounds.weights: the share of {smallest} is too small for secure aggregation; give it more weight, or none"
            ) from error
        return Roster(keys=list(keys.values()), start=self.start, bits=bits, shares=shares, ranges=dict(self.ranges))

    @property
    def _coded(self) -> "dict[int, Coding]":
        """Round → how its changes became whole numbers, for all rounds of which sites may have revealed something."""
        path = self.path.with_name("codings.json")
        if not path.exists():
            return {}
        try:
            return Codings.model_validate_json(path.read_text()).rounds
        except (ValidationError, ValueError, OSError) as error:
            raise FlapsamError(f"{path}: cannot read the saved rounds; start a new run") from error

    def _note_coding(self) -> None:
        roster = self._roster
        coding = Coding(bits=roster.bits, shares=roster.shares, ranges=roster.ranges)
        codings = Codings(rounds={**self._coded, self._now.round: coding})
        write_text(self.path.with_name("codings.json"), codings.model_dump_json())

    def total(self, masked: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """The sum of the whole numbers of the sites that answered, modulo the ring's size.

        Args:
            masked: site → its masked change, packed.
            count: number of whole numbers of each site.

        Raises:
            FlapsamError: the shares of a site's secret do not fit, so that its mask cannot be removed.
        """
        now, ring = self._now, self.ring
        total = np.zeros(count, np.uint32)
        for site in now.answered:
            total += ring.unpacked(masked[site], count)
            total -= crypto.mask(self._restored(site, crypto.SECRET_BYTES), count, ring.bits)
        for site in sorted(now.shares.keys() - set(now.answered)):
            private = self._restored(site, 0)
            for other in now.answered:
                part = crypto.mask(common_mask_key(private, site, now.keys[other], self.named), count, ring.bits)
                # What ``other`` added for ``site``.
                total = total - part if other < site else total + part
        return ring.reduced(total)

    @property
    def summed(self) -> list[str]:
        """The sites in the round's sum."""
        return list(self._now.answered)

    @property
    def share(self) -> float:
        """The sum of the shares of the sites in the round's sum."""
        return sum(self._roster.shares[site] for site in self._now.answered)

    def _restored(self, site: str, start: int) -> bytes:
        """A site's mask key (``start`` 0) or its seed, from the shares that others have revealed."""
        now = self._now
        index = {name: position + 1 for position, name in enumerate(sorted(now.keys))}
        shares = {
            index[holder]: bytes.fromhex(revealed.shares[site])
            for holder, revealed in sorted(now.revealed.items())
            if site in revealed.shares
        }
        right = now.keys[site].seed_digest if start else now.keys[site].mask_key
        for chosen in self._choices(list(shares)):
            secret = crypto.joined({number: shares[number] for number in chosen})
            if (hashlib.sha256(secret).hexdigest() if start else crypto.public(secret).hex()) == right:
                self._right = chosen
                return secret
        raise FlapsamError(
            f"round {now.round}: the shares of {site}'s secret do not fit together, so that its mask cannot be removed; "
            f"{site} has given false shares to the others, or some of these have sent false ones"
        )

    def _choices(self, holders: list[int]) -> Iterator[tuple[int, ...]]:
        """Sets of holders to try: the last set that fitted, runs of neighbours, and up to ``TRIES`` other sets."""
        needed = threshold(len(self._now.keys))
        if set(self._right).issubset(holders) and self._right:
            yield self._right
        if len(holders) >= needed:
            for first in range(len(holders)):
                yield tuple(sorted((holders[first:] + holders[:first])[:needed]))
        yield from islice(combinations(holders, needed), TRIES)

    @property
    def ring(self) -> Ring:
        """The ring of the round."""
        return Ring(self._roster.bits)

    def mean(self, masked: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, Tensor]:
        """The weighted mean of the changes of the sites that answered.

        Args:
            masked: site → its masked change, packed.
            shapes: the tensors' shapes.

        Raises:
            FlapsamError: see ``total``.
        """
        count = sum(Size(shape).numel() for shape in shapes.values())
        return self.ring.mean(self.total(masked, count), shapes, self._roster.ranges, self.share)

    @property
    def named(self) -> str:
        """SHA-256 of the round's roster."""
        return digest(self._now.roster.encode())

    @property
    def _now(self) -> Progress:
        if self.progress is None:
            raise FlapsamError("no round has begun")
        return self.progress

    @property
    def _roster(self) -> Roster:
        return read(self._now.roster.encode(), Roster)

    def _save(self) -> None:
        make_folder(self.path.parent)
        write_text(self.path, self._now.model_dump_json())


def _left_out(offers: Mapping[str, Offer]) -> dict[str, str]:
    """Sites that cannot be in one sum with the others, with the reason."""
    left, out = dict(offers), {}

    def leave_out(sites: Iterable[str], reason: str) -> None:
        for site in list(sites):
            out[site] = reason
            del left[site]

    asked = Counter(offer.keys.asked for offer in left.values()).most_common(1)
    leave_out([site for site, offer in left.items() if offer.keys.asked != asked[0][0]], "it was asked for something else")
    for kind in ("mask_key", "envelope_key"):
        used = Counter(getattr(offer.keys, kind) for offer in left.values())
        leave_out([site for site, offer in left.items() if used[getattr(offer.keys, kind)] > 1], "another site has its key")
    # Whom most others do not know is a stranger. Whoever does not know one of the rest then stands apart.
    lacked_by = {site: sum(_lacks(other, site, left) for other in left) for site in left}
    unknown = "most other sites do not have its public key (secure.partners)"
    leave_out([site for site, count in lacked_by.items() if 2 * count >= len(left)], unknown)
    lacking = "it lacks the public key of a site that the others know (secure.partners)"
    leave_out([site for site in left if any(_lacks(site, other, left) for other in left)], lacking)
    while left and (most := max(offer.keys.least for offer in left.values())) > len(left):
        demanding = [site for site, offer in left.items() if offer.keys.least == most]
        leave_out(demanding, f"it requires {most} sites (secure.min_sites)")
    return out


def _lacks(site: str, other: str, offers: Mapping[str, Offer]) -> bool:
    return site != other and offers[site].partners.get(other) != offers[other].keys.identity
