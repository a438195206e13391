"""A site's side of secure aggregation. It trusts only its partners' keys, and assumes that the server may lie."""

import base64
import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder, write_text
from flapsam.federation.packets import PacketRefused
from flapsam.federation.secure_aggregation import crypto
from flapsam.federation.secure_aggregation.identity import Identity, is_signed
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
    kind_of,
    read,
    threshold,
    written,
)
from flapsam.federation.secure_aggregation.ring import Ring
from flapsam.run.config import LEAST_SECURE

log = logging.getLogger(__name__)
NOTHING = "0" * 64
"""In place of a SHA-256, where there is nothing to compare."""


class Attempt(BaseModel):
    """What a site keeps of its attempt at a round. It is on the disk before anything that depends on it leaves."""

    model_config = ConfigDict(extra="forbid")

    round: int
    attempt: int
    mask_key: str
    """Private X25519 key, as hexadecimal digits, like the next two."""
    envelope_key: str
    seed: str
    keys: str
    """The message with the public keys."""
    roster: str = ""
    """The server's message, as it came."""
    own_share: str = ""
    """The shares of the site's own secrets that it keeps itself."""
    shares: str = ""
    """The message with the shares for the others."""
    envelopes: str = ""
    """The server's message, as it came."""
    masked: str = ""
    """SHA-256 of what was masked."""
    answered: list[str] | None = None
    """Sites whose masked changes arrived, as the site has confirmed."""

    @property
    def named(self) -> str:
        """SHA-256 of the roster."""
        return digest(self.roster.encode())


