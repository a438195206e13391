"""What server and sites agree on before the first round, so that packets need not repeat it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, Aggregator, B
from flapsam.federation.packets import Contract, Header, checksum
from flapsam.run.config import Compression

SERVER = "server"
"""Sender's name in packets from the server."""
MASKED = "masked"
"""Codec's name in packets that hold masked whole numbers."""
VALIDATION = "validation."
"""Prefix of the validation metrics in a header; ``validation.mean`` is the mean over the classes."""


@dataclass(frozen=True)
class Agreement:
    """The tensors of a run, who sends which ones in which round, and how they are written."""

    run: str
    """The run's id."""
    start: Mapping[str, Tensor]
    """The global tensors before the first round. Server and sites each make them from checkpoint and seed."""
    trained: Collection[str]
    """Names of the tensors that clients train and send."""
    aggregator: Aggregator
    compression: Compression = field(default_factory=Compression)
    """How packets are written."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Site → rank of its adapters, for sites with a smaller rank than the run's."""
    personal: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors that each client trains for itself and never sends, before the first round."""
    secure: bool = False
    """Whether sites send masked whole numbers, of which the server learns the sum alone."""

    @cached_property
    def contract(self) -> Contract:
        """The contract for all global tensors at the run's rank. Its checksum is over the personal ones, too."""
        return replace(Contract.of(self.start, self.compression), start=checksum({**self.start, **self.personal}))

    @cached_property
    def lossless(self) -> bool:
        """Whether packets hold the tensors' values. Otherwise they hold differences from what the receiver has."""
        return self.contract.coder.lossless

    @cached_property
    def remembers(self) -> bool:
        """Whether a site must keep what it received, because a packet does not bring all tensors."""
        return not self.lossless or any(not self.aggregator.down(name, number) for name in self.start for number in (1, 2))

    def without_start(self) -> "Agreement":
        """A copy that frees the memory of the start and keeps only its names and shapes."""
        shapes_only = {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in self.start.items()}
        slim = replace(self, start=shapes_only)
        slim.__dict__["contract"] = self.contract
        return slim

    def rank(self, site: str) -> int:
        """The rank of a site's adapters."""
        return self.ranks.get(site, self.aggregator.rank)

    def up(self, site: str, number: int) -> Contract:
        """The contract of a site's packet in a round."""
        names = {name for name in self.trained if self.aggregator.up(name, number)}
        return self._cut(self.rank(site)).part(names)

    def masked(self, site: str, number: int, roster: str) -> Contract:
        """The contract of a site's packet of whole numbers in a round.

        Args:
            site: the site.
            number: the round.
            roster: SHA-256 of the roster with whose masks the numbers are masked.
        """
        return replace(self.up(site, number), compression=Compression(codec=MASKED), start=roster)

    def down(self, rank: int, number: int) -> Contract:
        """The contract of the packet that brings a round's changes to sites of this rank."""
        return self._cut(rank).part({name for name in self.start if self.aggregator.down(name, number)})

    def whole(self, rank: int) -> Contract:
        """The contract of a packet that brings all tensors to a site of this rank."""
        return self._cut(rank).whole

    def nothing(self, rank: int) -> Contract:
        """The contract of a packet without tensors, which only says which round begins."""
        return self._cut(rank).part(())

    def from_server(self, header: Header, rank: int) -> Contract:
        """The contract of a packet with this header from the server to sites of this rank."""
        if header.base is None:
            return self.whole(rank)
        return self.nothing(rank) if header.base == header.round else self.down(rank, header.round)

    def _cut(self, rank: int) -> Contract:
        shapes = {name: cut_shape(name, shape, rank) for name, shape in self.contract.shapes.items()}
        return replace(self.contract, shapes=shapes)


def cut_shape(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape of a tensor once adapters are cut to this rank."""
    if name.endswith(A):
        return (min(shape[0], rank), *shape[1:])
    if name.endswith(B):
        return (shape[0], min(shape[1], rank))
    return shape


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Cut adapters to this rank: keep the first rows of A and columns of B (HetLoRA, arXiv 2401.06432)."""
    return {
        name: tensor[tuple(slice(length) for length in cut_shape(name, tuple(tensor.shape), rank))]
        for name, tensor in tensors.items()
    }


def padded(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Pad tensors of a smaller rank with zeros to these shapes.

    A network of the run's rank then computes and trains exactly as one of the smaller rank would. Where a row of A and its
    column of B are both zero, so are their gradients, and they stay zero.
    """
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor
        if tuple(tensor.shape) != shapes[name]:
            result[name] = tensor.new_zeros(shapes[name])
            result[name][tuple(slice(length) for length in tensor.shape)] = tensor
    return result


def changed(old: Mapping[str, Tensor], part: Mapping[str, Tensor], replace: bool) -> dict[str, Tensor]:
    """A copy of ``old`` in which the tensors of ``part`` replace the old ones, or are added to them."""
    return {**old, **(part if replace else {name: old[name] + change for name, change in part.items()})}
