"""Damaged input for everything that reads: image files, descriptions of data sets, adapters, kits, messages and packets.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/fuzz.py [--count 1500] [--target NAME ...] [--again]

Every mutation follows from the target's name and its number. It changes a field of a header to an extreme number or word,
repeats, removes or lengthens a line, cuts the file, flips bits, swaps files, or puts a pipe or a folder in a file's place.
A command of each target reads one mutation after another, so that a process that dies takes it along. Figures are kept in
`results/fuzz.json` and continued up to `--count` mutations, and `results/fuzz.md` is rewritten. `--again` starts over.

Counted per target: mutations that are read or refused with one sentence, reading processes that died (the command survived),
and what must not happen: the command died, another exception than FlapsamError, more than 2 seconds, more than 512 MiB of
memory or 64 MiB of disk above the sound file.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import HERE

sys.path.insert(0, str(HERE.parent))
from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text

RESULTS = HERE / "results" / "fuzz.json"
SECONDS, MEMORY, DISK = 2, 512 * 2**20, 64 * 2**20
HANGS = 240
"""Seconds after which a command counts as dead."""
COUNTS = ("mutations", "read", "refused", "process_died", "died", "traceback", "slow", "memory", "disk")
SINGLE = """
-1 0 1 2 3 4 5 16 17 100 255 256 32767 65535 65536 1000000 2147483647 2147483648 -2147483648 4294967295 4294967296
9223372036854775807 1e308 1e-320 -0.0 nan inf -inf 0x10 1_000 ٣ none null true False ~ True ( (1,0,0) %d %s%n LIST LOCAL
../secret /dev/zero /etc/passwd . é 😀 =1+1 a,b *a &a 2001-99-99 float double block MET_DOUBLE MET_STRING MET_FLOAT_MATRIX
raw hex ascii gzip bzip2 big vector list RGB-color
"""
WORDS = (
    *SINGLE.split(),
    *("9" * 40, "9" * 5000, "a" * 300, "a" * 70_000, "1 " * 300, "[" * 3000, "{" * 3000),
    *(
        "",
        " ",
        "\0",
        "\r",
        '"',
        "'",
        "(1,0,0) (0,1,0) (0,0,0)",
        "long long",
        "left-posterior-superior-time",
        "!!python/object:a",
    ),
)
NUMBERS = (
    *(-1, 0, 1, 2, 3, 4, 7, 8, 127, 128, 255, 256, 348, 512, 32767, 65535, 2**24),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 1.5, 2**31, 2**63, 2**70, 10**400, 1e308, float("nan"), float("inf"), -(2**63)),
    *("", " ", "a" * 300, "a" * 5000, "../a", "/etc/passwd", "\0", "\n", "é", "nan", "1"),
    *([], {}, [[]], {"": None}, [1, "a", None]),
)
Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """Something that reads."""

    make: Callable[[Path], None]
    """Function that writes sound files into a folder."""
    read: Callable[[Path], Any]
    """Function that reads the folder."""
    files: str = "*"
    """Pattern of the files that are changed."""
    share: float = 1
    """Number of mutations as a share of the usual one."""


# Changes of bytes.


def flip(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, more often near the beginning."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place = int(len(data) * rng.random() ** rng.choice((1, 3)))
        if place < len(data):
            changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Cut a part out, mostly the end."""
    start, end = sorted((rng.randrange(len(data) + 1), rng.choice((len(data), rng.randrange(len(data) + 1)))))
    return data[:start] + data[end:]


def grow(data: bytes, rng: random.Random) -> bytes:
    """Insert bytes."""
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice((b"\0" * 100_000, b"\xff" * 8, b"\n", b"\n\n", data[:500])) + data[place:]


def number(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a number of two, four or eight bytes."""
    kind = rng.choice(("<H", "<I", "<Q", ">H", ">I", "<f", "<d"))
    place = int(max(len(data) - 8, 1) * rng.random() ** 3)
    value = rng.choice(NUMBERS) if kind[1] in "HIQ" else float(rng.choice((0, -1, 1e30, "nan", "inf")))
    size = struct.calcsize(kind)
    packed = struct.pack(kind, value % 2 ** (8 * size) if isinstance(value, int) else value)
    return data[:place] + packed + data[place + size :]


def lines(data: bytes, rng: random.Random, *, head: int = 2000) -> bytes:
    """Change the lines of a text, or of the header at the beginning of a file."""
    end = len(data)
    for mark in (b"\n\n", b"ElementDataFile = LOCAL\n"):
        place = data.find(mark, 0, head)
        if place >= 0:
            end = place + len(mark) - (mark == b"\n\n")
    text, rest = data[:end], data[end:]
    parts = text.split(b"\n")
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(parts))
        line, kind = parts[place], rng.randrange(8)
        if kind == 0:
            parts.insert(rng.randrange(len(parts) + 1), line)
        elif kind == 1 and len(parts) > 1:
            del parts[place]
        elif kind == 2:
            parts[place] = line + rng.choice((b" " * 5000, b"x" * 20_000, b"1 " * 3000, b" 1", b",", b"\t"))
        elif kind == 3:
            parts[place] = flip(line, rng) if line else rng.choice(WORDS).encode()
        else:
            mark = next((mark for mark in (b": ", b" = ", b",", b":=") if mark in line), b" ")
            words = line.split(mark, 1)
            inner = words[-1].split(b" ")
            if rng.random() < 0.4:
                words[-1] = rng.choice(WORDS).encode()
            else:
                inner[rng.randrange(len(inner))] = rng.choice(WORDS).encode()
                words[-1] = b" ".join(inner)
            parts[place] = mark.join(words)
    return b"\n".join(parts) + rest


def header(insert: tuple[str, ...]) -> Change:
    """A change of a header's lines, which may also insert one of these."""

    def change(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            first, _, rest = data.partition(b"\n")
            data = first + b"\n" + rng.choice(insert).encode() + b"\n" + rest
            return data if rng.random() < 0.5 else lines(data, rng)
        return lines(data, rng)

    return change


def tree(data: bytes, rng: random.Random) -> bytes:
    """Change values or keys of a JSON or YAML document."""
    import yaml

    def nodes(value: Any, path: tuple) -> list[tuple]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [path, *(place for key, inner in items for place in nodes(inner, (*path, key)))]

    content = yaml.safe_load(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *parents, last = rng.choice(nodes(content, ())) or (None,)
        if last is None:
            content = deepcopy(rng.choice(VALUES))
            break
        place = content
        for key in parents:
            place = place[key]
        kind = rng.randrange(5)
        if kind == 0:
            del place[last]
        elif kind == 1 and isinstance(place, dict):
            place[str(rng.choice(VALUES))] = place.pop(last)
        elif kind == 2 and isinstance(place[last], (list, str)):
            place[last] = place[last] * rng.choice((0, 2, 100))
        else:
            place[last] = deepcopy(rng.choice(VALUES))
        if not isinstance(content, (dict, list)) or not content:
            break
    return json.dumps(content).encode() if rng.random() < 0.9 else yaml.safe_dump(content).encode()


def gzipped(inner: Change) -> Change:
    """A change of what a gzip file holds, or of its own bytes."""
    import gzip

    def change(data: bytes, rng: random.Random) -> bytes:
        return gzip.compress(inner(gzip.decompress(data), rng), 1) if rng.random() < 0.7 else rng.choice(PLAIN)(data, rng)

    return change


def nifti(data: bytes, rng: random.Random) -> bytes:
    """Change fields of a NIfTI header."""
    import nibabel
    import numpy as np

    content = np.frombuffer(data[:348], nibabel.Nifti1Header.template_dtype).copy()
    for _ in range(rng.choice((1, 1, 2))):
        field = rng.choice(
            (
                "dim",
                "dim",
                "datatype",
                "bitpix",
                "pixdim",
                "vox_offset",
                "scl_slope",
                "scl_inter",
                *(content.dtype.names or ()),
            )
        )
        values = content[0][field] if content.dtype[field].shape else content[field]
        if values.dtype.kind in "iuf":
            low, high = (
                (np.iinfo(values.dtype).min, np.iinfo(values.dtype).max) if values.dtype.kind in "iu" else (-1e38, 1e38)
            )
            values[rng.randrange(len(values))] = min(max(rng.choice((*NUMBERS, -32768)), low), high)
            if values.dtype.kind == "f" and rng.random() < 0.3:
                values[rng.randrange(len(values))] = rng.choice((np.nan, np.inf, -np.inf, 1e-38))
        else:
            content[field] = rng.choice((b"", b"n+1", b"n+2", b"ni1", b"xxxx"))
    return content.tobytes() + data[348:]


def dicom(data: bytes, rng: random.Random) -> bytes:
    """Change the length or the value of an element of a DICOM file."""
    tags = (
        *((0x28, 0x10), (0x28, 0x11), (0x28, 0x8), (0x28, 0x100), (0x28, 0x101), (0x28, 0x102), (0x28, 0x103), (0x28, 0x2)),
        *((0x20, 0x32), (0x20, 0x37), (0x28, 0x30), (0x28, 0x1052), (0x28, 0x1053), (0x2, 0x10), (0x8, 0x16), (0x20, 0xE)),
        *(
            (0x7FE0, 0x10),
            (0xFFFE, 0xE000),
            (0xFFFE, 0xE0DD),
            (0x5200, 0x9229),
            (0x5200, 0x9230),
            (0x20, 0x9113),
            (0x18, 0x50),
        ),
    )
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        tag = struct.pack("<HH", *rng.choice(tags))
        places = [place for place in range(132, len(changed) - 12) if changed[place : place + 4] == tag]
        if not places:
            continue
        place = rng.choice(places)
        long = changed[place + 4 : place + 6] in (b"OB", b"OW", b"SQ", b"UN", b"OF", b"UT") or tag[:2] == b"\xfe\xff"
        start = place + 12 if long and tag[:2] != b"\xfe\xff" else place + 8
        kind = rng.randrange(6)
        if kind == 0:
            width = 4 if long else 2
            changed[start - width : start] = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == 1:
            changed[place + 4 : place + 6] = rng.choice((b"UN", b"SQ", b"IS", b"DS", b"US", b"OB", b"XX", b"UT"))
        elif kind == 2:
            length = int.from_bytes(changed[start - 2 : start], "little")
            text = rng.choice(WORDS[:30]).encode()[: max(length, 0)].ljust(min(length, 64))
            changed[start : start + len(text)] = text
        elif kind == 3:
            changed[start : start + 2] = (rng.choice(NUMBERS) % 65536).to_bytes(2, "little")
        elif kind == 4:
            del changed[place : start + int.from_bytes(changed[start - 2 : start], "little")]
        else:
            text = rng.choice(("999999999", "2147483647", "-1", "0", "1e9", "nan")).encode()
            text += b" " * (len(text) % 2)
            length = int.from_bytes(changed[start - 2 : start], "little")
            if not long:
                changed[start - 2 : start] = len(text).to_bytes(2, "little")
                changed[start : start + length] = text
    return bytes(changed)


PLAIN: tuple[Change, ...] = (flip, cut, grow, number)
NRRD_LINES = (
    *("block size: 4", "byte skip: -1", "line skip: 99999", "byte skip: 100000000", "number: 5", 'labels: "a" "b"'),
    *("thicknesses: 1 1 1", "axis mins: 0 0 0", "centers: cell cell cell", "kinds: a b c", "old min: 3", "a:=b"),
    *("measurement frame: (1,0,0) (0,1,0) (0,0,1)", 'space units: "mm" "mm" "mm"', "modality: x", "content: x", "# x"),
    *("data file: x.raw", "data file: LIST", "data file: x%d.raw 1 3 1", "data file: ../a", "data file: a.nhdr"),
    *("spacings: 1 1 1", "spacings: nan 1e308 0", "space dimension: 3", "space dimension: 16", "dimension: 16"),
    *("sizes: 1 1", "encoding: ascii"),
)
META_LINES = (
    *("HeaderSize = -1", "HeaderSize = 1000000", "ElementNumberOfChannels = 1000000", "ElementNumberOfChannels = 3"),
    *("CompressedDataSize = 99999999999", "Comment = x", "Color = 1 0 0 1", "ElementToIntensityFunctionSlope = 2"),
    *("Modality = MET_MOD_CT", "SequenceID = 1 2 3 4", "NDims = 10", "NDims = 1000", "DimSize = 1 1 1 1", "Foo"),
    *("Orientation = 1 2", "CenterOfRotation = 1", "AnatomicalOrientation = XYZ", "Foo = bar", "ElementSize = 1 1 1"),
    *("ElementDataFile = LIST", "ElementDataFile = pipe", "ElementDataFile = x%d.raw 1 3 1", "BinaryData = False"),
    *("NRRD0004 = 1", "ObjectType = Tube", "Position = 1"),
)


def change_of(name: str) -> Change:
    """The structured change for a file."""
    if name.endswith(".nii.gz"):
        return gzipped(nifti)
    if name.endswith(".nii"):
        return nifti
    if name.endswith((".nrrd", ".nhdr")):
        return header(NRRD_LINES)
    if name.endswith((".mha", ".mhd")):
        return header(META_LINES)
    if name.endswith(".dcm"):
        return dicom
    if name.endswith((".json", ".yaml")):
        return tree
    if name.endswith((".csv", ".pem", ".crt")):
        return lines
    return rng_change


def rng_change(data: bytes, rng: random.Random) -> bytes:
    """Change the bytes, or what a packet or a file of tensors says in its text."""
    if data[:8].startswith(b"FLAPSAM"):
        return packet(data, rng)
    if rng.random() < 0.5 and len(data) > 8:
        length = int.from_bytes(data[:8], "little")
        if length < len(data):
            text = tree(data[8 : 8 + length], rng)
            return len(text).to_bytes(8, "little") + text + data[8 + length :]
    return rng.choice(PLAIN)(data, rng)


def packet(data: bytes, rng: random.Random) -> bytes:
    """Change what a packet holds, and seal it again."""
    import hashlib

    import zstandard

    if rng.random() < 0.2:
        return rng.choice(PLAIN)(data, rng)
    content = zstandard.ZstdDecompressor().decompress(data[40:])
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.6:
        text = tree(content[8 : 8 + length], rng)
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    else:
        content = rng.choice(PLAIN)(content, rng)
    body = zstandard.ZstdCompressor().compress(content)
    return data[:8] + hashlib.sha256(body).digest() + body


def mutate(folder: Path, pattern: str, rng: random.Random) -> None:
    """Change one file of a folder."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    path = rng.choice(files)
    kind = rng.random()
    if kind < 0.03:
        path.unlink()
        rng.choice(
            (
                lambda: os.mkfifo(path),
                path.mkdir,
                lambda: path.symlink_to("/dev/zero"),
                lambda: path.write_bytes(b""),
                lambda: None,
            )
        )()
    elif kind < 0.06:
        path.write_bytes(rng.choice(files).read_bytes())
    elif kind < 0.3:
        path.write_bytes(rng.choice(PLAIN)(path.read_bytes(), rng))
    else:
        path.write_bytes(change_of(path.name)(path.read_bytes(), rng))


# What is read.


def volume() -> tuple[Any, Any]:
    """A small image, and its affine."""
    import numpy as np

    return np.random.default_rng(0).integers(-100, 100, size=(20, 16, 6)).astype(np.int16), np.diag([-1.0, -1.0, 3.0, 1.0])


def save_image(name: str, *, compressed: bool = False) -> Callable[[Path], None]:
    """A function that saves the image as a file of this name."""

    def make(folder: Path) -> None:
        import nibabel
        import SimpleITK as sitk

        array, affine = volume()
        if ".nii" in name:
            nibabel.save(nibabel.Nifti1Image(array, affine), folder / name)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(array.transpose()), str(folder / name), useCompression=compressed)

    return make


def read_first(*ends: str) -> Callable[[Path], Any]:
    """A function that reads the image in a folder, as image, geometry and label map."""

    def read(folder: Path) -> None:
        from flapsam.volumes import read_image, read_label

        path = folder / f"a{ends[0]}"
        read_image(path)
        read_label(path)

    return read


def save_dicom(syntax: str = "", *, frames: bool = False) -> Callable[[Path], None]:
    """A function that saves the image as DICOM."""

    def make(folder: Path) -> None:
        from tests.helpers.dicom import changed, save_enhanced, save_series
        from tests.volumes.test_dicom import compress_with_gdcm

        array, affine = volume()
        if frames:
            save_enhanced(folder / "a.dcm", array, affine, range(6))
        else:
            save_series(folder, array[..., :3], affine)
        for path in folder.iterdir():
            if syntax in (RLE, JPEG_LS):
                changed(path, lambda header: header.compress(syntax))
            elif syntax:
                compress_with_gdcm(path, syntax)

    return make


def save_seg(folder: Path) -> None:
    """Save a DICOM segmentation."""
    from flapsam.volumes import legend_of, source_at, write_labels
    from tests.helpers.dicom import save_series

    array, affine = volume()
    series = source_at(save_series(folder / "series", array, affine))
    write_labels((array > 0).astype("uint8"), series, affine, folder / "a", legend_of(["kidney"]))
    shutil.rmtree(folder / "series")
    (folder / "a.nii.gz").unlink()


def read_seg(folder: Path) -> None:
    """Read the frames of the segmentation, which is not an image for ``sort_files``."""
    from flapsam.volumes import Series, read_image

    read_dicom(folder)
    read_image(Series(folder, tuple(sorted(folder.iterdir())), whole_file=True))


def read_dicom(folder: Path) -> None:
    """Read the series of a folder."""
    from flapsam.volumes import is_dicom, read_image, sort_files

    for series in sort_files([path for path in sorted(folder.iterdir()) if is_dicom(path)]).series:
        read_image(series)


def save_data(layout: str) -> Callable[[Path], None]:
    """A function that makes a data set with a description."""

    def make(folder: Path) -> None:
        from tests.helpers.sites import make_site

        if layout == "folders":
            make_site(folder / "a", 3)
            make_site(folder / "b", 3)
            rows = [f"{site}_{number},{site},train,{number}" for site in "ab" for number in range(3)]
            (folder / "sites.csv").write_text("\n".join(["case,site,split,subject", *rows, ""]))
            return
        make_site(folder / "site", 3)
        (folder / "site/images").rename(folder / "imagesTr")
        (folder / "site/labels").rename(folder / "labelsTr")
        pairs = [{"image": f"./imagesTr/site_{n}.nii.gz", "label": f"./labelsTr/site_{n}.nii.gz"} for n in range(3)]
        description: dict[str, Any] = {
            "labels": {"0": "background", "1": "ball", "2": "core"},
            "training": pairs,
            "name": "x",
        }
        if layout == "nnunet":
            description = {"labels": {"background": 0, "ball": 1, "core": [2, 3]}, "channel_names": {"0": "CT"}}
            description |= {"file_ending": ".nii.gz", "numTraining": 3}
            description["dataset"] = {
                f"site_{n}": {"images": [pair["image"]], "label": pair["label"]} for n, pair in enumerate(pairs)
            }
        (folder / "dataset.json").write_text(json.dumps(description))

    return make


def save_table(folder: Path) -> None:
    """Make a data set with a table beside it."""
    save_data("folders")(folder)
    (folder / "sites.csv").rename(folder / "table.csv")


def read_data(layout: str) -> Callable[[Path], Any]:
    """A function that reads a data set's cases and classes."""

    def read(folder: Path) -> None:
        from flapsam.run.config import Data
        from flapsam.sites import find_dataset, read_found

        dataset = find_dataset(folder, layout)
        dataset.recognises(folder)
        find_dataset(folder)
        dataset.labels(folder)
        read_found(Data(path=folder, labels={"ball": 1}, layout=layout), 0)

    return read


def read_table(folder: Path) -> None:
    """Read a data set with the table as ``data.table``."""
    from flapsam.run.config import Data
    from flapsam.sites import read_found

    read_found(Data(path=folder, labels={"ball": 1}, table=folder / "table.csv"), 0)


def save_adapter(folder: Path) -> None:
    """Save an adapter in the folder of its run."""
    from tests.helpers.adapters import saved
    from tests.helpers.sites import write_run

    saved(folder / "adapter")
    write_run(folder / "run.yaml", folder)


def read_adapter(folder: Path) -> None:
    """Load the adapter."""
    from flapsam import load

    load(folder)


def save_kit(folder: Path) -> None:
    """Make the kit of a site, with its configuration."""
    from flapsam.federation.engines.nvflare.kits import provision

    federation = {"name": "kidney", "server": {"host": "fl.example.org"}, "sites": ["a"]}
    (folder / "f.json").write_text(json.dumps(federation))
    provision(folder / "f.json", folder / "kits")
    (folder / "kits/a").rename(folder / "kit")
    shutil.rmtree(folder / "kits")
    for path in [path for path in (folder / "kit").rglob("*") if path.is_file()]:
        if path.name not in ("kit.json", "client.crt"):
            path.unlink()
    site = {
        "data": {"path": "data", "layout": "auto"},
        "state": "state",
        "max_rounds": 9,
        "min_cases": 3,
        "strategies": ["flap"],
    }
    (folder / "site.yaml").write_text(json.dumps(site))


def read_site(folder: Path) -> None:
    """Read the kit, its certificate and the site's configuration, each even if another is refused."""
    from flapsam.federation.engines.nvflare.kits import read_kit
    from flapsam.federation.hospitals.site_config import read_site_config

    errors = []
    for read in (lambda: read_kit(folder / "kit", "site").days_left, lambda: read_site_config(folder / "site.yaml")):
        try:
            read()
        except FlapsamError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def save_messages(folder: Path) -> None:
    """Save a proposal and a presence message."""
    from flapsam.federation.hospitals.handshake import Presence, Proposal
    from flapsam.run.reading import read_config
    from tests.helpers.sites import write_run

    config = read_config(write_run(folder / "run.yaml", folder))
    (folder / "run.yaml").unlink()
    (folder / "proposal.json").write_text(Proposal.of("a" * 32, config).model_dump_json())
    presence = Presence(
        contract="b" * 64, backbone="c" * 64, modalities=1, cases={"train": 3}, training_cases=3, training_slices=18, held=0
    )
    (folder / "presence.json").write_text(presence.model_dump_json())


def read_messages(folder: Path) -> None:
    """Read both messages, and the configuration in the proposal."""
    from flapsam.federation.hospitals.handshake import Presence, Proposal, read_message, version_in
    from flapsam.run.config import RunConfig
    from flapsam.run.reading import validated

    errors = []
    for kind, name in ((Proposal, "proposal"), (Presence, "presence")):
        path = folder / f"{name}.json"
        # Messages come over the wire and never as a pipe or a folder.
        message = path.read_bytes()[: 2 << 20] if path.is_file() and not path.is_symlink() else b""
        version_in(message)
        try:
            read = read_message(kind, message)
            if name == "proposal" and isinstance(read.config.get("data"), dict):
                validated({**read.config, "data": {**read.config["data"], "path": "/"}}, RunConfig, "the proposed run")
        except FlapsamError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def contract() -> Any:
    """A contract, and tensors that fulfil it."""
    import torch

    from flapsam.federation.packets import Contract

    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{n}.weight": torch.randn((8, 16), generator=generator) for n in range(4)}
    return Contract.of(tensors), tensors


def save_packet(folder: Path) -> None:
    """Save a packet."""
    from flapsam.federation.packets import Header, encode

    agreed, tensors = contract()
    (folder / "a.packet").write_bytes(encode(Header(run="r", round=1, sender="a"), agreed, tensors))


def read_packet(folder: Path) -> None:
    """Decode the packet."""
    from flapsam.federation.packets import PacketRefused, decode

    path = folder / "a.packet"
    data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    try:
        decode(data, lambda header: contract()[0], 1 << 20)
    except PacketRefused as error:
        raise FlapsamError(str(error)) from error


RLE, JPEG, JPEG_LS, JPEG_2000 = (
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
)
TARGETS: dict[str, Target] = {
    "NIfTI": Target(save_image("a.nii"), read_first(".nii")),
    "NIfTI, gzip": Target(save_image("a.nii.gz"), read_first(".nii.gz")),
    "NRRD": Target(save_image("a.nrrd"), read_first(".nrrd")),
    "NRRD, gzip": Target(save_image("a.nrrd", compressed=True), read_first(".nrrd")),
    "NRRD, detached": Target(save_image("a.nhdr", compressed=True), read_first(".nhdr")),
    "MetaImage": Target(save_image("a.mha"), read_first(".mha")),
    "MetaImage, zlib": Target(save_image("a.mha", compressed=True), read_first(".mha")),
    "MetaImage, detached": Target(save_image("a.mhd"), read_first(".mhd")),
    "DICOM series": Target(save_dicom(), read_dicom),
    "DICOM, RLE": Target(save_dicom(RLE), read_dicom, share=0.5),
    "DICOM, JPEG-LS": Target(save_dicom(JPEG_LS), read_dicom, share=0.5),
    "DICOM, lossless JPEG": Target(save_dicom(JPEG), read_dicom, share=0.5),
    "DICOM, JPEG 2000": Target(save_dicom(JPEG_2000), read_dicom, share=0.5),
    "DICOM, frames": Target(save_dicom(frames=True), read_dicom),
    "DICOM, frames, RLE": Target(save_dicom(RLE, frames=True), read_dicom),
    "DICOM SEG": Target(save_seg, read_seg, share=0.5),
    "dataset.json, msd": Target(save_data("msd"), read_data("msd"), "dataset.json"),
    "dataset.json, nnunet": Target(save_data("nnunet"), read_data("nnunet"), "dataset.json"),
    "sites.csv": Target(save_data("folders"), read_data("folders"), "sites.csv"),
    "data.table": Target(save_table, read_table, "table.csv", share=0.5),
    "adapter": Target(save_adapter, read_adapter),
    "kit and site.yaml": Target(save_kit, read_site, share=2),
    "handshake": Target(save_messages, read_messages, share=2),
    "packet": Target(save_packet, read_packet, share=2),
}


# A command that reads mutations, and the one that watches it.


class Peaks:
    """Memory and disk that this process and its reading processes take.

    The system records the peak of every process that lives. Those that die are sampled.
    """

    def __init__(self) -> None:
        self.memory = self.disk = 0
        self.written: dict[int, int] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.02)
            self.sample()

    def sample(self) -> None:
        memory, disk = 0, 0
        for process in family():
            try:
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
                memory += next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
                disk += written(process) - self.written.get(process, 0)
            except (OSError, StopIteration):
                continue
        self.memory, self.disk = max(self.memory, memory), max(self.disk, disk)

    def begin(self) -> None:
        """Count from now."""
        self.written = {}
        for process in family():
            with suppress(OSError):
                Path(f"/proc/{process}/clear_refs").write_text("5")
                self.written[process] = written(process)
        self.memory = self.disk = 0

    def end(self) -> tuple[int, int]:
        """Peak of memory in bytes, and number of bytes written to disk."""
        self.sample()
        return self.memory, self.disk


def family() -> list[int]:
    """The process and its children."""
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return [os.getpid(), *(int(child) for line in children for child in line)]


def written(process: int) -> int:
    """Number of bytes that a process has written to disk."""
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def serve(name: str, start: int, count: int) -> None:
    """Read the mutations of a target, and print the outcome of each as a line of JSON."""
    warnings.simplefilter("ignore")
    import logging

    logging.disable(logging.CRITICAL)
    target, peaks = TARGETS[name], Peaks()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        sound, changed = Path(root) / "sound", Path(root) / "changed"
        sound.mkdir()
        target.make(sound)
        for _ in range(2):
            peaks.begin()
            shutil.copytree(sound, changed)
            target.read(changed)
            memory, disk = peaks.end()
            shutil.rmtree(changed)
        for index in range(start, count):
            rng = random.Random(f"{name} {index}")
            shutil.copytree(sound, changed)
            mutate(changed, target.files, rng)
            print(json.dumps({"begin": index}), flush=True)
            peaks.begin()
            outcome, message, seconds = tried(target.read, changed)
            if seconds > SECONDS:
                # Other programs may have held it up.
                seconds = min(seconds, tried(target.read, changed)[2])
            above = [peak - base for peak, base in zip(peaks.end(), (memory, disk), strict=True)]
            if "\n" in message and outcome == "refused":
                outcome, message = "traceback", f"more than a line: {message}"
            print(
                json.dumps(
                    {"index": index, "outcome": outcome, "message": message[:400], "seconds": seconds, "above": above}
                ),
                flush=True,
            )
            shutil.rmtree(changed)


def tried(read: Callable[[Path], Any], folder: Path) -> tuple[str, str, float]:
    """Read a folder, and return the outcome, the message of an error, and the seconds that it took."""
    begun, outcome, message = time.perf_counter(), "read", ""
    try:
        read(folder)
    except FlapsamError as error:
        outcome, message = "refused", str(error)
    except Exception as error:
        outcome, message = "traceback", f"{type(error).__name__}: {error}"
    return outcome, message, time.perf_counter() - begun


def again(name: str, row: dict[str, Any]) -> None:
    """Read mutations again that took too long, since other programs may have held up every try."""
    for index in list(row["slow_ones"]):
        command = [sys.executable, __file__, "--serve", name, str(index), str(index + 1)]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()
        told = json.loads(lines[-1]) if lines else {}
        if told.get("seconds", SECONDS + 1) <= SECONDS:
            row["slow_ones"].remove(index)
            row["slow"] -= 1
            row["slowest"] = max(row["slowest"], round(told["seconds"], 2))


def measure(name: str, row: dict[str, Any], count: int) -> None:
    """Continue a target's figures up to a number of mutations."""
    again(name, row)
    while row["mutations"] < count:
        command = [sys.executable, __file__, "--serve", name, str(row["mutations"]), str(count)]
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        begun = False
        while True:
            if not select.select([worker.stdout], [], [], HANGS)[0]:
                worker.kill()
                line = ""
            else:
                line = worker.stdout.readline()
            if not line:
                break
            told = json.loads(line)
            begun = "begin" in told
            if not begun:
                add(row, told)
        worker.wait()
        if begun:
            add(
                row,
                {
                    "index": row["mutations"],
                    "outcome": "died",
                    "message": f"exit code {worker.returncode}",
                    "seconds": 0,
                    "above": [0, 0],
                },
            )
        elif worker.returncode and row["mutations"] < count:
            raise SystemExit(f"{name}: the command cannot start")


def add(row: dict[str, Any], told: dict[str, Any]) -> None:
    """Count an outcome."""
    row["mutations"] += 1
    row[told["outcome"]] += 1
    row["process_died"] += "process that read it crashed" in told["message"]
    faults = [
        kind
        for kind, value, bound in (
            ("slow", told["seconds"], SECONDS),
            ("memory", told["above"][0], MEMORY),
            ("disk", told["above"][1], DISK),
        )
        if value > bound
    ]
    for fault in faults:
        row[fault] += 1
    if "slow" in faults:
        row["slow_ones"].append(told["index"])
    else:
        row["slowest"] = max(row["slowest"], round(told["seconds"], 2))
    row["most_mib"] = max(row["most_mib"], told["above"][0] >> 20)
    if faults or told["outcome"] in ("died", "traceback"):
        print(
            f"{told['index']}: {told['outcome']} {faults} {told['seconds']:.1f} s {told['above']} {told['message']}",
            flush=True,
        )


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    total = {key: sum(row[key] for row in rows.values()) for key in COUNTS}
    total |= {key: max(row[key] for row in rows.values()) for key in ("slowest", "most_mib")}
    text = [
        "# Damaged input",
        "",
        "Measured by `benchmarks/fuzz.py`. Columns after `process died` must be 0: the command died, another exception than",
        "`FlapsamError`, more than 2 s, more than 512 MiB of memory or 64 MiB of disk above the sound file. `process died`",
        "counts reading processes that died without the command.",
        "",
        "| target | mutations | read | refused | process died | command died | traceback | > 2 s | > 512 MiB "
        "| > 64 MiB disk | slowest, s | most memory, MiB |",
        "|---|" + "---:|" * 11,
    ]
    for name, row in {**rows, "total": total}.items():
        text.append(f"| {name} | " + " | ".join(str(row[key]) for key in (*COUNTS, "slowest", "most_mib")) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve[0], int(given.serve[1]), int(given.serve[2]))
        return
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in given.target:
        if given.again or name not in rows:
            rows[name] = {**dict.fromkeys((*COUNTS, "slowest", "most_mib"), 0), "slow_ones": []}
        print(f"== {name}", flush=True)
        measure(name, rows[name], int(given.count * TARGETS[name].share))
        rows = {name: rows[name] for name in TARGETS if name in rows}
        write_text(RESULTS, json.dumps(rows, indent=1) + "\n")
        write_text(RESULTS.with_suffix(".md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