class Member:
    """A site's side (Bonawitz et al. 2017, "Practical secure aggregation", figure 4, against active adversaries).

    In an attempt at a round, a site's secrets mask one change, and its shares of the others' secrets are revealed for one
    list of sites. Over all attempts at a round, a site reveals shares for one sum only. A sum can be revealed
    without the confirmation of every site in it, so each site also checks what protects the others.
    """

    def __init__(
        self,
        run: str,
        site: str,
        identity: Identity,
        partners: Mapping[str, str],
        folder: Path,
        *,
        asked: str = NOTHING,
        weights: Mapping[str, float] | None = None,
        least: int = LEAST_SECURE,
    ) -> None:
        """Prepare to take part in the rounds of a run.

        Args:
            run: the run's id.
            site: the site's name.
            identity: the site's own key.
            partners: other site → its public key. No other sites are accepted.
            folder: folder for the secrets of the current round.
            asked: SHA-256 of what the run asks. The others must have been asked the same.
            weights: site → its weight, as the run's configuration says. None: the same for all.
            least: least number of sites, this one included, whose sum the site takes part in.
        """
        self.run = run
        self.site = site
        self.identity = identity
        self.partners = {**partners, site: identity.public}
        self.least = max(least, LEAST_SECURE)
        self.folder = folder
        self.asked = asked
        self.weights = weights

    def answer(self, data: bytes) -> bytes:
        """Answer a message of the server. The same message gets the same answer.

        Raises:
            PacketRefused: the message is invalid, or shows that the server or a site deceives.
        """
        answers: dict[str, Callable[[bytes], bytes]] = {
            "opening": self._keys,
            "roster": self._shares,
            "answered": self._confirmation,
            "confirmations": self._revealed,
        }
        kind = kind_of(data)
        if kind not in answers:
            raise PacketRefused("its message is none of secure aggregation")
        return answers[kind](data)

    def begin(self, number: int, envelopes: bytes, start: str) -> Roster:
        """Take the message that comes with the tensors, before training.

        Args:
            number: the round.
            envelopes: the server's message.
            start: SHA-256 of the tensors that training begins with.

        Returns:
            The roster, which says how changes become whole numbers.

        Raises:
            PacketRefused: too few sites take part, the tensors are not those of the roster, or the envelopes are others than
                before.
        """
        attempt = self._attempt(number)
        roster = self._roster(attempt)
        if roster.start != start:
            raise PacketRefused("it sends other tensors than its roster says")
        self._masking(attempt, roster, envelopes)
        if attempt.envelopes not in ("", envelopes.decode()):
            raise PacketRefused("it sends other envelopes than before")
        self._keep(attempt.model_copy(update={"envelopes": envelopes.decode()}))
        return roster

    def seed(self, number: int, start: str) -> int:
        """Seed of the rounding in a round, a secret of this site. If the server knew it, some sums would tell a sign."""
        return int(digest(self.identity.sign(f"flapsam rounding {number} {start}".encode()).encode())[:15], 16)

    def current(self, number: int) -> Roster:
        """The roster of a round."""
        return self._roster(self._attempt(number))

    def roster(self, number: int) -> str:
        """SHA-256 of the roster of a round."""
        return self._attempt(number).named

    def masked(self, number: int, whole: np.ndarray) -> np.ndarray:
        """Add this site's masks to its whole numbers. Call ``begin`` before.

        Args:
            number: the round.
            whole: the whole numbers of this site's change, int32.

        Returns:
            The masked numbers, packed.

        Raises:
            PacketRefused: something else was masked in this attempt before.
        """
        attempt = self._attempt(number)
        roster = self._roster(attempt)
        what = hashlib.sha256(whole.tobytes()).hexdigest()
        if attempt.masked not in ("", what):
            # The difference of two changes with the same masks would be bare.
            raise PacketRefused("it asks for a second answer under the same masks")
        attempt = attempt.model_copy(update={"masked": what})
        self._keep(attempt)
        masking, ring = self._masked_with(attempt), roster.ring
        total = ring.reduced(whole) + crypto.mask(bytes.fromhex(attempt.seed), len(whole), ring.bits)
        private = bytes.fromhex(attempt.mask_key)
        keys = {keys.site: keys for keys in roster.keys}
        for other in masking:
            if other != self.site:
                part = crypto.mask(common_mask_key(private, self.site, keys[other], attempt.named), len(whole), ring.bits)
                total = total + part if self.site < other else total - part
        return ring.packed(ring.reduced(total))

    def _keys(self, data: bytes) -> bytes:
        """Make new keys for an attempt."""
        opening = read(data, Opening)
        if opening.run != self.run:
            raise PacketRefused("it belongs to another run")
        known = self._known
        if known and (known.round, known.attempt) == (opening.round, opening.attempt):
            return self._offer(read(known.keys.encode(), Keys))
        if known and known.attempt >= opening.attempt:
            raise PacketRefused(f"it opens attempt {opening.attempt}, but attempt {known.attempt} has begun")
        mask_key, envelope_key, seed = crypto.new_key(), crypto.new_key(), secrets.token_bytes(crypto.SECRET_BYTES)
        keys = Keys(
            run=self.run,
            round=opening.round,
            attempt=opening.attempt,
            site=self.site,
            asked=self.asked,
            mask_key=crypto.public(mask_key).hex(),
            envelope_key=crypto.public(envelope_key).hex(),
            least=self.least,
            seed_digest=digest(seed),
            identity=self.identity.public,
            signature="0" * 128,
        )
        keys = keys.model_copy(update={"signature": self.identity.sign(keys.signed)})
        self._keep(
            Attempt(
                round=opening.round,
                attempt=opening.attempt,
                mask_key=mask_key.hex(),
                envelope_key=envelope_key.hex(),
                seed=seed.hex(),
                keys=written(keys).decode(),
            )
        )
        return self._offer(keys)

    def _offer(self, keys: Keys) -> bytes:
        return written(Offer(keys=keys, partners=self.partners))

    def _shares(self, data: bytes) -> bytes:
        """Check who takes part, and share this site's secrets out among them."""
        roster, attempt = read(data, Roster), self._current
        if attempt.roster:
            if attempt.roster != data.decode():
                raise PacketRefused("it brings a second roster for the same keys")
            return attempt.shares.encode()
        self._check_roster(roster, attempt)
        summed = self._sums.get(attempt.round)
        if summed and summed.coding != roster.coding:
            raise PacketRefused(f"it wants to repeat round {attempt.round} with other shares or ranges than in its sum")
        sites = [keys.site for keys in roster.keys]
        count, least = len(sites), threshold(len(sites))
        secrets_of = [bytes.fromhex(secret) for secret in (attempt.mask_key, attempt.seed)]
        parts = [
            first + second
            for first, second in zip(*(crypto.shared_out(secret, count, least) for secret in secrets_of), strict=True)
        ]
        named = digest(data)
        sealed = {}
        for keys, part in zip(roster.keys, parts, strict=True):
            if keys.site != self.site:
                key = envelope_key(bytes.fromhex(attempt.envelope_key), keys, self.site, keys.site, named)
                sealed[keys.site] = base64.b64encode(crypto.seal(key, part))
        shares = written(Shares(roster=named, site=self.site, sealed=sealed))
        own = parts[sites.index(self.site)].hex()
        self._keep(attempt.model_copy(update={"roster": data.decode(), "shares": shares.decode(), "own_share": own}))
        return shares

    def _check_roster(self, roster: Roster, attempt: Attempt) -> None:
        sites = [keys.site for keys in roster.keys]
        if sites != sorted(set(sites)) or roster.shares.keys() != set(sites):
            raise PacketRefused("its roster is not in order, or names a site twice")
        unknown = [site for site in sites if site not in self.partners]
        if unknown:
            raise PacketRefused(f"its roster names {unknown[0]!r}, which is none of this site's partners (secure.partners)")
        own = read(attempt.keys.encode(), Keys)
        for keys in roster.keys:
            if (keys.run, keys.round, keys.attempt) != (own.run, own.round, own.attempt):
                raise PacketRefused(f"its roster brings keys of {keys.site} from another round or attempt")
            if keys.asked != self.asked:
                raise PacketRefused(f"it asks something else of {keys.site} than of this site")
            if keys.identity != self.partners[keys.site] or not is_signed(keys.signed, keys.signature, keys.identity):
                raise PacketRefused(f"its roster brings keys of {keys.site} that {keys.site} has not signed")
            if keys.site == self.site and keys != own:
                raise PacketRefused("its roster does not bring this site's own keys")
        if own.site not in sites:
            raise PacketRefused("its roster does not name this site")
        self._check_least(roster, sites)
        _check_shares(roster)
        self._check_weights(roster)
        for names in ({keys.mask_key for keys in roster.keys}, {keys.envelope_key for keys in roster.keys}):
            if len(names) < len(sites):
                raise PacketRefused("its roster brings the same key for two sites")

    def _masking(self, attempt: Attempt, roster: Roster, data: bytes) -> list[str]:
        """The sites that mask with each other: those whose envelopes arrived, and this one."""
        envelopes = read(data, Envelopes)
        if envelopes.roster != attempt.named:
            raise PacketRefused("its envelopes are for another roster")
        sites = {keys.site for keys in roster.keys}
        masking = sorted({*envelopes.sealed, self.site})
        if not sites.issuperset(masking) or self.site in envelopes.sealed:
            raise PacketRefused("its envelopes are not from sites of the roster")
        self._check_enough(len(masking), len(sites))
        return masking

    def _confirmation(self, data: bytes) -> bytes:
        """Confirm whose masked changes arrived, once."""
        answered, attempt = read(data, Answered), self._current
        masking = self._masked_with(attempt)
        if answered.roster != attempt.named:
            raise PacketRefused("its list is for another roster")
        if not set(masking).issuperset(answered.sites) or self.site not in answered.sites:
            raise PacketRefused("its list names sites without masks, or leaves this one out")
        roster = self._roster(attempt)
        self._check_enough(len(answered.sites), len(roster.keys))
        self._check_least(roster, answered.sites)
        if attempt.answered not in (None, answered.sites):
            raise PacketRefused("it brings a second list of the sites that answered")
        self._check_summed(attempt.round, Sum(sites=answered.sites, coding=roster.coding))
        self._keep(attempt.model_copy(update={"answered": answered.sites}))
        confirmation = Confirmation(
            roster=answered.roster,
            site=self.site,
            masking=masking,
            answered=answered.sites,
            signature="0" * 128,
        )
        return written(confirmation.model_copy(update={"signature": self.identity.sign(confirmation.signed)}))

    def _revealed(self, data: bytes) -> bytes:
        """Reveal shares, if enough sites have confirmed the same lists as this one."""
        confirmations, attempt = read(data, Confirmations), self._current
        masking, named = self._masked_with(attempt), attempt.named
        if attempt.answered is None or confirmations.roster != named:
            raise PacketRefused("its confirmations are for another roster")
        for site, signature in confirmations.signatures.items():
            seen = Confirmation(
                roster=named,
                site=site,
                masking=masking,
                answered=attempt.answered,
                signature=signature,
            )
            if site not in attempt.answered or not is_signed(seen.signed, signature, self.partners[site]):
                raise PacketRefused(f"{site} has not confirmed the same lists of sites as this site")
        roster = self._roster(attempt)
        self._check_enough(len(confirmations.signatures), len(roster.keys))
        chosen = Sum(sites=attempt.answered, coding=roster.coding)
        self._check_summed(attempt.round, chosen)
        write_text(self._summed, Sums(rounds={**self._sums, attempt.round: chosen}).model_dump_json())
        keys = {keys.site: keys for keys in roster.keys}
        envelopes = read(attempt.envelopes.encode(), Envelopes).sealed
        shares = {}
        for site in masking:
            try:
                key = envelope_key(bytes.fromhex(attempt.envelope_key), keys[site], site, self.site, named)
                content = bytes.fromhex(attempt.own_share) if site == self.site else crypto.unseal(key, envelopes[site])
            except ValueError:
                log.warning("the envelope from %s cannot be opened", site)
                continue
            # Never both: the mask key of a site that answered would bare its change, if its seed is revealed, too.
            start = crypto.SECRET_BYTES if site in attempt.answered else 0
            shares[site] = content[start : start + crypto.SECRET_BYTES].hex()
        return written(Revealed(roster=named, site=self.site, shares=shares))

    def _check_enough(self, count: int, sites: int) -> None:
        if count < threshold(sites):
            raise PacketRefused(f"only {count} of {sites} sites take part, and {threshold(sites)} are needed")

    def _check_least(self, roster: Roster, sites: Collection[str]) -> None:
        """Check that as many sites take part as each of them demands. Others reveal a site's seed, so they see to it."""
        for keys in roster.keys:
            if keys.site in sites and len(sites) < keys.least:
                few = f"{len(sites)} sites take part, and {keys.site} requires {keys.least} (secure.min_sites)"
                raise PacketRefused(few)

    def _check_weights(self, roster: Roster) -> None:
        """Check that shares are those that follow from the run's weights.

        Otherwise, sums of nearly the same changes in several rounds would be as many equations as sites.
        """
        weights = {site: (self.weights or {}).get(site, 0.0 if self.weights else 1.0) for site in roster.shares}
        right, given = capped(weights), roster.shares
        whole, total = sum(right.values()), sum(given.values())
        if any(abs(right[site] / whole - given[site] / total) > 1e-9 for site in given) if whole else True:
            raise PacketRefused("its roster has other shares than follow from the run's weights (rounds.weights)")

    def _check_summed(self, number: int, chosen: "Sum") -> None:
        """Check that this site has revealed shares for no other sum in this round: of other sites, or of other numbers.

        With enough sums of the same changes under other shares or ranges, the server could solve for every change.
        """
        if self._sums.get(number, chosen) != chosen:
            raise PacketRefused(f"it asks for a second sum of round {number}, which is not the first one again")

    @property
    def _sums(self) -> "dict[int, Sum]":
        """Round → the sum for which this site has revealed shares."""
        if not self._summed.exists():
            return {}
        try:
            return Sums.model_validate_json(self._summed.read_text()).rounds
        except (ValidationError, ValueError, OSError) as error:
            raise FlapsamError(f"{self._summed}: cannot read which sites were summed; start a new run") from error

    @property
    def _summed(self) -> Path:
        return self.folder / "summed.json"

    @property
    def _current(self) -> Attempt:
        attempt = self._known
        if attempt is None:
            raise PacketRefused("it has not opened a round")
        return attempt

    def _attempt(self, number: int) -> Attempt:
        attempt = self._current
        if attempt.round != number or not attempt.roster:
            raise PacketRefused(f"it has sent no roster of round {number}")
        return attempt

    def _masked_with(self, attempt: Attempt) -> list[str]:
        if not attempt.masked:
            raise PacketRefused("it asks for the end of a round that this site has not answered")
        return self._masking(attempt, self._roster(attempt), attempt.envelopes.encode())

    def _roster(self, attempt: Attempt) -> Roster:
        return read(attempt.roster.encode(), Roster)

    @property
    def _known(self) -> Attempt | None:
        path = self.folder / "attempt.json"
        if not path.exists():
            return None
        try:
            return Attempt.model_validate_json(path.read_text())
        except (ValidationError, ValueError, OSError) as error:
            raise FlapsamError(f"{path}: cannot read the secrets of this round; start a new run") from error

    def _keep(self, attempt: Attempt) -> None:
        make_folder(self.folder)
        write_text(self.folder / "attempt.json", attempt.model_dump_json())


