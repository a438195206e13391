"""Units of length in the headers of images. Everywhere else in flapsam, lengths are in millimetres."""

from collections.abc import Iterable

from flapsam.base.errors import FlapsamError

_NAMES = {
    1e-6: "nm nanometer nanometers nanometre nanometres",
    1e-3: "um µm μm micron microns micrometer micrometers micrometre micrometres",
    1.0: "mm millimeter millimeters millimetre millimetres",
    10.0: "cm centimeter centimeters centimetre centimetres",
    1000.0: "m meter meters metre metres",
}
MILLIMETRES = {name: factor for factor, names in _NAMES.items() for name in names.split()}
"""Name of a unit → its length in mm."""
UNKNOWN = ("", "?", "??", "???")
"""Names that say nothing, for which millimetres are the convention of all formats."""


def millimetres(units: Iterable[str], what: object) -> float:
    """Length in mm of the unit that a header names.

    Args:
        units: name of each axis's unit, such as ``mm`` or ``microns``. An axis without a unit has that of the others.
        what: the image for the error message.

    Raises:
        FlapsamError: a unit is unknown, or the axes have different units.
    """
    named = list(dict.fromkeys(unit.strip() for unit in units if unit.strip() not in UNKNOWN))
    for unit in named:
        if unit.lower() not in MILLIMETRES:
            raise FlapsamError(f"{what}: its header gives lengths in '{unit[:40]}'; export it in millimetres")
    lengths = {MILLIMETRES[unit.lower()] for unit in named}
    if len(lengths) > 1:
        raise FlapsamError(f"{what}: its axes have different units, {', '.join(named)}; export it in millimetres")
    return lengths.pop() if lengths else 1.0
