"""Where backbones come from, and what their makers fed them."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from flapsam.base.errors import choose

META = "https://dl.fbaipublicfiles.com/segment_anything/"
HUB = "https://huggingface.co/{}/resolve/main/{}"


@dataclass(frozen=True)
class Source:
    """A set of weights that can be had by name."""

    name: str
    architecture: str
    pixels: str
    """What its makers normalised the input with, a preset of ``PIXELS``."""
    licence: str
    url: str | None = None
    """None for weights that ship with flapsam."""
    file: str = ""
    """Name of the file that it is kept under."""
    sha256: str = ""
    """First digits of the file's checksum, where its makers tell them."""


def _meta(name: str, digits: str) -> Source:
    file = f"{name.replace('-', '_')}_{digits}.pth"
    return Source(name, name, "sam", "Apache-2.0", META + file, file, digits)


def _hub(identity: str, architecture: str, pixels: str, file: str = "model.safetensors") -> Source:
    kept = identity.replace("/", "--") + PurePosixPath(file).suffix
    return Source(identity, architecture, pixels, "Apache-2.0", HUB.format(identity, file), kept)


_ALL = (
    Source("sam-tiny", "sam-tiny", "paper", "Apache-2.0", None, "sam-tiny.safetensors"),
    _meta("sam-vit-b", "01ec64"),
    _meta("sam-vit-l", "0b3195"),
    _meta("sam-vit-h", "4b8939"),
    _hub("facebook/sam-vit-base", "sam-vit-b", "sam"),
    _hub("facebook/sam-vit-large", "sam-vit-l", "sam"),
    _hub("facebook/sam-vit-huge", "sam-vit-h", "sam"),
    # MedSAM was trained on pixels scaled to [0, 1]; its authors keep their own file, in Meta's names, beside the library's.
    _hub("wanglab/medsam-vit-base", "sam-vit-b", "paper", "medsam_vit_b.pth"),
)

SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
"""Name → where its weights come from."""


def source(name: str) -> Source:
    """The source of this name.

    Raises:
        FlapsamError: there is none.
    """
    return choose("backbone", name, SOURCES)
