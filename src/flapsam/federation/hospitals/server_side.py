"""The server's side of a run between hospitals on any engine: it admits sites, runs the rounds and writes the adapter."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Literal

from flapsam.adapters.card import write_model_card
from flapsam.adapters.store import save_adapter
from flapsam.base.errors import FlapsamError
from flapsam.base.files import alone, write_text
from flapsam.federation.borne import false_sites_borne
from flapsam.federation.hospitals.evaluation import adapters_of, tensors_for
from flapsam.federation.hospitals.handshake import (
    GONE,
    LIMIT,
    REASONS,
    Presence,
    Proposal,
    agreed_modalities,
    differences,
    read_message,
)
from flapsam.federation.packets import HEADER_BYTES
from flapsam.federation.preparation import agree, assembled_for, card_of, collector_of, first_range, has_own_adapters
from flapsam.federation.reported import read_scores
from flapsam.federation.rounds import Carry, Work, deliver, keep_own, rounds, test
from flapsam.federation.server import UNKNOWN, Server
from flapsam.federation.shares import TrainingSize, bounded, client_shares
from flapsam.federation.state import ServerState
from flapsam.learning.metrics import MEASURES
from flapsam.run.config import RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import (
    TOGETHER,
    AnswerAwaited,
    AnswerMissing,
    CountBounded,
    Delivered,
    Event,
    Fitted,
    Ledger,
    RunEnded,
    SiteExcluded,
    SiteJoined,
    SiteTested,
)
from flapsam.run.site_scores import SiteScores

ONCE: Mapping[str, type[Delivered | SiteTested]] = {"validate": Delivered, "test": SiteTested}
"""Work that a site does once, after the last round → the event that says that it has."""
TIMES_BEFORE = 3
"""How many times its longest fit a site may take, if that is longer than the deadline, and at most how many deadlines."""


@dataclass(frozen=True)
class SiteSize(TrainingSize):
    """A site's training size when it first took part. It keeps this size, so its weight cannot grow later."""

    modalities: int
    """Number of modalities of the site's images."""