class Sum(BaseModel):
    """A sum for which a site has revealed shares."""

    sites: list[str]
    coding: str
    """SHA-256 of the shares, the ranges and the number of bits."""


class Sums(BaseModel):
    """The sums of a run, by round."""

    rounds: dict[int, Sum]


def _check_shares(roster: Roster) -> None:
    """Check that every site of the roster is hidden by the others, as ``capped`` sees to.

    A site must see to it for the others, too, because its shares of their secrets reveal the sum.
    """
    bits = 0
    with suppress(ValueError):
        bits = Ring.of(roster.shares.values()).bits
    if bits != roster.bits:
        raise PacketRefused("its roster gives a site too few levels, so that its change would hide nobody's, or too many")
    if any(cut < (1 - 1e-9) * roster.shares[site] for site, cut in capped(roster.shares).items()):
        raise PacketRefused("its roster has a site that counts for more than the others that hide it")
    if sum(roster.shares.values()) > 1 + 1e-9:
        raise PacketRefused("its roster has shares of more than 1 in sum")


def capped(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares with which no site of a sum counts for more than the sites that hide it.

    In the worst case, as many sites as may drop out do so, and just under a third of all work with the server. Each share
    is cut to the sum of the smallest shares of as many other sites as are left then.

    Args:
        shares: the shares of the sites of a roster, above 0.
    """
    count = len(shares)
    hiding = max(threshold(count) - 1 - (count - 1) // 3, 1)
    result = dict(shares)
    for _ in shares:
        before = dict(result)
        for site in sorted(result, key=lambda name: (-result[name], name)):
            others = sorted(share for other, share in result.items() if other != site)
            result[site] = min(result[site], sum(others[:hiding]))
        if result == before:
            break
    return result


def common_mask_key(private: bytes, site: str, other: Keys, roster: str) -> bytes:
    """The key of the mask that two sites have in common.

    Args:
        private: a site's private mask key.
        site: that site.
        other: the other site's public keys.
        roster: SHA-256 of the roster.

    Raises:
        PacketRefused: the other's key is not safe, such as 0.
    """
    first, second = sorted((site, other.site))
    return _common(private, other.mask_key, f"flapsam mask {roster} {json.dumps([first, second])}", other.site)


def envelope_key(private: bytes, other: Keys, sender: str, receiver: str, roster: str) -> bytes:
    """The key of an envelope from one site to another, for either of the two.

    Raises:
        PacketRefused: the other's key is not safe, such as 0.
    """
    return _common(private, other.envelope_key, f"flapsam envelope {roster} {json.dumps([sender, receiver])}", other.site)


def _common(private: bytes, public: str, purpose: str, site: str) -> bytes:
    try:
        return crypto.common(private, bytes.fromhex(public), purpose)
    except ValueError as error:
        raise PacketRefused(f"the key of {site} is not a safe one") from error
