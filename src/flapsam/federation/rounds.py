"""The federated algorithm, engine-free: a client turns a packet into a packet, a server turns packets into a packet.

Engines only carry the bytes, so a simulation on a laptop and a federation of hospitals do the same arithmetic.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flapsam.config import RunConfig, ServerOptions
from flapsam.errors import FlapsamError
from flapsam.federation.agreement import SERVER, Agreement, cut, padded
from flapsam.federation.packets import Contract, Header, PacketRefused, decode, encode, encode_lossy
from flapsam.federation.server_optimizers import server_step
from flapsam.federation.state import ClientState, ServerState
from flapsam.inference import predict_stack
from flapsam.metrics import CaseScores, mean, score_case, summarise
from flapsam.sam import Sam, load_tensors, only_these_train, tensors_of
from flapsam.seeds import seed_for
from flapsam.slices import PreparedCase
from flapsam.training import Learner, fit

VALIDATION = "validation."
"""Prefix of the validation metrics in a header; ``validation.mean`` is the mean over the classes."""
FIT = ("loss", "cross_entropy", "dice_loss", "steps", "seconds", "waiting")
"""What a header tells of the fit, beside that."""


@dataclass(frozen=True)
class ClientData:
    """What one site trains and validates on."""

    site: str
    train: Sequence[PreparedCase]
    val: Sequence[PreparedCase]


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
        tells_metrics: bool = True,
    ) -> None:
        """Take part in a run, from its start or from where the state stands.

        Args:
            network: on which the site fits.
            data: of the site.
            config: of the run.
            agreement: what was agreed with the server.
            state: this site's folder.
            tells_metrics: whether losses and validation Dice are in what leaves the site.
        """
        self.tells_metrics = tells_metrics
        self.network = network
        self.data = data
        self.config = config
        self.agreement = agreement
        self.state = state
        self.rank = agreement.rank(data.site)

    @property
    def held(self) -> int:
        """Rounds that went into the tensors that this site has, which says what packets it needs."""
        held = self.state.held()
        return held[0] if held else 0

    def fit(self, packets: Iterable[bytes], on_step: Callable[[], None] = lambda: None) -> bytes:
        """One round: validate what came, train it on this site's data, answer with the result.

        A round that was answered already is answered with the same bytes.

        Args:
            packets: the server's for this site, oldest first.
            on_step: called after every training step.

        Raises:
            PacketRefused: a packet is not right.
        """
        done, start = self._receive(packets)
        number = done + 1
        kept = self.state.reply(number)
        if kept is not None:
            return kept
        metrics: dict[str, float | None] = {}
        if self.tells_metrics and done > 0 and done % self.config.rounds.validate_every == 0:
            metrics |= self._scores()
        learner = Learner(self.network, self.config.training, self.config.rounds.count)
        moments = self.state.moments_before(number)
        if moments is not None:
            learner.load(moments)
        if self.config.training.moments == "reset":
            learner.reset_moments()
        contract = self.agreement.up(self.data.site, number)
        with only_these_train(self.network, contract.shapes):
            report = fit(
                self.network,
                learner,
                self.data.train,
                self.config.samples,
                seed=seed_for(self.config.seed, number, self.data.site, "fit"),
                precision=self.config.precision,
                on_step=on_step,
            )
        result = cut(tensors_of(self.network, contract.shapes), self.rank)
        whole = all(tensor.isfinite().all() for tensor in result.values())
        if whole:
            learner.save(self.state.moments(number))
        if self.tells_metrics:
            metrics |= {name: float(getattr(report, name)) for name in FIT}
        header = Header(
            run=self.agreement.run,
            round=number,
            base=done,
            sender=self.data.site,
            samples=report.slices,
            metrics=metrics,
        )
        answer = self._answer(header, contract, start, result, keep_unsent=whole)
        self.state.commit(number, answer)
        return answer

    def validate(self, packets: Iterable[bytes]) -> dict[str, float | None]:
        """Validation Dice of the global tensors on this site: per class and mean, under ``validation.``.

        Raises:
            PacketRefused: a packet is not right.
        """
        self._receive(packets)
        return self._scores() if self.tells_metrics else {}

    def _receive(self, packets: Iterable[bytes]) -> tuple[int, dict[str, Tensor]]:
        """Rounds done and the global tensors at this site's rank, which the network holds then."""
        number, tensors = self.state.held() or (0, cut(self.agreement.start, self.rank))
        for packet in packets:
            header, part = decode(
                packet, lambda header: self.agreement.from_server(header, self.rank), self.agreement.contract.tensor_bytes
            )
            if header.run != self.agreement.run:
                raise PacketRefused("of another run")
            if header.sender != SERVER:
                raise PacketRefused(f"sent by {header.sender!r}, not by the server")
            if header.base is None or header.round > number:
                if header.base not in (None, number):
                    raise PacketRefused(f"it changes what round {header.base} gave, this site has that of round {number}")
                tensors = _changed(tensors, part, header.base is None or self.agreement.lossless)
                number = header.round
        if self.agreement.remembers:
            self.state.hold(number, tensors)
        load_tensors(self.network, padded(tensors, self.agreement.contract.shapes))
        return number, tensors

    def _answer(
        self,
        header: Header,
        contract: Contract,
        start: Mapping[str, Tensor],
        result: Mapping[str, Tensor],
        keep_unsent: bool,
    ) -> bytes:
        """The packet for the server; what the codec loses is kept, to be sent with the next (Seide et al. 2014)."""
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

    def _scores(self) -> dict[str, float | None]:
        summary = summarise(score_cases(self.network, self.data.val, self.config))
        return {VALIDATION + name: value for name, value in {"mean": summary.mean_dice, **summary.dice}.items()}


