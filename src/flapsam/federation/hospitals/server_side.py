"""The server's side of a run between hospitals, whatever the engine: who takes part, the rounds, and the adapter."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flapsam.adapters.card import write_model_card
from flapsam.adapters.store import save_adapter
from flapsam.base.errors import FlapsamError
from flapsam.base.files import alone, write_text
from flapsam.federation.agreement import VALIDATION
from flapsam.federation.hospitals.handshake import REASONS, Presence, Proposal, differences, read_message
from flapsam.federation.packets import HEADER_BYTES
from flapsam.federation.preparation import agree, assembled_for, card_of
from flapsam.federation.rounds import Carry, deliver, rounds
from flapsam.federation.server import Server
from flapsam.federation.shares import TrainingSize, client_shares
from flapsam.federation.state import ServerState
from flapsam.run.config import RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER, Delivered, Event, Fitted, Ledger, RunEnded, SiteExcluded, SiteJoined
from flapsam.run.reading import read_config


@dataclass(frozen=True)
class SiteSize(TrainingSize):
    """What a site brought when it first took part. It cannot bring more later."""

    modalities: int


class ServerSide:
    """Runs the server's part of one run whose folder has been begun. Only one process does at a time; others wait."""

    def __init__(self, folder: Path) -> None:
        """Read the run.

        Args:
            folder: the run's folder.

        Raises:
            FlapsamError: the folder holds no run, or the run cannot be resumed.
        """
        self.folder = RunFolder(folder)
        if not self.folder.is_begun:
            raise FlapsamError(f"{folder}: there is no run here")
        self._lock = alone(self.folder.lock)
        self.config = read_config(self.folder.config)
        self.run: str = self.folder.read_environment()["run"]
        self.ledger = Ledger(self.folder.ledger)
        # The network itself is not needed after this.
        assembled = assembled_for(self.config)
        self.origin = assembled.origin
        self.agreement = agree(self.run, self.config, assembled.network)
        self.proposal = Proposal.of(self.run, self.config).model_dump_json().encode()
        self.known = self._read_known()
        self.held: dict[str, int] = {}
        """Site that takes part → rounds that its tensors include, or fewer where that is not known."""

    def admit(self, site: str, answer: bytes) -> None:
        """Let a site take part, or record in the ledger why it does not.

        Args:
            site: the name in the certificate that came with the answer.
            answer: the site's presence.
        """
        try:
            presence: Presence = read_message(Presence, answer)
        except FlapsamError as error:
            return self.exclude(site, str(error))
        modalities = next((size.modalities for size in self.known.values()), None)
        reason = differences(presence, self.agreement.contract.hash, self.origin.checksum, modalities)
        if reason:
            return self.exclude(site, reason)
        if site not in self.known:
            brought = SiteSize(presence.training_cases, presence.training_slices, presence.modalities)
            self.known = dict(sorted({**self.known, site: brought}.items()))
            write_text(self.folder.joined, json.dumps({name: asdict(size) for name, size in self.known.items()}))
        self.held[site] = presence.held
        self.ledger.write(SiteJoined(site=site, cases=presence.cases))

    def exclude(self, site: str, reason: str) -> None:
        """Record that a site does not take part.

        Args:
            site: its name.
            reason: a code of ``REASONS``, or a sentence.
        """
        self.ledger.write(SiteExcluded(cohort=TOGETHER, site=site, reason=REASONS.get(reason, reason)))

    def open(self) -> None:
        """Start or resume the algorithm, once all sites that take part have been admitted.

        Raises:
            FlapsamError: too few sites take part, or the state is damaged.
        """
        if len(self.held) < self.config.rounds.min_sites:
            few = f"{len(self.held)} sites take part, rounds.min_sites is {self.config.rounds.min_sites}"
            raise FlapsamError(f"{few}; the ledger has the reasons")
        state = ServerState(self.folder.server_state(TOGETHER))
        options = self.config.rounds
        if isinstance(options.weights, dict):
            # They are given for all sites, and some may not have joined yet.
            given = {name: weight for name, weight in options.weights.items() if name in self.known}
            options = options.model_copy(update={"weights": given})
        shares = client_shares(self.known, options)
        self.server = Server(self.agreement, shares, state, options=self.config.server, seed=self.config.seed)
        self.agreement = self.server.agreement = self.agreement.without_start()

    def packets(self, site: str) -> list[bytes]:
        """The packets that a site needs now."""
        return self.server.packets(site, self.held[site])

    def read_scores(self, answer: bytes) -> dict[str, float | None] | None:
        """A site's validation Dice from its JSON, or None if that is not right."""
        names = {VALIDATION + name for name in ("mean", *self.config.data.classes)}
        try:
            scores = json.loads(answer[:HEADER_BYTES])
            right = scores.keys() <= names and all(value is None or 0 <= float(value) <= 1 for value in scores.values())
            return scores if right else None
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None

    def train(self, carry: Carry, stopped: Callable[[], bool]) -> bool:
        """Run the rounds that are left, then deliver the result and write the adapter.

        Args:
            carry: the engine.
            stopped: asked after each round whether to end there.

        Returns:
            Whether the run is complete.

        Raises:
            FlapsamError: too few sites answered.
        """
        for _ in rounds(self.server, TOGETHER, self.config.rounds, carry, self._record):
            if stopped() and self.server.rounds_done < self.config.rounds.count:
                return False
        deliver(self.server, TOGETHER, carry, self._record)
        card = card_of(self.run, TOGETHER.mode, self.server.rounds_done, self._with_modalities(), self.origin)
        folder = self.folder.adapter(TOGETHER)
        save_adapter(folder, card, self.server.tensors)
        write_model_card(folder, card, TOGETHER, self.ledger.events())
        self.ledger.write(RunEnded())
        return True

    def _record(self, event: Event) -> None:
        if isinstance(event, Fitted | Delivered):
            # A site's answer is made from the packets that it received, so it has those.
            self.held[event.site] = self.server.rounds_done
        self.ledger.write(event)

    def _with_modalities(self) -> RunConfig:
        modalities = next(iter(self.known.values())).modalities
        samples = self.config.samples.model_copy(update={"modalities": modalities})
        return self.config.model_copy(update={"samples": samples})

    def _read_known(self) -> Mapping[str, SiteSize]:
        path = self.folder.joined
        if not path.exists():
            return {}
        try:
            return {name: SiteSize(**fields) for name, fields in json.loads(path.read_text()).items()}
        except (ValueError, TypeError) as error:
            raise FlapsamError(f"{path}: what the sites brought cannot be read; start a new run") from error
