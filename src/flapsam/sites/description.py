"""``dataset.json``, which describes the data in the layouts of the Decathlon and of nnU-Net."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import one_line
from flapsam.base.names import as_name, check_distinct
from flapsam.base.text import read_document
from flapsam.run.reading import validated

DESCRIPTION = "dataset.json"

Part = TypeVar("Part", bound=BaseModel)


def read_description(path: Path, parts: type[Part]) -> Part:
    """Read ``dataset.json``.

    Args:
        path: the data's folder.
        parts: model of the keys that the layout reads. Other keys are ignored.

    Raises:
        FlapsamError: the file cannot be read, is not valid JSON, lacks a key or has a wrong value for it.
    """
    return validated(read_json(path / DESCRIPTION), parts, str(path / DESCRIPTION))


def read_json(file: Path) -> Any:
    """Read a file of JSON.

    Raises:
        FlapsamError: the file cannot be read, or is not valid JSON. The message names line and column.
    """
    try:
        return json.loads(read_document(file), object_pairs_hook=_distinct)
    except OSError as error:
        raise FlapsamError(f"{file}: cannot be read ({error.strerror}); the layouts msd and nnunet need it") from error
    except (ValueError, RecursionError) as error:
        raise FlapsamError(f"{file}: not valid JSON ({one_line(str(error))}); fix or restore the file") from error


def glance(path: Path) -> dict[str, Any]:
    """The contents of ``dataset.json``, or an empty dictionary if it is missing or cannot be read."""
    try:
        description = read_json(path / DESCRIPTION)
    except FlapsamError:
        return {}
    return description if isinstance(description, dict) else {}


def place(path: Path, file: str, entry: str) -> Path:
    """The file that an entry of ``dataset.json`` names.

    Args:
        path: the data's folder.
        file: the file's path, absolute or relative to the folder, with slashes or, as on Windows, backslashes.
        entry: the entry, for the error message.

    Raises:
        FlapsamError: the path leads out of the data's folder, or cannot be one.
    """
    # No name contains a backslash, so that one in a path comes from Windows.
    file = file.strip().replace("\\", "/")
    target = path / file
    roots = (path, path.absolute(), path.resolve())
    if ".." in Path(file).parts or not file.isprintable() or not any(target.is_relative_to(root) for root in roots):
        raise FlapsamError(
            f"{entry}: '{one_line(file[:200])}' is not a path inside the data's folder; move the file there or correct it"
        )
    try:
        target.exists()
    except OSError as error:
        raise FlapsamError(f"{entry}: '{file[:200]}' cannot be used ({error.strerror}); correct it") from error
    return target


def values_by_name(labels: Mapping[str, Any], path: Path) -> dict[str, list[int]]:
    """Name → label values, whichever way round the description has them. The background, whose value is 0, is left out.

    Args:
        labels: name → value or values, as nnU-Net v2 writes them, or value → name, as v1 and the Decathlon do.
        path: the data's folder.

    Raises:
        FlapsamError: the labels are neither, or it is unclear which, or a name is refused.
    """
    where = f"{path / DESCRIPTION}, labels"
    numbers = {name: _whole_numbers(value) for name, value in labels.items()}
    keys = [_whole(key) for key in labels]
    values_last = None not in numbers.values()
    values_first = None not in keys and all(isinstance(name, str) for name in labels.values())
    if values_last and None not in keys and any(numbers[name] != [key] for name, key in zip(labels, keys, strict=True)):
        raise FlapsamError(f'{where}: keys and values are all numbers; name the classes, such as "kidney": 1')
    if values_first:
        named = [(value, [int(key)]) for key, value in labels.items()]
    elif values_last:
        named = [(name, values or []) for name, values in numbers.items()]
    else:
        name = next(key for key, values in numbers.items() if values is None)
        shown = one_line(f"{json.dumps(name)}: {json.dumps(labels[name])}"[:200])
        raise FlapsamError(f'{where}: {shown} is neither a name with its label value nor the reverse; write "kidney": 1')
    named = [(name, values) for name, values in named if values != [0]]
    return dict(zip(class_names(path, [name for name, _ in named]), [values for _, values in named], strict=True))


def class_names(path: Path, names: Iterable[str]) -> list[str]:
    """Class names as configurations write them: in lower case, with underscores in place of spaces and slashes.

    Args:
        path: the data's folder.
        names: the names in ``dataset.json``.

    Raises:
        FlapsamError: a name is refused, or two are the same.
    """
    where = f"{path / DESCRIPTION}, labels"
    plain = [as_name(re.sub(r"[ /\\]", "_", name.strip().lower()), where) for name in names]
    check_distinct(plain, where)
    return plain


def _whole_numbers(value: Any) -> list[int] | None:
    """A whole number, or a list of some, as a list. None if it is neither."""
    numbers = [_whole(number) for number in (value if isinstance(value, list) and value else [value])]
    whole = [number for number in numbers if number is not None]
    return whole if len(whole) == len(numbers) else None


def _whole(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"key '{key[:200]}' is there twice in one place")
        tree[key] = value
    return tree
