"""Reading and writing configurations, which users write as YAML."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import one_line
from flapsam.base.files import exists
from flapsam.run.config import RunConfig
from flapsam.run.document import Document, Place, meaning, parse, read_yaml

PATHS = ("data.path", "data.table", "backbone.weights", "output")
"""Fields of ``RunConfig`` that are paths."""

Described = TypeVar("Described", bound=BaseModel)

SHOWN = 200
"""Number of characters of a field's name that a message shows."""
BETWEEN = r"[,;\s]+"
NUMBERS = re.compile(rf"\s*[-+]?[\d.]+({BETWEEN}[-+]?[\d.]+)+\s*")
"""Numbers as people write a list of them without brackets."""
NAMED = 3
"""Number of faults that a message lists. If there are more, they are only counted."""


def read_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration.

    Relative paths in the file are relative to the file's folder, those in overrides to the current folder.

    Args:
        path: the YAML file.
        overrides: assignments such as ``training.batch_size=4``, whose right side is YAML.

    Raises:
        FlapsamError: the file is missing or not valid YAML, or a field is unknown or wrong. The message names the field.
    """
    return read_options(path, RunConfig, PATHS, overrides)


def read_options(path: Path, model: type[Described], paths: Iterable[str] = (), overrides: Iterable[str] = ()) -> Described:
    """Read a configuration of any kind, as ``read_config`` does for a run.

    Args:
        path: the YAML file.
        model: the model of its fields.
        paths: fields of the model that are paths.
        overrides: assignments, as for ``read_config``.

    Raises:
        FlapsamError: as for ``read_config``.
    """
    document = read_yaml(path)
    tree = document.tree
    if not isinstance(tree, dict):
        raise FlapsamError(f"{path}: a configuration is a mapping of fields; see the README for an example")
    for field in paths:
        _make_relative(tree, field, path.parent)
    for override in overrides:
        _set(document, override)
    options = validated(tree, model, str(path), document)
    for place, word in _words_as_numbers(tree, options.model_dump()):
        raise FlapsamError(
            f"{path}: '{_dotted(place)}' is a number, but YAML reads {document.words.get(place, word)} as {meaning(word)}; "
            f"write a number{document.quote(place)}"
        )
    return options


def validated(tree: Any, model: type[Described], where: str, document: Document | None = None) -> Described:
    """Build a model from a tree of fields.

    Args:
        tree: the fields.
        model: the model.
        where: beginning of the error message.
        document: what the author of the fields wrote, if it is known. Error messages quote it.

    Raises:
        FlapsamError: a field is unknown or wrong.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise FlapsamError(f"{where}: {described(error, document or Document(tree))}") from error


def described(error: ValidationError, document: Document | None = None) -> str:
    """What is wrong with the fields of a model, in one line.

    Args:
        error: the faults.
        document: what the author of the fields wrote, if it is known.
    """
    faults: dict[Place, str] = {}
    for problem in error.errors():
        # A field with several types has a fault for each of them.
        place = _place(problem["loc"], document.tree if document else None)
        fault = _describe(problem, place, document or Document(None))
        # A group's own check names the field that it is about.
        field = tuple(problem["msg"].removeprefix("Value error, ").partition(":")[0].split("."))
        quote = document.quote((*place, *field)) if document else ""
        faults.setdefault(place, fault + quote)
    problems = [fault for place, fault in faults.items() if not any(_is_inside(other, place) for other in faults)]
    more = [f"{len(problems) - NAMED} more"] if len(problems) > NAMED else []
    return "; ".join([*problems[:NAMED], *more])


