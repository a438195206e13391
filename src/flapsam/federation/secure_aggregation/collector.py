"""The server's side of secure aggregation: it carries the sites' messages and adds up what they masked."""

import base64
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
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
        """Begin a round, or continue it once sites may have revealed something. Otherwise, an attempt begins anew.

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
            keys = read(data, Keys)
            if (keys.run, keys.round, keys.attempt, keys.site) != (self.run, now.round, now.attempt, site):
                raise PacketRefused("its keys are for something else")
            if not is_signed(keys.signed, keys.signature, keys.identity):
                raise PacketRefused("its keys are not signed with its identity")
            taken = now.keys.setdefault(site, keys)
            same = taken == keys
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

    def end(self, answered: Iterable[str] = ()) -> dict[str, str]:
        """Close the current step, and save what has come.

        Args:
            answered: the sites whose masked changes arrived, after step ``fit``.

        Returns:
            Site that is left out of the sum → reason.

        Raises:
            FlapsamError: too few sites have answered, or a site's share is too small.
        """
        now = self._now
        left_out = _strangers(now.keys) if now.step == "keys" else {}
        now.keys = {site: keys for site, keys in now.keys.items() if site not in left_out}
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
        now.step = STEPS[STEPS.index(now.step) + 1]
        self._save()
        return left_out

    def _made_roster(self) -> Roster:
        keys = dict(sorted(self._now.keys.items()))
        shares = capped({site: self.shares[site] for site in keys})
        try:
            bits = Ring.of(shares.values()).bits
        except ValueError as error:
            smallest = min(shares, key=shares.__getitem__)
            raise FlapsamError(
                f"rounds.weights: the share of {smallest} is too small for secure aggregation; give it more weight, or none"
            ) from error
        return Roster(keys=list(keys.values()), start=self.start, bits=bits, shares=shares, ranges=dict(self.ranges))

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
            f"{site} has given false shares, or too many others have"
        )

    def _choices(self, holders: list[int]) -> Iterator[tuple[int, ...]]:
        """Sets of holders to try: those that were right before, then runs of neighbours, of which one lacks a false one."""
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


def _strangers(keys: Mapping[str, Keys]) -> dict[str, str]:
    """Sites that cannot be in one sum with the others, with the reason: who has the most conflicts is left out first."""
    left, out = dict(keys), {}
    while True:
        conflicts = {site: [other for other in left if _conflict(left[site], left[other])] for site in left}
        worst = max(left, key=lambda site: (len(conflicts[site]), site), default=None)
        if worst is None or not conflicts[worst]:
            return out
        others = ", ".join(conflicts[worst][:3])
        out[worst] = f"it and {others} lack each other's public keys (secure.partners), or were asked for different things"
        del left[worst]


def _conflict(one: Keys, other: Keys) -> bool:
    if one.site == other.site:
        return False
    known = one.partners.get(other.site) == other.identity and other.partners.get(one.site) == one.identity
    return not known or one.asked != other.asked or one.mask_key == other.mask_key or one.envelope_key == other.envelope_key