class ServerSide:
    """The server's side of one run, whose folder must exist already. Only one process uses it at a time. Others wait."""

    def __init__(self, folder: Path) -> None:
        """Read the run from its folder.

        Args:
            folder: the run's folder.

        Raises:
            FlapsamError: the folder holds no run, or the run cannot be resumed.
        """
        self.folder = RunFolder(folder)
        if not self.folder.is_begun:
            raise FlapsamError(f"{folder}: there is no run here")
        self._lock = alone(self.folder.lock)
        self.config = self.folder.read_config()
        self.run: str = self.folder.read_environment()["run"]
        self.ledger = Ledger(self.folder.ledger)
        # The network is dropped after this, because the server only needs its tensors.
        assembled = assembled_for(self.config)
        self.origin = assembled.origin
        self.agreement = agree(self.run, self.config, assembled.network)
        self.proposal = Proposal.of(self.run, self.config).model_dump_json().encode()
        self.known = self._read_known()
        self.present: dict[str, Presence] = {}
        """Each site's first valid answer to the proposal."""
        self.held: dict[str, int] = {}
        """Sites that take part, each with the last round that its tensors are known to include."""
        self.slowest: dict[str, float] = {}
        """Site → seconds from the request to the answer of its longest fit in this job, as the server measured them."""
        self.excluded: dict[str, str] = {}
        """Site → reason why it does not take part in this job."""

    def admit(self, site: str, answer: bytes) -> None:
        """Let a site take part, or record in the ledger why it does not. Only its first answer counts.

        Args:
            site: the site's name, from the certificate that came with the answer.
            answer: the site's presence message.
        """
        if site in self.present:
            return
        try:
            presence: Presence = read_message(Presence, answer)
        except FlapsamError as error:
            return self.exclude(site, str(error))
        reason = differences(presence, self.agreement.contract.hash, self.origin.checksum)
        if reason:
            return self.exclude(site, reason)
        self.present[site] = presence

    def exclude(self, site: str, reason: str) -> None:
        """Record that a site does not take part.

        Args:
            site: the site's name.
            reason: a code of ``REASONS``, or a sentence.
        """
        self.excluded[site] = REASONS.get(reason, reason)
        self.ledger.write(SiteExcluded(cohort=TOGETHER, site=site, reason=self.excluded[site]))

    def open(self) -> None:
        """Start or resume the algorithm. Call it once all sites that take part have been admitted.

        Raises:
            FlapsamError: too few sites take part, or the saved state is damaged.
        """
        self._join()
        self._check_required()
        if len(self.held) < self.config.rounds.min_sites:
            few = f"{len(self.held)} of at least {self.config.rounds.min_sites} (rounds.min_sites)"
            raise FlapsamError(f"too few sites take part: {few}; see the ledger for the reasons")
        options = self.config.rounds
        state = ServerState(self.folder.server_state(TOGETHER), options.keep)
        if state.shared is not None:
            # A later number may stand for a result that the run dropped when it went back.
            self.held = {site: held if held <= state.shared else UNKNOWN for site, held in self.held.items()}
        if isinstance(options.weights, dict):
            # The weights are for all sites of the federation, and some may not have joined yet.
            weights = {name: weight for name, weight in options.weights.items() if name in self.known}
            options = options.model_copy(update={"weights": weights})
        shares = client_shares(self._bounded(), options)
        self.server = Server(
            self.agreement,
            shares,
            state,
            options=self.config.server,
            seed=self.config.seed,
            max_change=options.max_change,
            classes=self.config.data.classes,
            collector=collector_of(self.run, self.config, state, shares),
            first_range=first_range(self.config),
        )
        count = sum(shares[site] > 0 for site in self.held)
        if options.count and (event := false_sites_borne(self.config, count, options.min_sites)):
            self.ledger.write(event)
        self.agreement = self.server.agreement = self.agreement.without_start()

    def _check_required(self) -> None:
        """Check that all required sites take part."""
        for site in self.config.rounds.named:
            if site not in self.held:
                reason = self.excluded.get(site, "it was not connected")
                raise FlapsamError(f"{site} is required (rounds.require) and does not take part: {reason}")

    def share(self, site: str) -> float | None:
        """A site's share of the training cases of all sites that take part.

        It is None before they are known, and in a private run, in which no counts leave a site.
        """
        known = {name: size.cases for name, size in self.known.items() if name in self.held}
        if self.config.privacy or site not in known:
            return None
        return round(known[site] / sum(known.values()), 4)

    def patience(self, site: str) -> float:
        """Seconds to wait for a site's answer; without end for a site that is required."""
        if site in self.config.rounds.named:
            return inf
        deadline = self.config.rounds.deadline
        return max(deadline, TIMES_BEFORE * min(self.slowest.get(site, 0.0), deadline))

    def took(self, site: str, seconds: float) -> None:
        """Note how long a site took for a fit. It is measured here, because a site could claim anything."""
        self.slowest[site] = max(self.slowest.get(site, 0.0), seconds)

    def await_answer(self, work: Work | Literal["join"], site: str, seconds: float, left: float) -> None:
        """Record that a site is still waited for.

        Args:
            work: what the site was asked to do.
            site: the site's name.
            seconds: seconds since then.
            left: seconds until the run continues without it; infinite if it is required.
        """
        number = 0 if work == "join" else self.server.rounds_done + (work in ("fit", "agree"))
        about = {"seconds": round(seconds, 1), "left": None if left == inf else round(left, 1), "share": self.share(site)}
        self.ledger.write(AnswerAwaited(cohort=TOGETHER, round=number, site=site, work=work, **about))

    def packets(self, site: str, work: Work) -> list[bytes]:
        """The packets that a site needs for some work, oldest first."""
        return self.server.packets(site, self.held[site], work)

    def asked(self, work: Work) -> list[str]:
        """The sites that have a part in some work."""
        if work in ONCE:
            done = self._reached(ONCE[work])
            return [site for site in self.held if site not in done]
        return [site for site in self.held if work not in ("fit", "agree") or self.server.asks(site)]

    def read_scores(self, answer: bytes) -> dict[str, float | None] | None:
        """Read a site's validation Dice from JSON. None if the JSON is invalid."""
        try:
            return read_scores(json.loads(answer[:HEADER_BYTES]), self.config.data.classes)
        except (ValueError, RecursionError):
            return None

    def read_tested(self, site: str, answer: bytes) -> SiteScores | None:
        """Read a site's test scores from JSON. None if the site tells none.

        Raises:
            ValueError: the JSON is invalid, or its scores cannot be those of the site.
        """
        if not answer:
            return None
        scores = SiteScores.model_validate_json(answer, strict=True) if len(answer) <= LIMIT else None
        if scores is None or not self._may_be(site, scores):
            raise ValueError("its test scores are invalid")
        return scores

    def _may_be(self, site: str, scores: SiteScores) -> bool:
        """Whether scores are of what the run scores, possible, and over no more cases than the site said that it has."""
        evaluation, classes = self.config.evaluation, self.config.data.classes
        known = {*classes, *evaluation.regions, *evaluation.means}
        if not (set(scores.names()) <= known and scores.measures.keys() <= MEASURES.keys()):
            return False
        shares = [*scores.means.values(), *([scores.mean] if scores.mean else [])]
        highest = [(figures, 1.0) for figures in shares]
        for measure, named in scores.measures.items():
            highest += [(figures, MEASURES[measure].highest) for figures in named.values()]
        counts = [figures.patients for figures, _ in highest]
        counts += [scores.difference.patients] if scores.difference else []
        counts += [count for count in (*scores.missed.values(), *scores.spurious.values()) if count is not None]
        most = self.present[site].cases["test"] if site in self.present else 0
        return (
            scores.patients <= scores.cases <= most
            and max(counts, default=0) <= scores.patients
            and all(
                value <= limit
                for figures, limit in highest
                for value in (figures.mean, figures.deviation or 0.0, *(figures.quartiles or []))
            )
        )

    def train(self, carry: Carry, stopped: Callable[[], bool]) -> bool:
        """Run the remaining rounds, deliver the result to the sites and write the adapter.

        Args:
            carry: the engine.
            stopped: called after each round. If it returns true, training ends there.

        Returns:
            True if the run is complete, False if it was stopped before.

        Raises:
            FlapsamError: too few sites answered in a round.
        """
        if self.config.rounds.count == 0:
            return self._evaluate(carry)
        for _ in rounds(self.server, TOGETHER, self.config.rounds, carry, self._record):
            if stopped() and self.server.rounds_done < self.config.rounds.count:
                return False
        deliver(self.server, TOGETHER, carry, self._record)
        self._check_reached(Delivered, "has not received the adapter")
        card = card_of(self.run, TOGETHER.mode, self.server.rounds_done, self._with_modalities(), self.origin)
        folder = self.folder.adapter(TOGETHER)
        save_adapter(folder, card, {**self.agreement.personal, **self.server.tensors})
        if has_own_adapters(self.config):
            keep_own(self.server, TOGETHER, carry, self._record)
        test(self.server, TOGETHER, carry, self._record)
        self._check_reached(SiteTested, "has not scored the adapter")
        write_model_card(folder, card, TOGETHER, self.ledger.events())
        self.ledger.write(RunEnded())
        return True

    def _reached(self, kind: type[Delivered | SiteTested]) -> set[str]:
        """The sites that have received or scored the result of the last round."""
        number = self.server.rounds_done
        return {e.site for e in self.ledger.events() if isinstance(e, kind) and e.round == number}

    def _check_reached(self, kind: type[Delivered | SiteTested], problem: str) -> None:
        """Check that no required site is gone before the run ends. One that answers that it cannot do it is in the ledger.

        Raises:
            FlapsamError: a required site is gone. The next job asks it again.
        """
        last = {e.site: e.reason for e in self.ledger.events() if isinstance(e, AnswerMissing)}
        reached = self._reached(kind)
        for site in self.config.rounds.named:
            if site in self.held and site not in reached and last.get(site) == GONE:
                raise FlapsamError(f"{site} is required (rounds.require) and {problem}, because {GONE}")

    def _evaluate(self, carry: Carry) -> bool:
        """Have the sites test the adapters of an evaluation, one after another.

        Raises:
            FlapsamError: no site has answered.
        """
        for number, path in enumerate(adapters_of(self.folder), start=1):
            if number > self.server.rounds_done:
                self.server.place(tensors_for(path, self.server.tensors))
            if number == self.server.rounds_done:
                test(self.server, TOGETHER, carry, self._record)
        if not any(isinstance(event, SiteTested) for event in self.ledger.events()):
            raise FlapsamError("no site has tested an adapter; see the ledger for the reasons")
        self.ledger.write(RunEnded())
        return True

    def _record(self, event: Event) -> None:
        if isinstance(event, Fitted | Delivered | SiteTested):
            # A site answers only after it has read its packets, so it now has these tensors.
            self.held[event.site] = self.server.rounds_done
        self.ledger.write(event)

    def _join(self) -> None:
        """Let those sites take part whose images have as many modalities as most sites' images have."""
        sizes = {
            site: SiteSize(presence.training_cases, presence.training_slices, presence.modalities)
            for site, presence in self.present.items()
        }
        counts = {**{site: size.modalities for site, size in self.known.items()}, **{s: sizes[s].modalities for s in sizes}}
        self._modalities = agreed_modalities(counts.values(), self.config.samples.modalities)
        for site, presence in sorted(self.present.items()):
            if presence.modalities != self._modalities:
                own, most = presence.modalities, self._modalities
                self.exclude(site, f"its images have {own} modalities, most sites' have {most}")
                continue
            if site not in self.known:
                self.known = dict(sorted({**self.known, site: sizes[site]}.items()))
            self.held[site] = presence.held
            self.ledger.write(SiteJoined(site=site, cases={str(split): count for split, count in presence.cases.items()}))
        write_text(self.folder.joined, json.dumps({name: asdict(size) for name, size in self.known.items()}))

    def _bounded(self) -> dict[str, SiteSize]:
        """The sites' sizes, of which implausibly large ones count only in part."""
        sizes = bounded(self.known, self.config.rounds)
        unit = self.config.rounds.weights
        for site, size in sizes.items():
            if size != self.known[site] and unit in ("slices", "cases"):
                claimed, counted = getattr(self.known[site], unit), getattr(size, unit)
                self.ledger.write(CountBounded(cohort=TOGETHER, site=site, unit=unit, claimed=claimed, counted=counted))
        return sizes

    def _with_modalities(self) -> RunConfig:
        samples = self.config.samples.model_copy(update={"modalities": self._modalities})
        return self.config.model_copy(update={"samples": samples})

    def _read_known(self) -> Mapping[str, SiteSize]:
        path = self.folder.joined
        if not path.exists():
            return {}
        try:
            return {name: SiteSize(**fields) for name, fields in json.loads(path.read_text()).items()}
        except (ValueError, TypeError) as error:
            raise FlapsamError(f"{path}: cannot read the sites' sizes; start a new run") from error
