"""Where backbones come from, and the input normalisation that they were trained with."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from flapsam.base.errors import choose

META = "https://dl.fbaipublicfiles.com/segment_anything/"
HUB = "https://huggingface.co/{}/resolve/main/{}"


@dataclass(frozen=True)
class Source:
    """A backbone known by name: its architecture, and where to get its weights."""

    name: str
    architecture: str
    pixels: str
    """Input normalisation in the backbone's own training, as a name in ``PIXELS``."""
    licence: str
    url: str | None = None
    """None for weights that ship with flapsam."""
    file: str = ""
    """Name of the local file with the weights."""
    sha256: str = ""
    """First digits of the file's checksum, if its publisher states them."""


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
    # MedSAM was trained on pixels in [0, 1]. Its repository also has a file for transformers; this one has Meta's names.
    _hub("wanglab/medsam-vit-base", "sam-vit-b", "paper", "medsam_vit_b.pth"),
)

SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
"""Name → source of the weights."""


def source(name: str) -> Source:
    """The source of this name.

    Raises:
        FlapsamError: the name is unknown.
    """
    return choose("backbone", name, SOURCES)
