"""What a run must not forget: written whole, file by file, so that a crash loses at most the work under way."""

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
"""Tensors by what they are for, then by name."""


class ServerState:
    """The server's folder: the global tensors, packets that sites may still need, and the replies of the round under way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """Rounds done, tensors and what else was kept with them; None before the start.

        Raises:
            FlapsamError: the file is damaged.
        """
        files = sorted(self.folder.glob("round-*.safetensors"))
        if not files:
            return None
        groups, about = _read(files[-1])
        return int(files[-1].stem.removeprefix("round-")), groups, about

    def commit(self, number: int, groups: Groups, about: Mapping[str, Any], packets: Mapping[str, bytes]) -> None:
        """Make these the newest. Older tensors, and what was kept for the round, are needless then.

        Args:
            number: of rounds done.
            groups: the tensors.
            about: what else must be kept with them.
            packets: this round's, by the stream of sites that get them.
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
        """A round's packet, if it is still kept."""
        return _bytes(self._packet(stream, number))

    def forget_packets(self, stream: str, limit: int) -> None:
        """Drop a stream's oldest packets, of which those kept together are larger than ``limit`` bytes; one stays."""
        size = 0
        for path in sorted(self.folder.glob(f"packet-{stream}-*"), reverse=True):
            if size > limit:
                path.unlink()
            else:
                size += path.stat().st_size

    def keep_reply(self, site: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep what one site answered until the round is committed."""
        _write(self._reply(site), {"": tensors}, about)

    def replied(self) -> dict[str, Path]:
        """Sites that answered, in the order of their names, and where that is kept."""
        found = {path.name.removesuffix(".safetensors"): path for path in self._replies.glob("[!.]*.safetensors")}
        return dict(sorted(found.items()))

    def reply(self, site: str, weight: float) -> tuple[Reply, dict[str, Any]]:
        """What a site answered, its tensors left on the disk, and what was kept with them."""
        path = self._reply(site)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            index = json.loads(file.read(length))
        about = json.loads(index.pop("__metadata__")["about"])
        places = _places(json.dumps(index))

        def read(name: str, rows: slice) -> Tensor:
            # Read at its place: safetensors would read the whole index again, for each client and tensor.
            start, shape = places[name]
            first, last, _ = rows.indices(shape[0])
            row = math.prod(shape[1:])
            numbers = np.fromfile(path, np.float32, (last - first) * row, offset=8 + length + start + 4 * first * row)
            return torch.from_numpy(numbers).reshape(-1, *shape[1:])

        return Reply(weight, places.keys(), read), about

    def forget_replies(self) -> None:
        """Drop the replies of the round under way; each site keeps its own and gives it again."""
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
    """A site's folder: what it received, and of its last round Adam's moments, what is still to be sent, and the reply."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def moments(self, round_number: int) -> Path:
        """Where the moments after a round are kept."""
        make_folder(self.folder)
        return self.folder / f"moments-{round_number:06d}.safetensors"

    def moments_before(self, round_number: int) -> Path | None:
        """The newest moments from before a round: a site may have missed some."""
        return self._before("moments", round_number)

    def unsent_before(self, round_number: int) -> dict[str, Tensor]:
        """What earlier rounds left to be sent."""
        path = self._before("unsent", round_number)
        return _read(path)[0].get("", {}) if path else {}

    def keep_unsent(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a round leaves to be sent."""
        _write(self.folder / f"unsent-{round_number:06d}.safetensors", {"": tensors}, {})

    def held(self) -> tuple[int, dict[str, Tensor]] | None:
        """What this site received: rounds that went into it, and the tensors."""
        path = self.folder / "held.safetensors"
        if not path.exists():
            return None
        groups, about = _read(path)
        return about["round"], groups.get("", {})

    def hold(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what this site received."""
        _write(self.folder / "held.safetensors", {"": tensors}, {"round": round_number})

    def reply(self, round_number: int) -> bytes | None:
        """The reply that this site gave in a round, if that was its last."""
        return _bytes(self._reply(round_number))

    def commit(self, round_number: int, reply: bytes) -> None:
        """Keep the reply of a round; what is older is needless then."""
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
    """Where each float32 tensor begins in a safetensors file, and its shape. Sites of one rank share the answer."""
    found = json.loads(index)
    return {name.removeprefix("/"): (found[name]["data_offsets"][0], tuple(found[name]["shape"])) for name in found}


def _write(path: Path, groups: Groups, about: Mapping[str, Any]) -> None:
    # As arrays, because safetensors refuses torch's tensors that share memory, and copies of all would take as much again.
    tensors = {
        f"{group}/{name}": np.ascontiguousarray(tensor.detach().numpy())
        for group, part in groups.items()
        for name, tensor in part.items()
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(about)})


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for entry in file.keys():  # noqa: SIM118 (it is no dictionary)
                group, name = entry.split("/", 1)
                groups.setdefault(group, {})[name] = file.get_tensor(entry)
            return groups, json.loads(file.metadata()["about"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise FlapsamError(f"{path}: a saved state that cannot be read; start the run anew") from error


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
