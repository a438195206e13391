"""The JSON messages that server and site exchange before the first round. Every message is validated before it is used."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flapsam.base.errors import FlapsamError
from flapsam.base.version import __version__
from flapsam.run.config import RANDOM, SPLITS, RunConfig, Split

REASONS: Mapping[str, str] = {
    "version": "it runs another version of flapsam",
    "configuration": "it cannot read the run's configuration",
    "strategy": "its configuration does not allow the run's strategy",
    "aggregator": "its configuration does not allow the run's aggregator",
    "rounds": "its configuration allows fewer rounds than the run has",
    "bounds": "its configuration does not allow the run's settings; see the site's own log",
    "memory": "training needs more memory than its configuration allows",
    "privacy": "its limit on differential privacy does not allow the run; see the site's own log",
    "secure": "it does not take part in secure aggregation as asked; see the site's own log",
    "cases": "it has fewer training cases than its configuration requires",
    "data": "its data or its configuration is invalid; see the site's own log",
    "backbone": "it does not have the backbone's weights",
    "state": "it cannot read its saved state of the run; see the site's own log",
    "packet": "it refused the server's packet; see the site's own log",
    "died": "its training process died, possibly because memory ran out",
    "error": "an unexpected error occurred; see the site's own log",
}
"""Sentence for each code. A site reports a failure as a code only. The server turns the code into the sentence."""

GONE = "it is gone"
"""Reason in the ledger for a site that has fallen silent. Existing ledgers contain this text, so it must not change."""
HEX = r"^[0-9a-f]{32}$"
VERSION_PATTERN = "[0-9A-Za-z.+!-]{1,32}"
LIMIT = 1 << 20
"""Maximum size of a message in bytes."""
MOST_CASES, MOST_SLICES = 10**7, 10**10
"""Largest numbers of cases and slices that a site may claim to have."""
LOCAL = ("output", "device", "threads", "bench", "notes")
"""Fields of a run that each participant sets for itself. They are never sent."""
LOCAL_ROUNDS = ("require",)
"""Fields of ``rounds`` that are the coordinator's alone, and may change when a run is resumed. They are never sent."""
LOCAL_DATA = ("path", "layout", "table", "simulated_sites", "sites", "unseen", "training_cases")
"""Fields of ``data`` that each participant sets for itself. They are never sent either."""


class SiteFailed(Exception):  # noqa: N818 (it is reported as a code)
    """A site could not do what it was asked. The message is a code of ``REASONS``."""


class Message(BaseModel):
    """Base of all messages. Validation is strict, because they come from outside."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Annotated[str, Field(pattern=f"^{VERSION_PATTERN}$")] = __version__
    """Version of flapsam that the sender runs."""


class Proposal(Message):
    """The run that the server proposes to the sites."""

    run: Annotated[str, Field(pattern=HEX)]
    """The run's id."""
    config: dict[str, Any]
    """The run's configuration, without the fields in ``LOCAL``, ``LOCAL_DATA`` and ``LOCAL_ROUNDS``."""

    @classmethod
    def of(cls, run: str, config: RunConfig) -> "Proposal":
        """Propose a run, without the fields that are the server's own.

        Args:
            run: the run's id.
            config: the run's configuration.
        """
        tree = config.model_dump(mode="json", exclude=set(LOCAL))
        tree["data"] = {name: value for name, value in tree["data"].items() if name not in LOCAL_DATA}
        tree["rounds"] = {name: value for name, value in tree["rounds"].items() if name not in LOCAL_ROUNDS}
        if tree["backbone"]["weights"] != RANDOM:
            del tree["backbone"]["weights"]
        return cls(run=run, config=tree)


class Presence(Message):
    """A site's answer to a proposal: what it brings to the run."""

    contract: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of all tensors' names, shapes and initial values, and of the way they are encoded."""
    backbone: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Checksum of the frozen weights."""
    modalities: Annotated[int, Field(ge=1, le=3)]
    """Number of modalities of the site's images."""
    cases: dict[Split, Annotated[int, Field(ge=0, le=MOST_CASES)]]
    """Number of cases of every split; 0 in a private run, in which no counts leave a site."""
    training_cases: Annotated[int, Field(ge=1, le=MOST_CASES)]
    """Number of training cases, before validation cases are held out; 1 in a private run."""
    training_slices: Annotated[int, Field(ge=1, le=MOST_SLICES)]
    """Number of slices in these training cases; 1 in a private run."""
    held: Annotated[int, Field(ge=0, lt=1 << 31)]
    """Round of the newest global tensors that the site has received; 0 before the first."""

    @field_validator("cases")
    @classmethod
    def _complete(cls, value: dict[Split, int]) -> dict[Split, int]:
        if len(value) != len(SPLITS):
            raise ValueError(f"give a number for each of {', '.join(SPLITS)}")
        return value


def differences(presence: Presence, contract: str, backbone: str) -> str:
    """Describe what keeps a site from taking part. The text is empty if nothing does.

    Args:
        presence: the site's answer.
        contract: hash of the server's contract.
        backbone: checksum of the server's backbone.
    """
    reasons = []
    if presence.version != __version__:
        reasons.append(f"it runs flapsam {presence.version}, the server runs {__version__}")
    if presence.backbone != backbone:
        reasons.append(f"its backbone differs: checksum {presence.backbone[:12]}…, the server's {backbone[:12]}…")
    elif presence.contract != contract:
        reasons.append("its initial tensors differ from the server's; compare the versions of torch and transformers")
    return "; ".join(reasons)


def agreed_modalities(counts: Iterable[int], configured: int) -> int:
    """The number of modalities of most sites. Of equally frequent numbers, the configured one, or else the smallest.

    Args:
        counts: number of modalities at each site.
        configured: ``samples.modalities`` of the run.
    """
    votes = Counter(counts)
    return min(votes, key=lambda number: (-votes[number], number != configured, number), default=configured)


def read_message(kind: type["Proposal"] | type["Presence"], data: bytes) -> Any:
    """Parse and validate a message.

    Args:
        kind: class of the message.
        data: the message as JSON.

    Returns:
        The message, an instance of ``kind``.

    Raises:
        FlapsamError: the bytes are not a valid message of this kind.
    """
    try:
        if len(data) > LIMIT:
            raise ValueError
        return kind.model_validate_json(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise FlapsamError(f"the {kind.__name__.lower()} message is invalid") from error


def version_in(data: bytes) -> str | None:
    """Find flapsam's version in a message, even if another version wrote it. None if there is none."""
    match = re.search(rf'"version":\s*"({VERSION_PATTERN})"'.encode(), data[:LIMIT])
    return match[1].decode() if match else None
