"""The server's side of a run between hospitals, whatever the engine: who takes part, the rounds, and what comes of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flapsam.adapter import save_adapter
from flapsam.config import RunConfig, read_config
from flapsam.errors import FlapsamError
from flapsam.federation.conduct import Carry, deliver, rounds
from flapsam.federation.folder import DESCRIPTION, LEDGER, LOCK, is_begun, read_identity
from flapsam.federation.handshake import REASONS, Presence, Proposal, differences, read_message
from flapsam.federation.ledger import TOGETHER, Ledger, read_ledger
from flapsam.federation.packets import HEADER_BYTES
from flapsam.federation.preparation import agree, assembled_for, card_of
from flapsam.federation.rounds import VALIDATION, Server
from flapsam.federation.state import ServerState
from flapsam.federation.weights import TrainingSize, client_weights
from flapsam.files import alone, write_text
from flapsam.model_card import model_card


@dataclass(frozen=True)
class Brought(TrainingSize):
    """What a site brought when it first took part; it cannot bring more later."""

    modalities: int


class Coordinator:
    """Conducts one run whose folder was begun. Only one process does at a time; others wait."""

    def __init__(self, folder: Path) -> None:
        """Read the run.

        Args:
            folder: of the run.

        Raises:
            FlapsamError: the folder holds no run, or it cannot be gone on with.
        """
        if not is_begun(folder):
            raise FlapsamError(f"{folder}: there is no run here")
        self.folder = folder
        self._lock = alone(folder / "state" / LOCK)
        self.config = read_config(folder / DESCRIPTION)
        self.run: str = read_identity(folder)["run"]
        self.ledger = Ledger(folder / LEDGER)
        # The network itself is not needed any more then.
        assembled = assembled_for(self.config)
        self.origin = assembled.origin
        self.agreement = agree(self.run, self.config, assembled.network)
        self.proposal = Proposal.of(self.run, self.config).model_dump_json().encode()
        self.known = self._read_known()
        self.held: dict[str, int] = {}
        """Rounds that went into what each site that takes part now has; or fewer, if it is not known."""

    def record(self, event: str, **fields: Any) -> None:
        """Write an event of this federation."""
        self.ledger.write(event, federation=TOGETHER, **fields)

    def admit(self, site: str, answer: bytes) -> None:
        """Let a site take part, or say in the ledger why it does not.

        Args:
            site: whose certificate came with the answer.
            answer: its presence.
        """
        try:
            presence: Presence = read_message(Presence, answer)
        except FlapsamError as error:
            return self.exclude(site, str(error))
        modalities = next((known.modalities for known in self.known.values()), None)
        reason = differences(presence, self.agreement.contract.hash, self.origin.checksum, modalities)
        if reason:
            return self.exclude(site, reason)
        if site not in self.known:
            brought = Brought(presence.training_cases, presence.training_slices, presence.modalities)
            self.known = dict(sorted({**self.known, site: brought}.items()))
            write_text(self._known_path, json.dumps({name: asdict(one) for name, one in self.known.items()}))
        self.held[site] = presence.held
        self.ledger.write("site", site=site, cases=presence.cases)

    def exclude(self, site: str, reason: str) -> None:
        """Say that a site does not take part.

        Args:
            site: its name.
            reason: a code of ``REASONS``, or a sentence.
        """
        self.record("excluded", site=site, reason=REASONS.get(reason, reason))

    def open(self) -> None:
        """Begin, or go on, when all that take part were admitted.

        Raises:
            FlapsamError: they are too few, or the state is damaged.
        """
        if len(self.held) < self.config.rounds.min_sites:
            few = f"{len(self.held)} sites take part, rounds.min_sites is {self.config.rounds.min_sites}"
            raise FlapsamError(f"{few}; see the ledger for the reasons")
        state = ServerState(self.folder / "state" / TOGETHER / "server")
        options = self.config.rounds
        if isinstance(options.weights, dict):
            # Given for all, and some may not be there yet.
            given = {name: weight for name, weight in options.weights.items() if name in self.known}
            options = options.model_copy(update={"weights": given})
        weights = client_weights(self.known, options)
        self.server = Server(self.agreement, weights, state, options=self.config.server, seed=self.config.seed)
        self.agreement = self.server.agreement = self.agreement.without_start()

    def packets(self, site: str) -> list[bytes]:
        """What a site needs now."""
        return self.server.packets(site, self.held[site])

    def read_scores(self, answer: bytes) -> dict[str, float | None] | None:
        """A site's validation Dice from its JSON; None if that is not right."""
        names = {VALIDATION + name for name in ("mean", *self.config.data.classes)}
        try:
            scores = json.loads(answer[:HEADER_BYTES])
            right = scores.keys() <= names and all(one is None or 0 <= float(one) <= 1 for one in scores.values())
            return scores if right else None
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None

    def conduct(self, carry: Carry, stopped: Callable[[], bool]) -> bool:
        """All rounds that are left, and the delivery of what they gave.

        Args:
            carry: the engine.
            stopped: is asked after each round whether to end there.

        Returns:
            Whether all is done.

        Raises:
            FlapsamError: too few sites answered.
        """
        for _ in rounds(self.server, self.config.rounds, carry, self._recorded):
            if stopped() and self.server.rounds_done < self.config.rounds.count:
                return False
        deliver(self.server, carry, self._recorded)
        card = card_of(self.run, TOGETHER, self.server.rounds_done, self._with_modalities(), self.origin)
        save_adapter(self.folder / "adapter", card, self.server.tensors)
        write_text(self.folder / "adapter" / "README.md", model_card(card, TOGETHER, read_ledger(self.ledger.path)))
        self.ledger.write("end")
        return True

    def _recorded(self, event: str, **fields: Any) -> None:
        if event in ("fit", "delivery"):
            # What a site answers is made from what it got, so it has that.
            self.held[fields["site"]] = self.server.rounds_done
        self.record(event, **fields)

    def _with_modalities(self) -> RunConfig:
        modalities = next(iter(self.known.values())).modalities
        samples = self.config.samples.model_copy(update={"modalities": modalities})
        return self.config.model_copy(update={"samples": samples})

    @property
    def _known_path(self) -> Path:
        return self.folder / "state" / "sites.json"

    def _read_known(self) -> Mapping[str, Brought]:
        path = self._known_path
        if not path.exists():
            return {}
        try:
            return {name: Brought(**fields) for name, fields in json.loads(path.read_text()).items()}
        except (ValueError, TypeError) as error:
            raise FlapsamError(f"{path}: what is known of the sites cannot be read; start the run anew") from error
