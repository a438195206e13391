"""What server and sites agree on before the first round, so that it need not be sent."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from flapsam.federation.aggregation.aggregator import A, Aggregator, B
from flapsam.federation.packets import Contract, Header
from flapsam.run.config import Compression

SERVER = "server"
"""The sender of the server's packets."""
VALIDATION = "validation."
"""Prefix of the validation metrics in a header; ``validation.mean`` is the mean over the classes."""


@dataclass(frozen=True)
class Agreement:
    """The tensors, who sends which of them in which round, and how they are written."""

    run: str
    """The run's id."""
    start: Mapping[str, Tensor]
    """The global tensors before the first round. Everyone makes them from checkpoint and seed."""
    trained: Collection[str]
    """Names of those that clients train."""
    aggregator: Aggregator
    compression: Compression = field(default_factory=Compression)
    """How packets are written."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Sites whose adapters have a smaller rank than the run's."""

    @cached_property
    def contract(self) -> Contract:
        """Of all global tensors at the run's rank."""
        return Contract.of(self.start, self.compression)

    @cached_property
    def lossless(self) -> bool:
        """Whether packets hold values; otherwise they hold differences, and receivers must remember."""
        return self.contract.coder.lossless

    @cached_property
    def remembers(self) -> bool:
        """Whether a site must keep what it received, because no packet says it all."""
        return not self.lossless or any(not self.aggregator.down(name, number) for name in self.start for number in (1, 2))

    def without_start(self) -> "Agreement":
        """The same without the memory of its start, of which only names and shapes are left."""
        shapes_only = {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in self.start.items()}
        slim = replace(self, start=shapes_only)
        slim.__dict__["contract"] = self.contract
        return slim

    def rank(self, site: str) -> int:
        """Of a site's adapters."""
        return self.ranks.get(site, self.aggregator.rank)

    def up(self, site: str, number: int) -> Contract:
        """Of a site's packet in a round."""
        names = {name for name in self.trained if self.aggregator.up(name, number)}
        return self._cut(self.rank(site)).part(names)

    def down(self, rank: int, number: int) -> Contract:
        """Of the packet that tells sites of this rank what a round changed."""
        return self._cut(rank).part({name for name in self.start if self.aggregator.down(name, number)})

    def whole(self, rank: int) -> Contract:
        """Of a packet that tells a site of this rank everything."""
        return self._cut(rank).whole

    def nothing(self, rank: int) -> Contract:
        """Of a packet that only says which round begins."""
        return self._cut(rank).part(())

    def from_server(self, header: Header, rank: int) -> Contract:
        """Of a packet with this header that sites of this rank got."""
        if header.base is None:
            return self.whole(rank)
        return self.nothing(rank) if header.base == header.round else self.down(rank, header.round)

    def _cut(self, rank: int) -> Contract:
        shapes = {name: cut_shape(name, shape, rank) for name, shape in self.contract.shapes.items()}
        return replace(self.contract, shapes=shapes)


def cut_shape(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape of a tensor where adapters have at most this rank."""
    if name.endswith(A):
        return (min(shape[0], rank), *shape[1:])
    if name.endswith(B):
        return (shape[0], min(shape[1], rank))
    return shape


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors with adapters cut to this rank: the first rows of A and columns of B (HetLoRA, arXiv 2401.06432)."""
    return {
        name: tensor[tuple(slice(length) for length in cut_shape(name, tuple(tensor.shape), rank))]
        for name, tensor in tensors.items()
    }


def padded(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors with zeros where a smaller rank has nothing.

    A network of the run's rank then computes and trains exactly what one of the smaller rank would: where row and column are
    both zero, so are their gradients, and nothing moves them.
    """
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor
        if tuple(tensor.shape) != shapes[name]:
            result[name] = tensor.new_zeros(shapes[name])
            result[name][tuple(slice(length) for length in tensor.shape)] = tensor
    return result


def changed(old: Mapping[str, Tensor], part: Mapping[str, Tensor], replace: bool) -> dict[str, Tensor]:
    """The tensors with some of them replaced, or added to."""
    return {**old, **(part if replace else {name: old[name] + change for name, change in part.items()})}
