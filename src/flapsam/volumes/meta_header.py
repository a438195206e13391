"""The header of MetaImage files (https://itk.org/Wiki/MetaIO/Documentation), checked before ITK parses it."""

import math
import re
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.volumes.allocation import check_claim
from flapsam.volumes.content import misnamed
from flapsam.volumes.header_text import (
    FIELD,
    Check,
    Header,
    are_numbers,
    broken,
    data_file,
    is_number,
    one_of,
    read_lines,
    sizes,
    whole,
)
from flapsam.volumes.stored import Stored

BYTES = {
    **dict.fromkeys(("MET_CHAR", "MET_UCHAR"), 1),
    **dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2),
    **dict.fromkeys(("MET_INT", "MET_UINT", "MET_FLOAT"), 4),
    **dict.fromkeys(("MET_LONG", "MET_ULONG"), 4),
    **dict.fromkeys(("MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8),
}
"""Type → bytes of a number."""
LINE = re.compile(r"([^=:\s][^=:]{0,199}?)\s*=\s?(.*)")
VALUE = 16_000
"""Largest length of a value that readers keep as text."""
CHANNELS = 64
"""Largest number of numbers in a voxel. More than one is refused later."""
LAST = "ElementDataFile"


def check_meta(path: Path) -> Header:
    """Check the header of a file, and that the voxels that it promises can be in the file, or in the file that it names.

    Raises:
        FlapsamError: there is no such file, or its header is not one that ITK reads without harm.
    """
    lines, end = read_lines(path, "MetaImage", lambda line: line.lstrip().startswith(LAST))
    fields: dict[str, str] = {}
    known = _checks(1)
    for number, line in enumerate(lines, start=1):
        match = LINE.fullmatch(line)
        if match is None:
            if number == 1 or not line.isprintable():
                raise FlapsamError(misnamed(path, "MetaImage"))
            raise broken(path, f"line {number} has no field")
        name, value = match[1], match[2].strip()
        if name in known:
            if name in fields:
                raise broken(path, f"the field '{name}' is there twice")
            if len(line) > FIELD:
                raise broken(path, f"line {number} is longer than {FIELD} characters")
            fields[name] = value
        elif len(value) > VALUE:
            raise broken(path, f"line {number} is longer than {VALUE} characters")
    for name in ("NDims", "DimSize", "ElementType", LAST):
        if name not in fields:
            raise broken(path, f"the field '{name}' is missing")
    axes = whole(fields["NDims"], 1, 4)
    if axes is None:
        raise broken(path, f"NDims '{fields['NDims']}' is not from 1 to 4")
    checks = _checks(axes)
    for name, value in fields.items():
        if not checks[name](value):
            raise broken(path, f"'{value[:100]}' is not a valid value of the field '{name}'")
    return Header(fields, _check_data(path, fields, axes, end), (fields.get("DistanceUnits", ""),))


def _checks(axes: int) -> dict[str, Check]:
    """Field → check of its value, for the number of axes."""
    matrix, vector, logical = are_numbers(axes * axes), are_numbers(axes), one_of("true", "false", "1", "0")

    def short(text: str) -> bool:
        return len(text) < 200

    return {
        "ObjectType": one_of("image"),
        "ObjectSubType": short,
        "NDims": lambda text: whole(text, 1, 4) is not None,
        "Name": short,
        "ID": are_numbers(1),
        "ParentID": are_numbers(1),
        "Comment": short,
        "AcquisitionDate": short,
        "Color": are_numbers(3, 4),
        "CompressedData": logical,
        "CompressedDataSize": lambda text: whole(text, 0, 2**62) is not None,
        "BinaryData": logical,
        "ElementByteOrderMSB": logical,
        "BinaryDataByteOrderMSB": logical,
        "TransformMatrix": matrix,
        "Rotation": matrix,
        "Orientation": matrix,
        "Offset": vector,
        "Position": vector,
        "Origin": vector,
        "CenterOfRotation": vector,
        "AnatomicalOrientation": lambda text: text == "?" * axes or bool(re.fullmatch(r"[RLAPSI?]{1,4}", text)),
        "DistanceUnits": lambda text: bool(re.fullmatch(r"[\w?]{0,20}", text)),
        "ElementSpacing": vector,
        "ElementSize": vector,
        "DimSize": lambda text: sizes(text, axes) is not None,
        "HeaderSize": lambda text: whole(text, -1) is not None,
        "Modality": lambda text: bool(re.fullmatch(r"[\w]{0,40}", text)),
        "SequenceID": vector,
        "ElementMin": is_number,
        "ElementMax": is_number,
        "ElementNumberOfChannels": lambda text: whole(text, 1, CHANNELS) is not None,
        "ElementToIntensityFunctionSlope": is_number,
        "ElementToIntensityFunctionOffset": is_number,
        "ElementNBits": lambda text: whole(text, 1, 64) is not None,
        "ElementType": lambda text: text in BYTES,
        LAST: lambda text: text.upper() != "LIST" and not text.upper().startswith("LIST "),
    }


def _check_data(path: Path, fields: dict[str, str], axes: int, end: int) -> Stored | None:
    voxels = math.prod(sizes(fields["DimSize"], axes) or []) * int(fields.get("ElementNumberOfChannels", 1))
    claimed = voxels * BYTES[fields["ElementType"]]
    detached = None if fields[LAST].upper() == "LOCAL" else data_file(path, fields[LAST])
    stored = (detached or path).stat().st_size - (0 if detached else end)
    compressed, binary = _is_true(fields, "CompressedData"), _is_true(fields, "BinaryData", "true")
    skipped = int(fields.get("HeaderSize", 0))
    if max(skipped, 0) > stored or int(fields.get("CompressedDataSize", 0)) > stored:
        raise broken(path, "it promises more bytes than the file has")
    if skipped and not (detached and binary and not compressed):
        raise broken(path, "the field 'HeaderSize' is only for plain voxels in another file")
    orders = {_is_true(fields, name) for name in ("ElementByteOrderMSB", "BinaryDataByteOrderMSB") if name in fields}
    if len(orders) > 1:
        raise broken(path, "it contradicts itself about the order of bytes")
    if not binary and not compressed:
        check_claim(path, 2 * voxels - 1, compressed=False, stored=stored)
        return None
    check_claim(path, claimed, compressed=compressed, stored=stored - max(skipped, 0))
    offset = stored - claimed if skipped < 0 else skipped
    return Stored(detached or path, offset if detached else end, BYTES[fields["ElementType"]], True in orders, compressed)


def _is_true(fields: dict[str, str], name: str, default: str = "false") -> bool:
    return fields.get(name, default).lower() in ("true", "1")
