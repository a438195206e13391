"""The header of NRRD files (http://teem.sourceforge.net/nrrd/format.html), checked before ITK parses it.

ITK crashes on lines that it cannot parse, and trusts what it can.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from flapsam.base.errors import FlapsamError
from flapsam.volumes.allocation import check_claim
from flapsam.volumes.content import misnamed
from flapsam.volumes.header_text import (
    FIELD,
    Check,
    Header,
    broken,
    data_file,
    is_any,
    is_number,
    one_of,
    read_lines,
    sizes,
    whole,
)
from flapsam.volumes.stored import Stored

_NAMES = {
    1: "signed char,int8,int8_t,uchar,unsigned char,uint8,uint8_t",
    2: "short,short int,signed short,signed short int,int16,int16_t,"
    "ushort,unsigned short,unsigned short int,uint16,uint16_t",
    4: "int,signed int,int32,int32_t,uint,unsigned int,uint32,uint32_t,float",
    8: "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t,"
    "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t,double",
}
BYTES = {name: size for size, names in _NAMES.items() for name in names.split(",")}
"""Type → bytes of a number."""
SPACES = {
    **dict.fromkeys(
        ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps"), 3
    ),
    **dict.fromkeys(("scanner-xyz", "3d-right-handed", "3d-left-handed"), 3),
}
"""Name of a space → its dimension. Spaces with time are left out, since volumes have none."""
WORDS = re.compile(r"[\w?.*-]+(\s+[\w?.*-]+)*", re.ASCII)
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
VECTOR = re.compile(r"\(([^()]*)\)")
SHORTEST = {"raw": 1.0, "ascii": 2.0, "text": 2.0, "txt": 2.0, "hex": 2.0}
"""Encoding without compression → least number of bytes that it takes, for each voxel if it is text, else for each byte."""
COMPRESSED = ("gzip", "gz")


def check_nrrd(path: Path) -> Header:
    """Check the header of a file, and that the voxels that it promises can be in the file, or in the file that it names.

    Raises:
        FlapsamError: there is no such file, or its header is not one that ITK reads without harm.
    """
    lines, end = read_lines(path, "NRRD", lambda line: not line)
    if not re.fullmatch(r"NRRD000[1-5]", lines[0]):
        raise FlapsamError(misnamed(path, "NRRD"))
    fields = _fields(path, lines[1:])
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in fields:
            raise broken(path, f"the field '{name}' is missing")
    axes = whole(fields["dimension"], 1, 4)
    if axes is None:
        raise broken(path, f"dimension '{fields['dimension']}' is not from 1 to 4")
    if "none" in fields.get("spacedirections", "") and axes - fields["spacedirections"].split().count("none") < 3:
        raise FlapsamError(f"{path}: a 3-D volume is needed, but fewer than three of its axes have a direction in space")
    if fields.get("spacedimension", "").strip() == "4":
        raise FlapsamError(f"{path}: a 3-D volume is needed, but this file's space has four dimensions; save it as 3-D")
    space = SPACES.get(fields.get("space", "").lower()) or whole(fields.get("spacedimension", "3"), 1, 3)
    checks = _checks(axes, space or 0)
    for name, value in fields.items():
        if not checks[name](value):
            raise broken(path, f"'{value[:100]}' is not a valid value of the field '{name}'")
    return Header(fields, _check_data(path, fields, axes, end), _units(fields))


def place_of(fields: dict[str, str]) -> dict[str, Any] | None:
    """The fields with the position of a volume's voxels, as pynrrd writes them. None if there are not three directions."""
    vectors = [_vector(text) for text in VECTOR.findall(fields.get("spacedirections", ""))]
    if [len(vector) for vector in vectors] != [3, 3, 3]:
        return None
    place: dict[str, Any] = {"space": fields["space"]} if "space" in fields else {"space dimension": 3}
    place["space directions"] = np.array(vectors)
    if "spaceorigin" in fields:
        place["space origin"] = np.array(_vector(fields["spaceorigin"].strip("()")))
    if "measurementframe" in fields:
        place["measurement frame"] = np.array([_vector(text) for text in VECTOR.findall(fields["measurementframe"])])
    return place


