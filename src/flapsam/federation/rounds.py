"""The federated algorithm, engine-free: a client turns a packet into a packet, a server turns packets into a packet.

Engines only carry the bytes, so a simulation on a laptop and a federation of hospitals do the same arithmetic.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flapsam.config import RunConfig
from flapsam.errors import FlapsamError
from flapsam.federation.aggregation import Aggregator
from flapsam.federation.packets import Contract, Header, PacketRefused, decode, encode
from flapsam.federation.state import ClientState, ServerState
from flapsam.inference import predict_stack
from flapsam.metrics import CaseScores, score_case, summarise
from flapsam.sam import Sam, load_travelling, travelling_state
from flapsam.seeds import seed_for
from flapsam.slices import PreparedCase
from flapsam.training import Learner, fit

SERVER = "server"
VALIDATION = "validation."
"""Prefix of the validation metrics in a header; ``validation.mean`` is the mean over the classes."""


@dataclass(frozen=True)
class ClientData:
    """What one site trains and validates on."""

    site: str
    train: Sequence[PreparedCase]
    val: Sequence[PreparedCase]


class Client:
    """A site's side of the algorithm."""

    def __init__(
        self, network: Sam, data: ClientData, config: RunConfig, run: str, contract: Contract, state: ClientState
    ) -> None:
        self.network = network
        self.data = data
        self.config = config
        self.run = run
        self.contract = contract
        self.state = state

    def fit(self, packet: bytes, on_step: Callable[[], None] = lambda: None) -> bytes:
        """One round: validate what came, train it on this site's data, answer with the result.

        A round that was answered already is answered with the same bytes.

        Raises:
            PacketRefused: the server's packet is not right.
        """
        header = self._load(packet)
        number = header.round + 1
        kept = self.state.reply(number)
        if kept is not None:
            return kept
        metrics: dict[str, float | None] = {}
        if header.round > 0 and header.round % self.config.rounds.validate_every == 0:
            metrics |= self._scores()
        learner = Learner(self.network, self.config.training, self.config.rounds.count)
        moments = self.state.moments_before(number)
        if moments is not None:
            learner.load(moments)
        if self.config.training.moments == "reset":
            learner.reset_moments()
        report = fit(
            self.network,
            learner,
            self.data.train,
            self.config.samples,
            seed=seed_for(self.config.seed, number, self.data.site, "fit"),
            precision=self.config.precision,
            on_step=on_step,
        )
        result = travelling_state(self.network)
        if all(tensor.isfinite().all() for tensor in result.values()):
            learner.save(self.state.moments(number))
        metrics |= {
            "loss": report.loss,
            "cross_entropy": report.cross_entropy,
            "dice_loss": report.dice_loss,
            "steps": float(report.steps),
            "seconds": report.seconds,
            "waiting": report.waiting,
        }
        reply = Header(
            run=self.run,
            round=number,
            sender=self.data.site,
            contract=self.contract.hash,
            samples=report.slices,
            metrics=metrics,
        )
        answer = encode(reply, result)
        self.state.commit(number, answer)
        return answer

    def validate(self, packet: bytes) -> dict[str, float | None]:
        """Validation Dice of a global packet on this site: per class and mean, under ``validation.``.

        Raises:
            PacketRefused: the server's packet is not right.
        """
        self._load(packet)
        return self._scores()

    def _load(self, packet: bytes) -> Header:
        header, tensors = decode(packet, self.contract)
        if header.run != self.run:
            raise PacketRefused("of another run")
        if header.sender != SERVER:
            raise PacketRefused(f"sent by {header.sender!r}, not by the server")
        load_travelling(self.network, tensors)
        return header

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
    """The server's side of the algorithm."""

    def __init__(
        self,
        run: str,
        contract: Contract,
        weights: Mapping[str, float],
        make_aggregator: Callable[[], Aggregator],
        state: ServerState,
    ) -> None:
        """Take part in a run.

        Args:
            run: its id.
            contract: of its packets.
            weights: by site, fixed before the first round, so that no site can raise its own later.
            make_aggregator: gives a fresh aggregator for each round.
            state: this server's folder; a run that it holds already is gone on with.
        """
        self.run = run
        self.contract = contract
        self.weights = weights
        self.make_aggregator = make_aggregator
        self.state = state
        self.rounds_done = 0
        """Rounds that went into the newest global packet."""

    def start(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin with these tensors, or go on with the run that the state holds.

        Raises:
            FlapsamError: the state is of another run.
        """
        if self.state.packet is None:
            self._commit(0, tensors)
        self.rounds_done = self._open()[0].round
        self.state.forget_replies()

    @property
    def packet(self) -> bytes:
        """The newest global packet, for every site."""
        packet = self.state.packet
        if packet is None:
            raise FlapsamError(f"{self.state.folder}: the run has not begun")
        return packet

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The newest global tensors."""
        return self._open()[1]

    def receive(self, packet: bytes) -> Header:
        """Check one site's reply in the round under way and keep it.

        Raises:
            PacketRefused: the reply is not right; the round goes on without it.
        """
        header, _ = decode(packet, self.contract)
        number = self.rounds_done + 1
        if header.run != self.run:
            raise PacketRefused("of another run")
        if header.sender not in self.weights:
            raise PacketRefused(f"sent by {header.sender!r}, who is not among the sites")
        if header.round != number:
            raise PacketRefused(f"of round {header.round}, the round is {number}")
        if header.sender in self.state.replies():
            raise PacketRefused(f"{header.sender} has answered this round already")
        self.state.keep_reply(header.sender, packet)
        return header

    def close_round(self) -> int:
        """Aggregate the round's replies in the order of the sites' names; returns the number of rounds done.

        Raises:
            FlapsamError: no site answered.
        """
        replies = self.state.replies()
        number = self.rounds_done + 1
        if not any(self.weights[site] > 0 for site in replies):
            raise FlapsamError(f"round {number}: no site with a weight above 0 answered; see the ledger for the reasons")
        aggregator = self.make_aggregator()
        for site, path in replies.items():
            aggregator.add(decode(path.read_bytes(), self.contract)[1], self.weights[site])
        self._commit(number, aggregator.result())
        self.rounds_done = number
        return number

    def _commit(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        header = Header(run=self.run, round=number, sender=SERVER, contract=self.contract.hash)
        self.state.commit(encode(header, tensors))

    def _open(self) -> tuple[Header, dict[str, Tensor]]:
        try:
            header, tensors = decode(self.packet, self.contract)
        except PacketRefused as reason:
            raise FlapsamError(f"{self.state.folder}: the kept packet is not this run's: {reason}") from reason
        if header.run != self.run:
            raise FlapsamError(f"{self.state.folder}: this folder holds the state of another run")
        return header, tensors
