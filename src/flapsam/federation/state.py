"""What a run must not forget: written whole, file by file, so that a crash loses at most the work under way."""

from pathlib import Path

from flapsam.files import make_folder, write_bytes


class ServerState:
    """The server's folder: the newest global packet, and the replies of the round under way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def packet(self) -> bytes | None:
        """The newest global packet; None before the start."""
        return _read(self.folder / "global.packet")

    def commit(self, packet: bytes) -> None:
        """Make ``packet`` the newest global one. What was kept for the round is needless then."""
        write_bytes(self.folder / "global.packet", packet)
        self.forget_replies()

    def forget_replies(self) -> None:
        """Drop the replies of the round under way; each site keeps its own and gives it again."""
        for reply in self.replies().values():
            reply.unlink()

    def keep_reply(self, site: str, packet: bytes) -> None:
        """Keep one site's reply until the round is committed."""
        write_bytes(self._replies / f"{site}.packet", packet)

    def replies(self) -> dict[str, Path]:
        """The replies kept, in the order of the sites' names."""
        return {path.stem: path for path in sorted(self._replies.glob("[!.]*.packet"), key=lambda path: path.stem)}

    @property
    def _replies(self) -> Path:
        return self.folder / "replies"


class ClientState:
    """A site's folder: Adam's moments after its last round, and the reply it gave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def moments(self, round_number: int) -> Path:
        """Where the moments after a round are kept."""
        make_folder(self.folder)
        return self.folder / f"moments-{round_number:06d}.safetensors"

    def moments_before(self, round_number: int) -> Path | None:
        """The newest moments from before a round: a site may have missed some."""
        earlier = [path for path in self._all("moments") if path < self.moments(round_number)]
        return earlier[-1] if earlier else None

    def reply(self, round_number: int) -> bytes | None:
        """The reply that this site gave in a round, if that was its last."""
        return _read(self._reply(round_number))

    def commit(self, round_number: int, reply: bytes) -> None:
        """Keep the reply of a round; what is older is needless then."""
        write_bytes(self._reply(round_number), reply)
        keep = {self._reply(round_number), *self._all("moments")[-1:]}
        for path in (*self._all("moments"), *self._all("reply")):
            if path not in keep:
                path.unlink()

    def _reply(self, round_number: int) -> Path:
        return self.folder / f"reply-{round_number:06d}.packet"

    def _all(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*"))


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