def _vector(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _units(fields: dict[str, str]) -> tuple[str, ...]:
    """The units of the space, or those of the axes that lie in it."""
    units = [_quoted(text) for text in QUOTED.findall(fields.get("spaceunits", ""))]
    if not units:
        units = [_quoted(text) for text in QUOTED.findall(fields.get("units", ""))]
        words = VECTOR.sub("()", fields.get("spacedirections", "")).split()
        units = [unit for index, unit in enumerate(units) if words[index : index + 1] != ["none"]]
    return tuple(units)


def _quoted(text: str) -> str:
    """A text without its quotes. Headers are ASCII, but some have UTF-8 in them."""
    inner = text[1:-1].encode("latin-1")
    try:
        return inner.decode()
    except UnicodeDecodeError:
        return inner.decode("latin-1")


def _fields(path: Path, lines: list[str]) -> dict[str, str]:
    """The fields of a header, by name without spaces. Comments and the user's own keys are left out."""
    known = set(_checks(1, 3))
    fields: dict[str, str] = {}
    for number, line in enumerate(lines, start=2):
        name, _, value = line.partition(": ")
        name = name.lower().replace(" ", "")
        if not line or line.startswith("#"):
            continue
        if name in known:
            if name in fields:
                raise broken(path, f"the field '{name}' is there twice")
            if len(line) > FIELD and name not in ("content", "labels"):
                raise broken(path, f"line {number} is longer than {FIELD} characters")
            fields[name] = value.strip()
        elif ":=" not in line:
            raise broken(path, f"line {number} has no field")
    return fields


def _checks(axes: int, space: int) -> dict[str, Check]:
    """Field → check of its value, for the number of axes and the dimension of the space."""

    def floats(text: str) -> bool:
        return len(text.split()) == axes and all(word.lower() == "nan" or is_number(word) for word in text.split())

    def words(text: str) -> bool:
        return bool(WORDS.fullmatch(text)) and len(text.split()) == axes

    def vectors(count: int, *, none: bool) -> Check:
        def check(text: str) -> bool:
            found = VECTOR.findall(text)
            rest = VECTOR.sub(" ", text).split()
            valid = all(len(v.split(",")) == space and all(is_number(n.strip()) for n in v.split(",")) for v in found)
            return valid and len(found) + len(rest) == count and (not rest or (none and set(rest) == {"none"}))

        return check

    def texts(count: int) -> Check:
        return lambda text: len(QUOTED.findall(text)) == count and not QUOTED.sub("", text).strip()

    return {
        "type": one_of(*BYTES),
        "dimension": lambda text: whole(text, 1, 4) is not None,
        "sizes": lambda text: sizes(text, axes) is not None,
        "space": one_of(*SPACES),
        "spacedimension": lambda text: whole(text, 1, 3) is not None,
        "spacings": floats,
        "thicknesses": floats,
        "axismins": floats,
        "axismaxs": floats,
        "spacedirections": vectors(axes, none=True),
        "spaceorigin": vectors(1, none=False),
        "measurementframe": vectors(space, none=True),
        "centers": words,
        "centerings": words,
        "kinds": words,
        "labels": texts(axes),
        "units": texts(axes),
        "spaceunits": texts(space),
        "endian": one_of("little", "big"),
        "encoding": one_of(*SHORTEST, *COMPRESSED),
        "lineskip": lambda text: whole(text, 0) is not None,
        "byteskip": lambda text: whole(text, -1) is not None,
        "datafile": lambda text: not text.upper().startswith("LIST"),
        "number": lambda text: whole(text, 0, 2**63) is not None,
        "oldmin": is_number,
        "oldmax": is_number,
        "min": is_number,
        "max": is_number,
        "content": is_any,
        "sampleunits": lambda text: len(text) < 200,
    }


def _check_data(path: Path, fields: dict[str, str], axes: int, end: int) -> Stored | None:
    voxels = math.prod(sizes(fields["sizes"], axes) or [])
    size, encoding = BYTES[fields["type"].lower()], fields["encoding"].lower()
    if size > 1 and "endian" not in fields and encoding not in ("ascii", "text", "txt"):
        raise broken(path, "the field 'endian' is missing")
    detached = data_file(path, fields["datafile"]) if "datafile" in fields else None
    stored = (detached or path).stat().st_size - (0 if detached else end)
    skipped = int(fields.get("lineskip", 0)) + max(int(fields.get("byteskip", 0)), 0)
    if skipped > stored:
        raise broken(path, "it skips more than the file has")
    text = encoding in ("ascii", "text", "txt")
    least = voxels if encoding in COMPRESSED else math.ceil(voxels * SHORTEST[encoding])
    compressed = encoding in COMPRESSED
    check_claim(path, (least if text else least * size), compressed=compressed, stored=stored + text)
    if skipped or "byteskip" in fields or encoding not in ("raw", *COMPRESSED):
        return None
    return Stored(detached or path, 0 if detached else end, size, fields.get("endian", "").lower() == "big", compressed)
