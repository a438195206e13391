"""The server's side of the federated algorithm: it turns the sites' packets into the packet of the next round.

Engines only carry the bytes, so a simulation on a laptop and a federation of hospitals do the same arithmetic.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.base.seeds import seed_for
from flapsam.federation.aggregation import Reply
from flapsam.federation.agreement import SERVER, VALIDATION, Agreement, changed, cut
from flapsam.federation.compression.codec import check_entries
from flapsam.federation.packets import Contract, Header, PacketRefused, checksum, decode, encode, encode_lossy, opened
from flapsam.federation.reported import check_metrics
from flapsam.federation.screening import norm, too_large
from flapsam.federation.secure_aggregation.ring import LEAST_RANGE, MOST_RANGE
from flapsam.federation.server_optimizers import server_step
from flapsam.federation.state import ServerState
from flapsam.run.config import ServerOptions

if TYPE_CHECKING:
    # It needs packages that only runs with secure aggregation need.
    from flapsam.federation.secure_aggregation.collector import Collector

ROOM = 3.0
"""With secure aggregation, the range of a tensor's change, as a multiple of the largest change of a number in the last mean.
A site's own change may be larger than the mean's."""
UNKNOWN = -1
"""Round of a site whose tensors are not known. It is before the start, for which there is no packet."""


class Server:
    """The server's side of the algorithm.

    The server keeps the global tensors θ. Where packets hold differences, it also keeps the sites' copy r. Each round adds
    the clients' changes to θ and sends θ − r through the codec, so that what earlier packets lost is sent again
    (DoubleSqueeze, Tang et al. 2019, arXiv 1905.05957).
    """

    def __init__(
        self,
        agreement: Agreement,
        shares: Mapping[str, float],
        state: ServerState,
        *,
        options: ServerOptions | None = None,
        seed: int = 0,
        max_change: float | None = None,
        classes: Collection[str] | None = None,
        collector: "Collector | None" = None,
        first_range: float = 1.0,
    ) -> None:
        """Start a run, or resume it from the saved state.

        Args:
            agreement: what was agreed with the sites.
            shares: each site's share in the mean. Shares are fixed before the first round, so no site can raise its own.
            state: the server's folder.
            options: what the server does with the clients' mean.
            seed: the run's seed, from which the codec's rounding is seeded.
            max_change: how many times as large as the others' change a site's change may be. None: any size is accepted.
            classes: the run's classes, whose validation Dice sites may report. None: any names are accepted.
            collector: the server's side of secure aggregation. A run with it needs it.
            first_range: with secure aggregation, the range of every number's change in the first round.

        Raises:
            FlapsamError: the state is damaged or belongs to another run.
        """
        self.agreement = agreement
        self.shares = shares
        self.state = state
        self.options = options or ServerOptions()
        self.seed = seed
        self.max_change = max_change
        self.classes = classes
        self.collector = collector
        ranks = {agreement.aggregator.rank, *agreement.ranks.values()}
        self.streams = {str(rank): rank for rank in sorted(ranks)}
        """Name of a stream → rank. Sites of the same rank get the same packets, one stream."""
        self.ranges = dict.fromkeys(agreement.trained, first_range) if agreement.secure else {}
        """Tensor → range of its change in the next round."""
        newest = state.newest()
        if newest is None:
            held = {stream: cut(agreement.start, rank) for stream, rank in self.streams.items()}
            self._commit(0, dict(agreement.start), held, {}, [])
        else:
            self.rounds_done, groups, metadata = newest
            if metadata["run"] != agreement.run:
                raise FlapsamError(f"{state.folder}: this is the state of another run; choose another output folder")
            self.globals = groups["global"]
            self.held = {stream: groups.get(f"held-{stream}", {}) for stream in self.streams}
            self.moments = {kind: groups[kind] for kind in ("m", "v") if kind in groups}
            self.ranges = {name: float(tensor) for name, tensor in groups.get("ranges", {}).items()}
            # Earlier versions kept the mean over the sites.
            self.validation: list[dict[str, float | None]] = [
                scores if isinstance(scores, dict) else dict.fromkeys(shares, scores) for scores in metadata["validation"]
            ]
            if collector is None:
                state.forget_replies()

    def steps(self) -> Sequence[str]:
        """The steps of the current round that are left: ``fit``, and those of secure aggregation before and after it."""
        if self.collector is None:
            return ["fit"]
        number = self.rounds_done + 1
        ranges = {name: self.ranges[name] for name in self.agreement.up(SERVER, number).shapes}
        steps = self.collector.begin(number, ranges, checksum(self.tensors), self.state.replied())
        if steps[:1] == ["keys"]:
            # Masked changes of an earlier attempt are noise in this one.
            self.state.forget_replies()
        return steps

    def end_step(self, on_left_out: Callable[[str, str], object]) -> None:
        """Close a step of the current round.

        Args:
            on_left_out: called with each site that is left out from here on, and the reason.

        Raises:
            FlapsamError: too few sites have taken part in it.
        """
        if self.collector is not None:
            self.collector.end(self.state.replied(), on_left_out)

    def asks(self, site: str) -> bool:
        """Whether a site has a part in the current step."""
        return self.collector is None or self.collector.asks(site)

    def packets(self, site: str, held: int, work: str = "fit") -> list[bytes]:
        """What a site needs for some work.

        Args:
            site: the site.
            held: the round whose result it holds. A site whose tensors are not known is at round ``UNKNOWN``.
            work: the work. In secure aggregation, ``agree`` needs a message alone, and ``fit`` one more.

        Returns:
            Every packet since round ``held``, or one with all tensors if that is smaller, and the message.
        """
        if self.collector is not None and work == "agree":
            return [self.collector.message(site)]
        more = [self.collector.message(site)] if self.collector is not None and work == "fit" else []
        return [*self._packets(site, held), *more]

    def _packets(self, site: str, held: int) -> list[bytes]:
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
        """The global tensors as sites of the run's own rank hold them."""
        return self._held(str(self.agreement.aggregator.rank))

    def receive(self, packet: bytes | memoryview, site: str) -> Header:
        """Check a site's answer to the current round and keep it.

        Args:
            packet: the answer.
            site: the site that the engine received it from.

        Raises:
            PacketRefused: the answer cannot be used. The round continues without it.
        """
        agreement, number = self.agreement, self.rounds_done + 1
        # These are refused unread, because a site may send any number of answers that nobody asked for.
        if site not in self.shares:
            raise PacketRefused(f"{site!r} is not a site of this run")
        if self.state.has_replied(site):
            raise PacketRefused(f"{site} has already answered this round")

        def agreed(header: Header) -> Contract:
            if header.run != agreement.run:
                raise PacketRefused("it belongs to another run")
            if header.sender not in self.shares:
                raise PacketRefused(f"its sender is {header.sender!r}, which is not a site of this run")
            if header.sender != site:
                raise PacketRefused(f"its sender is {header.sender!r}, but it came from {site!r}")
            if header.round != number or header.base != self.rounds_done:
                raise PacketRefused(f"it answers round {header.round}, but the current round is {number}")
            if self.collector is not None:
                return agreement.masked(site, number, self.collector.named)
            return agreement.up(site, number)

        if self.collector is not None:
            return self._receive_masked(packet, site, agreed)
        header, part = decode(packet, agreed, agreement.contract.tensor_bytes)
        self._check_metrics(header)
        start = cut(self.globals, agreement.rank(site))
        tensors = changed(start, part, agreement.lossless)
        change = norm(tensor - start[name] if agreement.lossless else tensor for name, tensor in part.items())
        metadata = {"validation": header.metrics.get(f"{VALIDATION}mean"), "change": change}
        self.state.keep_reply(site, {name: tensors[name] for name in part}, metadata)
        return header

    def _receive_masked(self, packet: bytes | memoryview, site: str, agreed: Callable[[Header], Contract]) -> Header:
        """Keep a masked answer. Nothing can be read in it."""
        assert self.collector is not None
        if not self.collector.asks(site):
            raise PacketRefused(f"{site} has no part in this round's sum")
        header, contract, entries = opened(packet, agreed, self.agreement.contract.tensor_bytes)
        self._check_metrics(header)
        size = self.collector.ring.size(contract.numbers)
        try:
            check_entries(entries, {"values": (torch.uint8, size)})
        except ValueError as error:
            raise PacketRefused(str(error)) from error
        self.state.keep_reply(site, entries, {"validation": header.metrics.get(f"{VALIDATION}mean")})
        return header

    def _check_metrics(self, header: Header) -> None:
        try:
            check_metrics(header.metrics, self.classes)
        except ValueError as error:
            raise PacketRefused(str(error)) from error

    def close_round(self, least: int = 1, on_left_out: Callable[[str, str], object] = lambda site, reason: None) -> int:
        """Aggregate the round's replies, in the order of the sites' names.

        A reply whose change is far larger than the others' is left out. So are the largest changes, one after another, as
        long as the result is not finite.

        Args:
            least: number of replies that must be left to aggregate.
            on_left_out: called with each site that is left out, and the reason.

        Returns:
            The number of rounds done.

        Raises:
            FlapsamError: too few replies are left, or none of them has a weight above 0.
        """
        number = self.rounds_done + 1
        if self.collector is not None:
            return self._close_sum(number)
        kept = {site: self.state.reply(site, self.shares[site]) for site in self.state.replied()}
        changes = {site: metadata["change"] for site, (reply, metadata) in kept.items() if reply.weight > 0}
        bad = too_large(changes, self.max_change)
        while True:
            for site, reason in bad.items():
                on_left_out(site, reason)
                del kept[site], changes[site]
            if not changes:
                raise FlapsamError(f"round {number}: no site with a weight above 0 answered; see the ledger for the reasons")
            if len(kept) < least:
                few = f"too few answers are usable: {len(kept)} of at least {least} (rounds.min_sites)"
                raise FlapsamError(f"round {number}: {few}; see the ledger for the reasons")
            outcome = self._aggregated([reply for reply, _ in kept.values()], number)
            if outcome is not None:
                break
            bad = {max(changes, key=changes.__getitem__): "with it, the round's result is not finite"}
        self._close(number, outcome, {site: metadata for site, (_, metadata) in kept.items()})
        return number

    def _close_sum(self, number: int) -> int:
        """Close a round of secure aggregation."""
        assert self.collector is not None
        masked, metadata = self.state.masked_replies()
        mean = self.collector.mean(masked, self.agreement.up(SERVER, number).shapes)
        reply = Reply.of({name: self.globals[name] + mean[name] for name in mean}, weight=1.0)
        outcome = self._aggregated([reply], number)
        if outcome is None:
            raise FlapsamError(f"round {number}: the result is not finite; start a new run, or go back with --from-round")
        largest = {name: float(tensor.abs().max()) for name, tensor in mean.items()}
        self.ranges |= {
            name: min(max(ROOM * value, LEAST_RANGE), MOST_RANGE) for name, value in largest.items() if value > 0
        }
        self._close(number, outcome, metadata)
        return number

    def _close(
        self,
        number: int,
        outcome: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]],
        replies: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write a round's packets and its result. ``replies`` holds what was kept with each site's answer."""
        result, moments = outcome
        held = dict(self.held)
        packets = {}
        for stream, rank in self.streams.items():
            packets[stream], held[stream] = self._packet(stream, rank, number, result)
        # An answer brings the validation scores of the round before.
        validation = [*self.validation, {site: about["validation"] for site, about in replies.items()}]
        self._commit(number, result, held, moments, validation, packets)
        for stream in self.streams:
            # Beyond this size, one packet with all tensors is smaller than the chain of packets.
            self.state.forget_packets(stream, self.agreement.contract.tensor_bytes if self.agreement.remembers else 0)

    def place(self, tensors: Mapping[str, Tensor]) -> None:
        """Put other tensors in the place of the global ones, as the result of a round without training.

        Args:
            tensors: the tensors, of the run's own rank.
        """
        held = {stream: cut(tensors, rank) for stream, rank in self.streams.items()}
        self._commit(self.rounds_done + 1, dict(tensors), held, {}, self.validation)

    def _aggregated(
        self, replies: Sequence[Reply], number: int
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]] | None:
        """The global tensors and the server's moments after a round; None if they are not finite."""
        try:
            result = self.agreement.aggregator.aggregate(replies, self.globals, number)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined] (documented, but not exported)
            # A decomposition of numbers that are not finite does not converge.
            return None
        result, moments = server_step(self.globals, result, self.moments, self.options)
        finite = all(tensor.isfinite().all() for part in (result, *moments.values()) for tensor in part.values())
        return (result, moments) if finite else None

    def _packet(self, stream: str, rank: int, number: int, tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Tensor]]:
        """The packet that brings the new global tensors to the sites of a rank, and what these sites hold then."""
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
        return packet, changed(self.held[stream], sent, replace=False)

    def _held(self, stream: str) -> dict[str, Tensor]:
        """The tensors that the sites of a stream hold."""
        return cut(self.globals, self.streams[stream]) if self.agreement.lossless else dict(self.held[stream])

    def _commit(
        self,
        number: int,
        tensors: dict[str, Tensor],
        held: Mapping[str, Mapping[str, Tensor]],
        moments: Mapping[str, Mapping[str, Tensor]],
        validation: list[dict[str, float | None]],
        packets: Mapping[str, bytes] | None = None,
    ) -> None:
        groups = {"global": tensors, **moments}
        if self.ranges:
            groups["ranges"] = {name: torch.tensor([value], dtype=torch.float64) for name, value in self.ranges.items()}
        if not self.agreement.lossless:
            groups |= {f"held-{stream}": part for stream, part in held.items()}
        self.state.commit(number, groups, {"run": self.agreement.run, "validation": validation}, packets or {})
        self.rounds_done, self.globals, self.held = number, tensors, {stream: dict(part) for stream, part in held.items()}
        self.moments, self.validation = {kind: dict(part) for kind, part in moments.items()}, validation