def score_cases(network: Sam, cases: Sequence[PreparedCase], config: RunConfig) -> list[CaseScores]:
    """Predict unpacked cases and score them on the slices' own grid, without distances."""
    scores = []
    for case in cases:
        stack = case.stack(config.samples)
        predicted = predict_stack(network, stack, batch=config.inference_batch, precision=config.precision)
        scores.append(score_case(case.name, case.site, predicted, case.labels(), None, config.data.classes, case.annotated))
    return scores


class Server:
    """The server's side of the algorithm.

    It keeps the global tensors θ and, where packets hold differences, what the sites have of them, r: each round sends what
    the codec makes of θ − r, so that what was lost before is in it, and the clients' changes are added to θ (DoubleSqueeze,
    Tang et al. 2019, arXiv 1905.05957).
    """

    def __init__(
        self,
        agreement: Agreement,
        weights: Mapping[str, float],
        state: ServerState,
        *,
        options: ServerOptions | None = None,
        seed: int = 0,
    ) -> None:
        """Take part in a run, from its start or from where the state stands.

        Args:
            agreement: what was agreed with the sites.
            weights: by site, fixed before the first round, so that no site can raise its own later.
            state: this server's folder.
            options: what is done with the clients' mean.
            seed: of the run, for the rounding of what is sent.

        Raises:
            FlapsamError: the state is of another run, or damaged.
        """
        self.agreement = agreement
        self.weights = weights
        self.state = state
        self.options = options or ServerOptions()
        self.seed = seed
        ranks = {agreement.aggregator.rank, *agreement.ranks.values()}
        self.streams = {str(rank): rank for rank in sorted(ranks)}
        """Sites of one rank get the same packets."""
        newest = state.newest()
        if newest is None:
            held = {stream: cut(agreement.start, rank) for stream, rank in self.streams.items()}
            self._commit(0, dict(agreement.start), held, {}, [])
        else:
            self.rounds_done, groups, about = newest
            if about["run"] != agreement.run:
                raise FlapsamError(f"{state.folder}: this folder holds the state of another run")
            self.globals = groups["global"]
            self.held = {stream: groups.get(f"held-{stream}", {}) for stream in self.streams}
            self.moments = {kind: groups[kind] for kind in ("m", "v") if kind in groups}
            self.validation: list[float | None] = about["validation"]
            state.forget_replies()

    def packets(self, site: str, held: int) -> list[bytes]:
        """What a site needs that has the tensors of round ``held``: every packet since, or, if that is less, all tensors."""
        rank, agreement = self.agreement.rank(site), self.agreement
        header = Header(run=agreement.run, round=self.rounds_done, base=self.rounds_done, sender=SERVER)
        if held == self.rounds_done and (agreement.remembers or held == 0):
            return [encode(header, agreement.nothing(rank), {})]
        if held < self.rounds_done:
            numbers = range(held + 1 if agreement.remembers else self.rounds_done, self.rounds_done + 1)
            chain = [self.state.packet(str(rank), number) for number in numbers]
            if None not in chain:
                return chain  # type: ignore[return-value]
        return [encode(header.model_copy(update={"base": None}), agreement.whole(rank), self._held(str(rank)))]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The global tensors as sites of the run's own rank have them."""
        return self._held(str(self.agreement.aggregator.rank))

    def receive(self, packet: bytes | memoryview, site: str) -> Header:
        """Check the reply that came from a site in the round under way and keep it.

        Raises:
            PacketRefused: the reply is not right; the round goes on without it.
        """
        agreement, number = self.agreement, self.rounds_done + 1

        def agreed(header: Header) -> Contract:
            if header.run != agreement.run:
                raise PacketRefused("of another run")
            if header.sender not in self.weights:
                raise PacketRefused(f"sent by {header.sender!r}, who is not among the sites")
            if header.sender != site:
                raise PacketRefused(f"sent by {header.sender!r} in the place of {site!r}")
            if header.round != number or header.base != self.rounds_done:
                raise PacketRefused(f"of round {header.round}, the round is {number}")
            if site in self.state.replied():
                raise PacketRefused(f"{site} has answered this round already")
            return agreement.up(site, number)

        header, part = decode(packet, agreed, agreement.contract.tensor_bytes)
        for name, value in header.metrics.items():
            if name.startswith(VALIDATION) and value is not None and not 0 <= value <= 1:
                raise PacketRefused(f"a validation Dice of {value}")
        changed = _changed(cut(self.globals, agreement.rank(site)), part, agreement.lossless)
        about = {"validation": header.metrics.get(f"{VALIDATION}mean")}
        self.state.keep_reply(site, {name: changed[name] for name in part}, about)
        return header

    def close_round(self) -> int:
        """Aggregate the round's replies in the order of the sites' names; returns the number of rounds done.

        Raises:
            FlapsamError: no site answered.
        """
        number = self.rounds_done + 1
        kept = [self.state.reply(site, self.weights[site]) for site in self.state.replied()]
        replies = [reply for reply, _ in kept]
        if not any(reply.weight > 0 for reply in replies):
            raise FlapsamError(f"round {number}: no site with a weight above 0 answered; see the ledger for the reasons")
        result = self.agreement.aggregator.aggregate(replies, self.globals, number)
        result, moments = server_step(self.globals, result, self.moments, self.options)
        held = dict(self.held)
        packets = {}
        for stream, rank in self.streams.items():
            packets[stream], held[stream] = self._packet(stream, rank, number, result)
        # Sites tell with a round's reply how the round before it did.
        validation = [*self.validation, mean(about["validation"] for _, about in kept)]
        self._commit(number, result, held, moments, validation, packets)
        for stream in self.streams:
            # Beyond that, all tensors are fewer bytes than the chain of packets.
            self.state.forget_packets(stream, self.agreement.contract.tensor_bytes if self.agreement.remembers else 0)
        return number

    def _packet(self, stream: str, rank: int, number: int, tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Tensor]]:
        """What tells the sites of a rank the new global tensors, and what they have then."""
        agreement = self.agreement
        base = None if not agreement.remembers else number - 1
        header = Header(run=agreement.run, round=number, base=base, sender=SERVER)
        contract = agreement.from_server(header, rank)
        target = {name: tensor for name, tensor in cut(tensors, rank).items() if name in contract.shapes}
        if agreement.lossless:
            return encode(header, contract, target), {}
        change = {name: tensor - self.held[stream][name] for name, tensor in target.items()}
        seed = seed_for(self.seed, number, SERVER, stream, "codec")
        packet, sent = encode_lossy(header, contract, change, seed)
        return packet, _changed(self.held[stream], sent, replace=False)

    def _held(self, stream: str) -> dict[str, Tensor]:
        """What the sites of a stream have."""
        return cut(self.globals, self.streams[stream]) if self.agreement.lossless else dict(self.held[stream])

    def _commit(
        self,
        number: int,
        tensors: dict[str, Tensor],
        held: Mapping[str, Mapping[str, Tensor]],
        moments: Mapping[str, Mapping[str, Tensor]],
        validation: list[float | None],
        packets: Mapping[str, bytes] | None = None,
    ) -> None:
        groups = {"global": tensors, **moments}
        if not self.agreement.lossless:
            groups |= {f"held-{stream}": part for stream, part in held.items()}
        self.state.commit(number, groups, {"run": self.agreement.run, "validation": validation}, packets or {})
        self.rounds_done, self.globals, self.held = number, tensors, {stream: dict(part) for stream, part in held.items()}
        self.moments, self.validation = {kind: dict(part) for kind, part in moments.items()}, validation


def settled(validation: Sequence[float | None], patience: int | None, gain: float) -> bool:
    """Whether the best validation Dice of the last ``patience`` times is not above the best before by more than ``gain``.

    Args:
        validation: mean Dice of each time, oldest first; None where there was none.
        patience: times; None: it never has.
        gain: of Dice.
    """
    known = [value for value in validation if value is not None]
    return patience is not None and len(known) > patience and max(known[-patience:]) <= max(known[:-patience]) + gain


def _changed(old: Mapping[str, Tensor], part: Mapping[str, Tensor], replace: bool) -> dict[str, Tensor]:
    """The tensors with some of them replaced, or added to."""
    return {**old, **(part if replace else {name: old[name] + change for name, change in part.items()})}
