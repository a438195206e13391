"""Files that a search for images leaves out, each with the reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flapsam.volumes.content import what_it_is

NAMED = 5
"""Number of files that a sentence names."""


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that was left out."""

    path: Path
    reason: str
    """What it is or holds, without a full stop, such as ``not an image``."""


def sentences(left_out: Iterable[LeftOut]) -> list[str]:
    """One sentence for all files of a folder that have the same reason. A long list of names is cut short."""
    groups: dict[tuple[Path, str], list[str]] = {}
    for one in left_out:
        groups.setdefault((one.path.parent, one.reason), []).append(one.path.name)
    lines = []
    for (folder, reason), names in groups.items():
        listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        lines.append(f"{folder}: left out {listed} ({reason})")
    return lines


def is_hidden(path: Path) -> bool:
    """Whether a file is one that operating systems make for themselves, which nobody misses."""
    return path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini", "icon\r")


def reason_of(path: Path) -> str:
    """Reason why a file that is no image by its name is left out: what it is by its content."""
    found = what_it_is(path)
    return f"not an image, but {found[0]}" if found and found[0] not in ("text", "JSON text", "XML text") else "not an image"
