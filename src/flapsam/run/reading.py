"""Reading and writing configurations, which users write as YAML."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from flapsam.base.errors import FlapsamError
from flapsam.base.files import exists, read_text
from flapsam.run.config import RunConfig, StrictModel

PATHS = ("data.path", "data.table", "backbone.weights", "output")
"""Fields of ``RunConfig`` that are paths."""

Described = TypeVar("Described", bound=StrictModel)


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
    try:
        tree = yaml.safe_load(read_text(path))
    except OSError as error:
        raise FlapsamError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        raise FlapsamError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise FlapsamError(f"{path}: a configuration is a mapping of fields; see the README for an example")
    for field in paths:
        _make_relative(tree, field, path.parent)
    for override in overrides:
        _set(tree, override)
    return validated(tree, model, str(path))


def validated(tree: Any, model: type[Described], where: str) -> Described:
    """Build a model from a tree of fields.

    Raises:
        FlapsamError: a field is unknown or wrong. The message begins with ``where``.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        # An unknown key may hold line breaks.
        raise FlapsamError(f"{where}: {' '.join(problems.split())}") from error


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


def _set(tree: dict[str, Any], assignment: str) -> None:
    field, equals, value = assignment.partition("=")
    if not equals or not field:
        raise FlapsamError(f"--set {assignment}: write it as field=value, such as --set training.batch_size=4")
    try:
        _put(tree, field, yaml.safe_load(value), f"--set {assignment}")
    except yaml.YAMLError as error:
        raise FlapsamError(f"--set {assignment}: the value is not valid YAML") from error


def _put(tree: dict[str, Any], field: str, value: Any, where: str) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise FlapsamError(f"{where}: {parent} is a single value, not a group of fields")
    tree[last] = value


def _describe(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained")))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{field}'; remove it or correct its spelling"
    if problem["type"] == "missing":
        return f"'{field}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"'{field}': {message}" if field else message
