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
from flapsam.base.files import make_folder, write_bytes, write_text, written_whole
from flapsam.federation.aggregation import Reply

Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by purpose, then by name."""


class ServerState:
    """The server's folder: the global tensors, packets that sites may still need, and the replies of the current round."""

    def __init__(self, folder: Path, keep: int = 0) -> None:
        """Use a folder, which need not exist yet.

        Args:
            folder: the folder.
            keep: number of older global tensors to keep, so that the run can go back to them.
        """
        self.folder = folder
        self.keep = keep

    def newest(self) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The number of rounds done, the tensors, and the metadata kept with them. None before the start.

        Raises:
            FlapsamError: the file is damaged.
        """
        done = self.rounds()
        if not done:
            return None
        groups, metadata = _read(self._round(done[-1]))
        return done[-1], groups, metadata

    def rounds(self) -> list[int]:
        """Numbers of the rounds whose result is kept, oldest first; 0 stands for the start."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.safetensors"))

    def go_back(self, done: int) -> None:
        """Drop everything later than the result of round ``done``, which must be kept."""
        mark = self._went_back
        write_text(mark, str(done if self.shared is None else min(done, self.shared)))
        # The newest first, so that a crash in between leaves the state of a round.
        for number in reversed(self.rounds()):
            if number > done:
                self._round(number).unlink()
        for path in self.folder.glob("packet-*"):
            if int(path.name.rpartition("-")[2]) > done:
                path.unlink()
        self.forget_replies()

    @property
    def shared(self) -> int | None:
        """The last round whose result is the same as before the run went back; None if it never did.

        A site may hold a later result that the run has dropped, under a number that has been used again since.
        """
        return int(self._went_back.read_text()) if self._went_back.exists() else None

    def commit(self, number: int, groups: Groups, about: Mapping[str, Any], packets: Mapping[str, bytes]) -> None:
        """Save the result of a round, and drop the round's replies and all older tensors but those of ``keep`` rounds.

        Args:
            number: the number of rounds done.
            groups: the tensors.
            about: metadata to keep with the tensors.
            packets: this round's packets, by the stream of sites that get them.
        """
        for stream, packet in packets.items():
            write_bytes(self._packet(stream, number), packet)
        _write(self._round(number), groups, about)
        for older in self.rounds()[: -1 - self.keep]:
            self._round(older).unlink()
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

    def has_replied(self, site: str) -> bool:
        """Whether a site has answered. It does not look at the other sites' replies, which may be thousands."""
        return self._reply(site).exists()

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

    def masked_replies(self) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """The masked changes that have arrived, packed, and the metadata kept with each."""
        masked, metadata = {}, {}
        for site, path in self.replied().items():
            groups, metadata[site] = _read(path)
            masked[site] = groups[""]["values"].numpy()
        return masked, metadata

    def forget_replies(self) -> None:
        """Drop the replies of the current round. Each site keeps its own and sends it again."""
        for path in self.replied().values():
            path.unlink()

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}.safetensors"

    @property
    def _went_back(self) -> Path:
        return self.folder / "went-back"

    def _packet(self, stream: str, number: int) -> Path:
        return self.folder / f"packet-{stream}-{number:06d}"

    def _reply(self, site: str) -> Path:
        return self._replies / f"{site}.safetensors"

    @property
    def _replies(self) -> Path:
        return self.folder / "replies"


KEPT_A_ROUND = ("moments", "unsent", "personal")
"""What a site keeps of each round, as the first part of its files' names."""


class ClientState:
    """A site's folder: the tensors it received, the reply of its last round, Adam's moments, unsent changes and personal
    tensors.

    A reply belongs to a round and to its ``origin``, the global tensors that the site was sent. If the run goes back and a
    round is repeated from other tensors, the site trains again.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        """Use a folder, which need not exist yet.

        Args:
            folder: the folder.
            keep: number of rounds before the last one of which as much is kept.
        """
        self.folder = folder
        self.keep = keep

    def moments(self, round_number: int) -> Path:
        """Make the folder and return the file for the moments after a round."""
        make_folder(self.folder)
        return self.folder / f"moments-{round_number:06d}.safetensors"

    def moments_before(self, round_number: int) -> Path | None:
        """The newest moments from before a round. They can be several rounds old, because a site may have missed some."""
        return next(iter(self._before("moments", round_number)[-1:]), None)

    def unsent_before(self, round_number: int) -> dict[str, Tensor]:
        """The changes that earlier rounds left unsent."""
        paths = self._before("unsent", round_number)
        return _read(paths[-1])[0].get("", {}) if paths else {}

    def keep_unsent(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the changes that a round leaves unsent."""
        _write(self.folder / f"unsent-{round_number:06d}.safetensors", {"": tensors}, {})

    def personal_before(self, round_number: int) -> dict[str, Tensor]:
        """The personal tensors after the newest round before this one. Empty before the first."""
        paths = self._before("personal", round_number)
        return _read(paths[-1])[0].get("", {}) if paths else {}

    def keep_personal(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the personal tensors after a round."""
        _write(self.folder / f"personal-{round_number:06d}.safetensors", {"": tensors}, {})

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

    def reply(self, round_number: int, origin: str = "") -> bytes | None:
        """The site's reply to a round, or None if that was not its last or began with other tensors."""
        # Earlier versions did not note what a reply began with.
        return _bytes(self._reply(round_number, origin)) or _bytes(self._reply(round_number))

    def forget_from(self, round_number: int) -> None:
        """Drop what was kept of a round and of all later ones, which are about to be repeated."""
        for kind in KEPT_A_ROUND:
            for path in set(self._all(kind)) - set(self._before(kind, round_number)):
                path.unlink()

    def commit(self, round_number: int, reply: bytes, origin: str = "") -> None:
        """Keep the reply to a round, and drop files that are no longer needed."""
        target = self._reply(round_number, origin)
        write_bytes(target, reply)
        newest = -1 - self.keep
        keep = {target, *(path for kind in KEPT_A_ROUND for path in self._all(kind)[newest:])}
        for path in (path for kind in (*KEPT_A_ROUND, "reply") for path in self._all(kind)):
            if path not in keep:
                path.unlink()

    def _reply(self, round_number: int, origin: str = "") -> Path:
        return self.folder / f"reply-{round_number:06d}{'-' if origin else ''}{origin}.packet"

    def _before(self, kind: str, round_number: int) -> list[Path]:
        return [path for path in self._all(kind) if path.name < f"{kind}-{round_number:06d}"]

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
