"""The client's side of the federated algorithm: a site turns the server's packets into an answer of its own."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.base.randomness import Randomness, SystemRandomness
from flapsam.base.seeds import seed_for
from flapsam.federation.agreement import SERVER, VALIDATION, Agreement, changed, cut, padded
from flapsam.federation.packets import Contract, Header, PacketRefused, checksum, decode, encode, encode_lossy, seal
from flapsam.federation.privacy.accounting import planned
from flapsam.federation.privacy.budget import Budget
from flapsam.federation.shares import rounded
from flapsam.federation.state import ClientState
from flapsam.learning.inference import predict_stack
from flapsam.learning.metrics import CaseScores, score_case, summarise
from flapsam.learning.prepared import PreparedCase
from flapsam.learning.private import fit_privately
from flapsam.learning.training import FIT_METRICS, ONE_ROUND, FitReport, Learner, fit, steps_a_round
from flapsam.run.config import RunConfig
from flapsam.sam import Sam, load_tensors, only_these_train, tensors_of

if TYPE_CHECKING:
    # It needs packages that only runs with secure aggregation need.
    from flapsam.federation.secure_aggregation.member import Member

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientData:
    """The cases that one site trains and validates on."""

    site: str
    train: Sequence[PreparedCase]
    val: Sequence[PreparedCase]


@dataclass(frozen=True)
class Disclosure:
    """What leaves a site besides its tensors."""

    losses: bool = True
    """Losses, steps and times of its fits."""
    scores: bool = True
    """Validation Dice."""
    exact_counts: bool = True
    """Exact numbers of slices, instead of rounded ones."""


NOTHING_ELSE = Disclosure(losses=False, scores=False, exact_counts=False)
"""Only the tensors leave."""

SHARED, PERSONAL, TRAINED_ON = "shared", "personal", "trained on"
"""Candidates for a site's own adapter: the shared tensors, those with its personal ones, and these trained further."""


@dataclass(frozen=True)
class Own:
    """The adapter that a site keeps for its own use."""

    kept: str
    """The chosen candidate."""
    dice: dict[str, float | None]
    """Candidate → its mean Dice on the site's validation cases."""
    tensors: dict[str, Tensor]