def write_config(config: RunConfig) -> str:
    """The configuration as YAML, with every field written out and every path absolute."""
    tree = config.model_dump(mode="json")
    for field in PATHS:
        _make_relative(tree, field, Path.cwd())
    return yaml.safe_dump(tree, sort_keys=False)


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The same configuration with other values for some fields, such as ``lora.rank``.

    Raises:
        FlapsamError: a field is unknown or its value is wrong.
    """
    tree = config.model_dump()
    for field, value in changes.items():
        _put(tree, field, value, field)
    return validated(tree, RunConfig, "bench")


def flat(config: RunConfig, *without: str) -> dict[str, str]:
    """Every field's dotted name, such as ``training.batch_size``, with its value as text.

    Args:
        config: the configuration.
        without: groups or fields of the first level to leave out.
    """
    values: dict[str, str] = {}

    def walk(tree: Any, prefix: str) -> None:
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            values[prefix] = str(tree)

    walk(config.model_dump(mode="json", exclude=set(without)), "")
    return values


def fingerprint(config: RunConfig) -> str:
    """SHA-256 of everything that a run's result may depend on, apart from the machine."""
    # Defaults are left out, so that a field that a later version adds does not change the fingerprint.
    tree = config.model_dump(mode="json", exclude_defaults=True)
    for field in ("format", "output", "bench", "threads", "device", "licence", "notes", "inference_batch"):
        tree.pop(field, None)
    del tree["data"]["path"]
    # Whom a run between hospitals waits for. Without other fields, the section is as if it had not been given.
    if tree.get("rounds", {}).pop("require", None) is not None and not tree["rounds"]:
        del tree["rounds"]
    # The default's name counts, too, except for sam-tiny-1, which was the default once, so that old results count for it.
    backbone = {**tree.pop("backbone", {}), "name": config.backbone.name}
    if backbone["name"] == "sam-tiny-1":
        del backbone["name"]
    if backbone:
        tree["backbone"] = backbone
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _make_relative(tree: dict[str, Any], field: str, folder: Path) -> None:
    """Resolve a relative path in the tree against ``folder``, if the tree has this field."""
    *parents, last = field.split(".")
    for parent in parents:
        tree = tree.get(parent) if isinstance(tree.get(parent), dict) else {}  # type: ignore[assignment]
    value = tree.get(last)
    # The value may also be the name of a backbone instead of a file.
    if isinstance(value, str) and (last != "weights" or Path(value).suffix or exists(folder / value)):
        tree[last] = os.path.normpath(folder / value)


def _set(document: Document, assignment: str) -> None:
    field, equals, value = assignment.partition("=")
    written = f"--set {assignment}"
    if not equals or not field:
        raise FlapsamError(f"{written}: write it as field=value, such as --set training.batch_size=4")
    place = tuple(field.split("."))
    part = parse(value, written, place, written)
    _put(document.tree, field, part.tree, written)
    document.forget(place)
    document.lines |= part.lines
    document.words |= part.words


def _put(tree: dict[str, Any], field: str, value: Any, where: str) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise FlapsamError(f"{where}: {parent} is a single value, not a group of fields")
    tree[last] = value


def _place(loc: Iterable[str | int], tree: Any) -> Place:
    """The place in the tree that a fault is about. Pydantic's own words, such as those for types, are left out."""
    if tree is None:
        return tuple(part for part in loc if not str(part).startswith(("function-", "constrained", "[key]")))
    place: list[str | int] = []
    for part in loc:
        known: dict[Any, Any] = tree if isinstance(tree, dict) else dict(enumerate(tree)) if isinstance(tree, list) else {}
        if part in known:
            tree = known[part]
            place.append(part)
    return tuple(place)


def _describe(problem: Any, place: Place, document: Document) -> str:
    field = _dotted(place)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{field}'; remove it or correct its spelling"
    if problem["type"] == "missing":
        return f"'{_dotted((*place, problem['loc'][-1]) if place[-1:] != problem['loc'][-1:] else place)}' is missing"
    message = "must be a path" if problem["type"] == "path_type" else problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    if value is None:
        message = "it has no value; give it one, or remove it"
    elif problem["type"] == "model_type":
        message = "must be a mapping of fields"
    elif isinstance(value, str) and NUMBERS.fullmatch(value) and problem["type"] != "float_parsing":
        message = f"several numbers are written as [{', '.join(re.split(BETWEEN, value.strip()))}]"
    elif isinstance(value, str) and value.casefold() in ("none", "nil") and problem["type"] != "literal_error":
        message += "; for no value, write null"
    elif not isinstance(value, str) and (misread := document.misread(place, value)):
        message += f"; {misread}"
    return f"'{field}': {message}" if field else message


def _words_as_numbers(tree: Any, dumped: Any, place: Place = ()) -> Iterator[tuple[Place, bool]]:
    """True and false where the model has a number, which pydantic takes for 1 and 0."""
    if isinstance(tree, bool):
        if isinstance(dumped, int | float) and not isinstance(dumped, bool):
            yield place, tree
    elif isinstance(tree, dict) and isinstance(dumped, dict):
        for key, value in tree.items():
            yield from _words_as_numbers(value, dumped.get(key), (*place, key))
    elif isinstance(tree, list) and isinstance(dumped, list | tuple):
        for index, (value, own) in enumerate(zip(tree, dumped, strict=False)):
            yield from _words_as_numbers(value, own, (*place, index))


def _is_inside(place: Place, other: Place) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _dotted(place: Place) -> str:
    return one_line(".".join(map(str, place))[:SHOWN])
