"""The saved state of a run. Every file is written whole or not at all, so a crash loses at most the work in progress."""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder, write_bytes, written_whole
from flapsam.federation.aggregation import Reply

Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by purpose, then by name."""


class ServerState:
    """The server's folder: the global tensors, packets that sites may still need, and the replies of the current round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The number of rounds done, the tensors, and the metadata kept with them. None before the start.

        Raises:
            FlapsamError: the file is damaged.
        """
        files = sorted(self.folder.glob("round-*.safetensors"))
        if not files:
            return None
        groups, metadata = _read(files[-1])
        return int(files[-1].stem.removeprefix("round-")), groups, metadata

    def commit(self, number: int, groups: Groups, about: Mapping[str, Any], packets: Mapping[str, bytes]) -> None:
        """Save the result of a round, and drop older tensors and the round's replies.

        Args:
            number: the number of rounds done.
            groups: the tensors.
            about: metadata to keep with the tensors.
            packets: this round's packets, by the stream of sites that get them.
        """
        for stream, packet in packets.items():
            write_bytes(self._packet(stream, number), packet)
        target = self.folder / f"round-{number:06d}.safetensors"
        _write(target, groups, about)
        for path in self.folder.glob("round-*.safetensors"):
            if path != target:
                path.unlink()
        self.forget_replies()

    def packet(self, stream: str, number: int) -> bytes | None:
        """The packet of a round, or None if it is no longer kept."""
        return _bytes(self._packet(stream, number))

    def forget_packets(self, stream: str, limit: int) -> None:
        """Drop every packet of a stream whose newer packets already exceed ``limit`` bytes. The newest always stays."""
        size = 0
        for path in sorted(self.folder.glob(f"packet-{stream}-*"), reverse=True):
            if size > limit:
                path.unlink()
            else:
                size += path.stat().st_size

    def keep_reply(self, site: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep a site's reply until the round is committed."""
        _write(self._reply(site), {"": tensors}, about)

    def replied(self) -> dict[str, Path]:
        """The sites that have answered, in the order of their names, each with the file of its reply."""
        replies = {path.name.removesuffix(".safetensors"): path for path in self._replies.glob("[!.]*.safetensors")}
        return dict(sorted(replies.items()))

    def reply(self, site: str, weight: float) -> tuple[Reply, dict[str, Any]]:
        """A site's reply, whose tensors stay on disk until they are read, and the metadata kept with it."""
        path = self._reply(site)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            index = json.loads(file.read(length))
        metadata = json.loads(index.pop("__metadata__")["about"])
        places = _places(json.dumps(index))

        def read(name: str, rows: slice) -> Tensor:
            # Read at its offset, because safetensors would parse the whole index again for each client and tensor.
            start, shape = places[name]
            first, last, _ = rows.indices(shape[0])
            row = math.prod(shape[1:])
            numbers = np.fromfile(path, np.float32, (last - first) * row, offset=8 + length + start + 4 * first * row)
            return torch.from_numpy(numbers).reshape(-1, *shape[1:])

        return Reply(weight, places.keys(), read), metadata

    def forget_replies(self) -> None:
        """Drop the replies of the current round. Each site keeps its own and sends it again."""
        for path in self.replied().values():
            path.unlink()

    def _packet(self, stream: str, number: int) -> Path:
        return self.folder / f"packet-{stream}-{number:06d}"

    def _reply(self, site: str) -> Path:
        return self._replies / f"{site}.safetensors"

    @property
    def _replies(self) -> Path:
        return self.folder / "replies"


class ClientState:
    """A site's folder: the tensors it received and, from its last round, Adam's moments, unsent changes and the reply."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def moments(self, round_number: int) -> Path:
        """Make the folder and return the file for the moments after a round."""
        make_folder(self.folder)
        return self.folder / f"moments-{round_number:06d}.safetensors"

    def moments_before(self, round_number: int) -> Path | None:
        """The newest moments from before a round. They can be several rounds old, because a site may have missed some."""
        return self._before("moments", round_number)

    def unsent_before(self, round_number: int) -> dict[str, Tensor]:
        """The changes that earlier rounds left unsent."""
        path = self._before("unsent", round_number)
        return _read(path)[0].get("", {}) if path else {}

    def keep_unsent(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the changes that a round leaves unsent."""
        _write(self.folder / f"unsent-{round_number:06d}.safetensors", {"": tensors}, {})

    def held(self) -> tuple[int, dict[str, Tensor]] | None:
        """The round whose result this site holds, and its tensors. None if the site has kept none."""
        path = self.folder / "held.safetensors"
        if not path.exists():
            return None
        groups, metadata = _read(path)
        return metadata["round"], groups.get("", {})

    def hold(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the result of a round as this site received it."""
        _write(self.folder / "held.safetensors", {"": tensors}, {"round": round_number})

    def reply(self, round_number: int) -> bytes | None:
        """The site's reply to a round, or None if that was not its last."""
        return _bytes(self._reply(round_number))

    def commit(self, round_number: int, reply: bytes) -> None:
        """Keep the reply to a round, and drop files that are no longer needed."""
        write_bytes(self._reply(round_number), reply)
        keep = {self._reply(round_number), *self._all("moments")[-1:], *self._all("unsent")[-1:]}
        for path in (*self._all("moments"), *self._all("unsent"), *self._all("reply")):
            if path not in keep:
                path.unlink()

    def _reply(self, round_number: int) -> Path:
        return self.folder / f"reply-{round_number:06d}.packet"

    def _before(self, kind: str, round_number: int) -> Path | None:
        earlier = [path for path in self._all(kind) if path.name < f"{kind}-{round_number:06d}"]
        return earlier[-1] if earlier else None

    def _all(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*"))


@lru_cache(maxsize=4)
def _places(index: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Offset and shape of each float32 tensor in a safetensors file. Sites of the same rank share the cached result."""
    entries = json.loads(index)
    return {name.removeprefix("/"): (entry["data_offsets"][0], tuple(entry["shape"])) for name, entry in entries.items()}


def _write(path: Path, groups: Groups, metadata: Mapping[str, Any]) -> None:
    # As NumPy arrays, because safetensors refuses torch tensors that share memory, and copying them all doubles the memory.
    tensors = {
        f"{group}/{name}": np.ascontiguousarray(tensor.detach().numpy())
        for group, part in groups.items()
        for name, tensor in part.items()
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(metadata)})


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for entry in file.keys():  # noqa: SIM118 (a file is not a dictionary)
                group, name = entry.split("/", 1)
                groups.setdefault(group, {})[name] = file.get_tensor(entry)
            return groups, json.loads(file.metadata()["about"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise FlapsamError(f"{path}: cannot read the saved state; start a new run") from error


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
