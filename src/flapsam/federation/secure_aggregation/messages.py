"""The JSON messages of secure aggregation. Each is validated before it is used, because it comes from outside."""

import hashlib
import json
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from flapsam.federation.packets import PacketRefused
from flapsam.federation.secure_aggregation.ring import LEAST_RANGE, MOST_RANGE, Ring
from flapsam.run.config import LEAST_SECURE

Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{64})$")]
"""32 bytes: a key, a share, or a SHA-256."""
SiteName = Annotated[str, Field(min_length=1, max_length=256)]
Signature = Annotated[str, Field(pattern=r"^([0-9a-f]{128})$")]
Range = Annotated[float, Field(ge=LEAST_RANGE, le=MOST_RANGE)]
MOST_BYTES = 1 << 26
"""Largest size of a message."""
MOST_SITES = 10_000
Attempt = Annotated[int, Field(ge=1, lt=1 << 31)]


def _ascending(names: list[str]) -> list[str]:
    if names != sorted(set(names)):
        raise ValueError("names must be in order, each once")
    return names


Sites = Annotated[list[SiteName], Field(max_length=MOST_SITES), AfterValidator(_ascending)]


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def signed(self) -> bytes:
        """The bytes that a signature of this message is for: its class and everything in it but the signature."""
        content = self.model_dump(mode="json", exclude={"signature"})
        return f"flapsam {type(self).__name__} ".encode() + json.dumps(content, sort_keys=True).encode()


class Opening(Message):
    """Server to sites: a round begins."""

    kind: Literal["opening"] = "opening"
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    round: Annotated[int, Field(ge=1, lt=1 << 31)]
    attempt: Attempt
    """Counts all attempts at rounds of the run from 1."""


class Keys(Message):
    """Site to server: its public keys for a round, signed with its identity."""

    kind: Literal["keys"] = "keys"
    run: str
    round: int
    attempt: Attempt
    site: SiteName
    asked: Hex
    """SHA-256 of what the run asks of every site. Otherwise, the others could be asked to change nothing."""
    mask_key: Hex
    """Public X25519 key from which the masks of two sites follow."""
    envelope_key: Hex
    """Public X25519 key with which others seal their shares for this site."""
    least: Annotated[int, Field(ge=LEAST_SECURE)]
    """Least number of sites in a sum that this site takes part in. The others see to it, too."""
    seed_digest: Hex
    """SHA-256 of the seed of the site's own mask."""
    identity: Hex
    """The site's public Ed25519 key. The others have exchanged it beforehand, without the server."""
    signature: Signature


class Offer(Message):
    """Site to server: its keys, and whom it accepts, so that the server can leave out whom the others would refuse."""

    kind: Literal["offer"] = "offer"
    keys: Keys
    partners: dict[SiteName, Hex]
    """Site → its public key, as this site has been told it."""


class Roster(Message):
    """Server to sites: who takes part in a round, and how changes become whole numbers."""

    kind: Literal["roster"] = "roster"
    keys: Annotated[list[Keys], Field(min_length=1, max_length=MOST_SITES)]
    start: Hex
    """SHA-256 of the tensors that training begins with. If the others were sent tensors with which they change nothing, the
    sum would be one site's change (Pasquini et al. 2022, arXiv 2111.07380)."""
    bits: Annotated[int, Field(ge=8, le=24)]
    shares: dict[SiteName, Annotated[float, Field(ge=1e-7, le=1)]]
    """Site → its share in the mean."""
    ranges: dict[Annotated[str, Field(max_length=256)], Range]
    """Tensor → range of its change."""

    @property
    def ring(self) -> Ring:
        """The ring of the whole numbers."""
        return Ring(self.bits)

    @property
    def coding(self) -> str:
        """SHA-256 of how changes become whole numbers, and how much each counts."""
        return digest(json.dumps([self.bits, self.shares, self.ranges], sort_keys=True).encode())


class Shares(Message):
    """Site to server: shares of its secrets for every other site, sealed."""

    kind: Literal["shares"] = "shares"
    roster: Hex
    """SHA-256 of the roster."""
    site: SiteName
    sealed: dict[SiteName, Base64Bytes]
    """Other site → a share of this site's private mask key and one of its seed, sealed for that site."""


class Envelopes(Message):
    """Server to a site: the shares that the others sealed for it."""

    kind: Literal["envelopes"] = "envelopes"
    roster: Hex
    sealed: dict[SiteName, Base64Bytes]


class Answered(Message):
    """Server to sites: whose masked changes arrived."""

    kind: Literal["answered"] = "answered"
    roster: Hex
    sites: Sites


class Confirmation(Message):
    """Site to server: it has seen these lists. Signed with its identity."""

    kind: Literal["confirmation"] = "confirmation"
    roster: Hex
    site: SiteName
    masking: Sites
    """Sites whose shares arrived, so that they masked with each other."""
    answered: Sites
    """Sites whose masked changes arrived."""
    signature: Signature


class Confirmations(Message):
    """Server to sites: the other sites' confirmations."""

    kind: Literal["confirmations"] = "confirmations"
    roster: Hex
    signatures: dict[SiteName, Signature]


class Revealed(Message):
    """Site to server: shares of the seeds of sites that answered, and of the mask keys of sites that did not."""

    kind: Literal["revealed"] = "revealed"
    roster: Hex
    site: SiteName
    shares: dict[SiteName, Hex]


M = TypeVar("M", bound=Message)


def written(message: Message) -> bytes:
    """A message as JSON."""
    return message.model_dump_json().encode()


def read(data: bytes, kind: type[M]) -> M:
    """Read a message of a kind.

    Raises:
        PacketRefused: it is not one.
    """
    try:
        if len(data) > MOST_BYTES:
            raise ValueError
        return kind.model_validate_json(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise PacketRefused(f"its message is not valid as {kind.__name__.lower()}") from error


def kind_of(data: bytes) -> str:
    """The kind that a message says it is; empty if it says none."""
    try:
        kind = json.loads(data).get("kind")
        return kind if isinstance(kind, str) else ""
    except (ValueError, AttributeError, RecursionError):
        return ""


def digest(data: bytes) -> str:
    """SHA-256 of a message."""
    return hashlib.sha256(data).hexdigest()


def threshold(sites: int) -> int:
    """How many of the sites that sent keys must take part in every step: more than two thirds, and at least three.

    Two sets of so many sites have more than a third of all in common, so a server that deceives needs more than a third of
    the sites on its side (Bonawitz et al. 2017, section 6.2).
    """
    return max(LEAST_SECURE, 2 * sites // 3 + 1)
