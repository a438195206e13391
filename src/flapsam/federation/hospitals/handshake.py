"""What server and site tell each other before the first round, as JSON. Nothing in it is trusted before it is checked."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flapsam.base.errors import FlapsamError
from flapsam.base.version import __version__
from flapsam.run.config import RANDOM, RunConfig

REASONS: Mapping[str, str] = {
    "version": "it runs another version of flapsam",
    "configuration": "it cannot read the run's configuration",
    "strategy": "its own file does not accept the run's strategy",
    "aggregator": "its own file does not accept the run's aggregator",
    "rounds": "its own file allows fewer rounds than the run has",
    "cases": "it has fewer training cases than its own file asks for",
    "data": "its data or its own file are not right; its own log says what",
    "backbone": "it has not got the backbone's weights",
    "state": "what it kept of the run cannot be read; its own log says what",
    "packet": "it refused the packet; its own log says why",
    "died": "its fit has died, perhaps for want of memory",
    "error": "something went wrong there; its own log says what",
}
"""All that a site says of what went wrong: a code. The sentences are the receiver's."""

GONE = "it is gone"
"""What the ledger says of a site from which nothing is heard any more."""
HEX = r"^[0-9a-f]{32}$"
VERSION_PATTERN = "[0-9A-Za-z.+!-]{1,32}"
LIMIT = 1 << 20
"""Bytes of a message."""
LOCAL = ("output", "device", "threads", "bench")
LOCAL_DATA = ("path", "layout", "table", "simulated_sites", "sites", "unseen")
"""Fields of a run that are everyone's own, and never sent."""


class SiteFailed(Exception):  # noqa: N818 (it is told as a code)
    """A site does not do what it was asked for; the message is a code of ``REASONS``."""


class Message(BaseModel):
    """Strict, because it comes from outside."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Annotated[str, Field(pattern=f"^{VERSION_PATTERN}$")] = __version__
    """Of flapsam."""


class Proposal(Message):
    """The server's: a run."""

    run: Annotated[str, Field(pattern=HEX)]
    config: dict[str, Any]

    @classmethod
    def of(cls, run: str, config: RunConfig) -> "Proposal":
        """A run without what is the server's own."""
        tree = config.model_dump(mode="json", exclude=set(LOCAL))
        tree["data"] = {name: value for name, value in tree["data"].items() if name not in LOCAL_DATA}
        if tree["backbone"]["weights"] != RANDOM:
            del tree["backbone"]["weights"]
        return cls(run=run, config=tree)


class Presence(Message):
    """A site's answer: what it would take part with."""

    contract: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of names, shapes and start of all tensors and of how they are written."""
    backbone: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Checksum of the weights that stay."""
    modalities: Annotated[int, Field(ge=1, le=3)]
    cases: dict[Annotated[str, Field(pattern=r"^(train|val|test)$")], Annotated[int, Field(ge=0, lt=1 << 31)]]
    """By split."""
    training_cases: Annotated[int, Field(ge=1, lt=1 << 31)]
    """Before validation cases are held out."""
    training_slices: Annotated[int, Field(ge=1, lt=1 << 53)]
    held: Annotated[int, Field(ge=0, lt=1 << 31)]
    """Rounds that went into the tensors that it has."""


def differences(presence: Presence, contract: str, backbone: str, modalities: int | None) -> str:
    """What keeps a site from taking part, in words; empty if nothing does."""
    found = []
    if presence.version != __version__:
        found.append(f"it runs flapsam {presence.version}, the server {__version__}")
    if presence.backbone != backbone:
        found.append(f"its backbone is another: checksum {presence.backbone[:12]}…, the server's {backbone[:12]}…")
    elif presence.contract != contract:
        found.append("it begins with other tensors than the server; are torch and transformers of the same version?")
    if modalities is not None and presence.modalities != modalities:
        found.append(f"its images have {presence.modalities} modalities, those of the others {modalities}")
    return "; ".join(found)


def read_message(kind: type["Proposal"] | type["Presence"], data: bytes) -> Any:
    """A message from its bytes.

    Raises:
        FlapsamError: it is not one.
    """
    try:
        if len(data) > LIMIT:
            raise ValueError
        return kind.model_validate_json(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise FlapsamError(f"a message that is no {kind.__name__.lower()}") from error


def version_in(data: bytes) -> str | None:
    """The version in a message that may be of another one."""
    found = re.search(rf'"version":\s*"({VERSION_PATTERN})"'.encode(), data[:LIMIT])
    return found[1].decode() if found else None