class Client:
    """A site's side of the algorithm."""

    def __init__(
        self,
        network: Sam,
        data: ClientData,
        config: RunConfig,
        agreement: Agreement,
        state: ClientState,
        *,
        disclosure: Disclosure | None = None,
        budget: Budget | None = None,
        randomness: Randomness | None = None,
        member: "Member | None" = None,
        check: Callable[[int, int], None] = lambda number, steps: None,
    ) -> None:
        """Start a run, or resume it from the saved state.

        Args:
            network: the network that the site trains.
            data: the site's cases.
            config: the run's configuration.
            agreement: what was agreed with the server.
            state: the site's folder.
            disclosure: what leaves the site besides its tensors. Everything by default, and nothing if the run is private.
            budget: the site's ledger of the privacy that was spent. A private run needs it.
            randomness: source of the noise of a private run. The operating system's by default.
            member: the site's side of secure aggregation. A run with it needs it.
            check: called before a fit, with the round's number and the steps done before. It may raise an error.
        """
        self.disclosure = disclosure or Disclosure()
        self.budget = budget
        self.randomness = randomness or SystemRandomness()
        self.member = member
        self.kept: bytes | None = None
        """The last answer, without masks."""
        if config.privacy:
            # Noise covers the tensors alone. Whatever else depends on the patients stays.
            self.disclosure = NOTHING_ELSE
        self.check = check
        self.network = network
        self.data = data
        self.config = config
        self.agreement = agreement
        self.state = state
        self.rank = agreement.rank(data.site)
        shapes = {name: tuple(tensor.shape) for name, tensor in agreement.personal.items()}
        self.personal_start = padded(cut(agreement.personal, self.rank), shapes)

    @property
    def held(self) -> int:
        """The round whose result this site holds; 0 for none. It tells the server which packets to send."""
        held = self.state.held()
        return held[0] if held else 0

    def fit(self, packets: Iterable[bytes], on_step: Callable[[], None] = lambda: None) -> bytes:
        """Take part in a round: validate the global tensors with this site's personal ones, train both, return the answer.

        A round that was already answered gets the same bytes again.

        Args:
            packets: the server's packets for this site, oldest first. With secure aggregation, the envelopes come last.
            on_step: called after every training step.

        Returns:
            The packet for the server.

        Raises:
            PacketRefused: a packet is damaged or is not what was agreed.
        """
        member, envelopes = self._member(), b""
        if member:
            *packets, envelopes = packets
        done, start = self._receive(packets)
        number = done + 1
        origin = checksum(start)
        if member:
            roster = member.begin(number, bytes(envelopes), origin)
            if roster.ranges.keys() != self.agreement.up(self.data.site, number).shapes.keys():
                raise PacketRefused("its roster does not give the range of every tensor")
        else:
            origin = origin[:16]
        self.kept = self.state.reply(number, origin)
        if self.kept is not None:
            return self._masked(number, self.kept, origin) if member else self.kept
        self.state.forget_from(number)
        metrics: dict[str, float | None] = {}
        if self.disclosure.scores and done > 0 and done % self.config.rounds.validate_every == 0:
            metrics |= self._scores()
        learner = Learner(self.network, self.config.training, self.config.rounds)
        if member:
            # A change depends on nothing that a server could have prepared at some sites and not at others.
            learner.steps = (number - 1) * steps_a_round(self.data.train, self.config.training, self.config.rounds)
        elif (moments := self.state.moments_before(number)) is not None:
            learner.load(moments)
        self.check(number, learner.steps)
        if self.config.training.moments == "reset":
            learner.reset_moments()
        contract = self.agreement.up(self.data.site, number)
        with only_these_train(self.network, {*contract.shapes, *self.agreement.personal}):
            report = (self._fit_privately if self.config.privacy else self._fit)(number, learner, on_step)
        result = cut(tensors_of(self.network, contract.shapes), self.rank)
        personal = tensors_of(self.network, self.agreement.personal)
        finite = all(tensor.isfinite().all() for tensor in (*result.values(), *personal.values()))
        if finite:
            learner.save(self.state.moments(number))
            if personal:
                self.state.keep_personal(number, personal)
        if self.disclosure.losses:
            metrics |= {name: float(getattr(report, name)) for name in FIT_METRICS}
        slices = report.slices if self.disclosure.exact_counts else rounded(report.slices)
        header = Header(
            run=self.agreement.run,
            round=number,
            base=done,
            sender=self.data.site,
            # A private fit's slices are those of the patients that happened to take part.
            samples=0 if self.config.privacy else slices,
            metrics=metrics,
        )
        if member:
            self.kept = self._change(header, {name: result[name] - start[name] for name in result})
        else:
            self.kept = self._answer(header, contract, start, result, keep_unsent=finite)
        self.state.commit(number, self.kept, origin)
        return self._masked(number, self.kept, origin) if member else self.kept

    def agree(self, packets: Iterable[bytes]) -> bytes:
        """Answer a message of secure aggregation.

        Args:
            packets: the server's message alone.

        Raises:
            PacketRefused: the message is invalid, or shows that the server or another site deceives.
            FlapsamError: the run has no secure aggregation.
        """
        member = self._member()
        if member is None:
            raise FlapsamError("the server asks for secure aggregation, but the run has none")
        (message,) = packets
        return member.answer(bytes(message))

    def validate(self, packets: Iterable[bytes]) -> dict[str, float | None]:
        """Score the global tensors, with this site's personal ones, on its validation cases.

        Args:
            packets: the server's packets for this site, oldest first.

        Returns:
            Dice of each class and their mean, with the prefix ``validation.``. Empty if the site does not send it.

        Raises:
            PacketRefused: a packet is damaged or is not what was agreed.
        """
        self._receive(packets)
        return self._scores() if self.disclosure.scores else {}

    def load(self, packets: Iterable[bytes]) -> int:
        """Load the shared adapter into the network: the global tensors, and personal ones as they started.

        Args:
            packets: the server's packets for this site, oldest first.

        Returns:
            The round whose result they are.

        Raises:
            PacketRefused: a packet is damaged or is not what was agreed.
        """
        number, _ = self._receive(packets)
        load_tensors(self.network, self.personal_start)
        return number

    def own(self, packets: Iterable[bytes]) -> Own:
        """Choose the adapter that this site keeps for its own use after the last round, by its validation cases.

        The candidates are the shared tensors, those with the site's personal ones, and these after ``rounds.last_epochs``
        local epochs more. The site keeps the one with the highest mean Dice. Without validation cases, it keeps the shared
        tensors with its personal ones, if it has any.

        Args:
            packets: the server's packets for this site, oldest first.

        Raises:
            PacketRefused: a packet is damaged or is not what was agreed.
        """
        done, _ = self._receive(packets)
        names = {*self.agreement.contract.shapes, *self.agreement.personal}
        personal = tensors_of(self.network, self.agreement.personal)
        candidates: dict[str, dict[str, Tensor]] = {}
        dice: dict[str, float | None] = {}

        def consider(name: str) -> None:
            candidates[name] = tensors_of(self.network, names)
            dice[name] = summarise(score_cases(self.network, self.data.val, self.config)).mean_dice

        if personal:
            load_tensors(self.network, self.personal_start)
        consider(SHARED)
        if personal:
            load_tensors(self.network, personal)
            consider(PERSONAL)
        if epochs := self.config.rounds.last_epochs:
            self._fit_once_more(done + 1, epochs)
            consider(TRAINED_ON)
        known = {name: value for name, value in dice.items() if value is not None}
        first = PERSONAL if personal else SHARED
        kept = max(known, key=lambda name: (known[name], name == first)) if known else first
        return Own(kept, dice, candidates[kept])

    def _fit(self, number: int, learner: Learner, on_step: Callable[[], None]) -> FitReport:
        return fit(
            self.network,
            learner,
            self.data.train,
            self.config.samples,
            # A round of steps continues an epoch that another round began, so its order depends on no round.
            seed=seed_for(self.config.seed, 0 if self.config.rounds.steps else number, self.data.site, "fit"),
            precision=self.config.precision,
            on_step=on_step,
        )

    def _fit_privately(self, number: int, learner: Learner, on_step: Callable[[], None]) -> FitReport:
        """Enter the round's steps in the site's ledger, then take them.

        Raises:
            FlapsamError: the round would reveal more than it may, or there is no ledger.
        """
        privacy, steps = self.config.privacy, self.config.rounds.steps
        if privacy is None or steps is None or self.budget is None:
            raise FlapsamError("a private run needs a ledger of the privacy that is spent")
        plan = planned(self.config)
        self.budget.spend(self.agreement.run, number, steps, plan)
        return fit_privately(
            self.network,
            learner,
            self.data.train,
            self.config.samples,
            privacy,
            plan.steps.noise,
            randomness=self.randomness,
            precision=self.config.precision,
            on_step=on_step,
        )

    def _fit_once_more(self, number: int, epochs: int) -> None:
        """Train everything on this site's cases, with a learning rate that warms up and falls to its end."""
        options = self.config.training.model_copy(update={"epochs": epochs, "schedule_epochs": None})
        shortest = steps_a_round(self.data.train, options, ONE_ROUND)
        options = options.model_copy(update={"warmup_steps": min(options.warmup_steps, max(shortest // 4, 1))})
        fit(
            self.network,
            Learner(self.network, options),
            self.data.train,
            self.config.samples,
            seed=seed_for(self.config.seed, number, self.data.site, "last fit"),
            precision=self.config.precision,
        )

    def _receive(self, packets: Iterable[bytes]) -> tuple[int, dict[str, Tensor]]:
        """Apply the packets and load the network; returns the rounds done and the global tensors at this site's rank."""
        number, tensors = self.state.held() or (0, cut(self.agreement.start, self.rank))
        for packet in packets:
            header, part = decode(
                packet, lambda header: self.agreement.from_server(header, self.rank), self.agreement.contract.tensor_bytes
            )
            if header.run != self.agreement.run:
                raise PacketRefused("it belongs to another run")
            if header.sender != SERVER:
                raise PacketRefused(f"its sender is {header.sender!r}, not the server")
            if header.base is None or header.round > number:
                if header.base not in (None, number):
                    raise PacketRefused(f"it changes the result of round {header.base}, but this site is at round {number}")
                tensors = changed(tensors, part, header.base is None or self.agreement.lossless)
                number = header.round
        if self.agreement.remembers:
            self.state.hold(number, tensors)
        load_tensors(self.network, padded(tensors, self.agreement.contract.shapes))
        kept = self.state.personal_before(number + 1)
        # Whatever is not personal in this run is the server's, even if an earlier version of the run kept it here.
        kept = {name: tensor for name, tensor in kept.items() if name in self.personal_start}
        load_tensors(self.network, self.personal_start | kept)
        return number, tensors

    def _answer(
        self,
        header: Header,
        contract: Contract,
        start: Mapping[str, Tensor],
        result: Mapping[str, Tensor],
        keep_unsent: bool,
    ) -> bytes:
        """Write the packet for the server. What the codec loses is sent with the next packet (Seide et al. 2014)."""
        seed = seed_for(self.config.seed, header.round, self.data.site, "codec")
        if self.agreement.lossless:
            return encode(header, contract, result, seed)
        feedback = self.config.compression.feedback
        unsent = self.state.unsent_before(header.round) if feedback else {}
        change = {name: result[name] - start[name] + unsent.get(name, 0.0) for name in result}
        packet, sent = encode_lossy(header, contract, change, seed)
        if feedback and keep_unsent:
            self.state.keep_unsent(header.round, {**unsent, **{name: change[name] - sent[name] for name in change}})
        return packet

    def _change(self, header: Header, change: Mapping[str, Tensor]) -> bytes:
        """Write a change without masks. The packet stays at this site.

        There is no error feedback: in a later round, it would let the server have the same change summed with other sites'.
        """
        if not all(tensor.isfinite().all() for tensor in change.values()):
            # As no change, it would hide nobody's.
            raise FlapsamError("this site's change is not finite, so it takes no part in this round's sum")
        contract = self.agreement.up(self.data.site, header.round).whole
        return encode(header, contract, change)

    def _masked(self, number: int, kept: bytes, start: str) -> bytes:
        """Turn a change into whole numbers and mask these. Only then may they leave the site."""
        member, site, agreement = self._member(), self.data.site, self.agreement
        assert member is not None
        header, change = decode(kept, lambda header: agreement.up(site, number).whole, agreement.contract.tensor_bytes)
        roster = member.current(number)
        numbers, beyond = roster.ring.whole(change, roster.ranges, roster.shares[site], member.seed(number, start))
        for name in beyond:
            log.info("round %d: the change of %s was scaled down to the agreed range", number, name)
        if not numbers.any():
            # It would hide nobody's change.
            raise FlapsamError(
                "this site's change is too small for the agreed range, so it takes no part in this round's sum"
            )
        masked = torch.from_numpy(member.masked(number, numbers))
        return seal(header, agreement.masked(site, number, member.roster(number)), {"values": masked})

    def _member(self) -> "Member | None":
        """The site's side of secure aggregation; None for a run without it.

        Raises:
            FlapsamError: the run has it, but this site does not.
        """
        if self.agreement.secure and self.member is None:
            raise FlapsamError("a run with secure aggregation needs the keys of this site's partners")
        return self.member if self.agreement.secure else None

    def _scores(self) -> dict[str, float | None]:
        summary = summarise(score_cases(self.network, self.data.val, self.config))
        # A site without validation cases has no Dice, and says so for every class, as the server expects.
        dice = {name: summary.dice.get(name) for name in self.config.data.classes}
        return {VALIDATION + name: value for name, value in {"mean": summary.mean_dice, **dice}.items()}


def score_cases(network: Sam, cases: Sequence[PreparedCase], config: RunConfig) -> list[CaseScores]:
    """Predict prepared cases and score them on the slices' own grid, without surface distances."""
    scores = []
    for case in cases:
        stack = case.stack(config.samples)
        predicted = predict_stack(network, stack, batch=config.inference_batch, precision=config.precision)
        labels, classes = case.labels(), config.data.classes
        scores.append(
            score_case(case.name, case.site, predicted, labels, None, classes, case.annotated, config.absent_class)
        )
    return scores
