"""Fill pages with tables of commands and fields while they are built, so that the tables always match the code.

A page has ``<!-- commands -->`` or ``<!-- fields flapsam.run.config.Training -->`` where a table belongs.
"""

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import griffe
import typer
import yaml
from pydantic import BaseModel

from flapsam.cli import app
from flapsam.run.config import RunConfig
from flapsam.run.presets import PRESETS

MARKER = re.compile(r"^<!-- (commands|fields (\S+)) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers in a page's Markdown. MkDocs calls this before it renders the page."""
    return MARKER.sub(lambda marker: fields(marker[2]) if marker[2] else commands(), markdown)


def commands() -> str:
    """Describe every command, with its arguments and options."""
    return "\n".join(_described("flapsam", typer.main.get_command(app)))


def _described(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for part, below in command.commands.items():
            yield from _described(f"{name} {part}", below)
        return
    shown = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    usage = " ".join([name, *map(_usage, arguments), *(f"{_longest(p)} {_value(p)}" for p in shown if _is_needed(p))])
    yield f"## {name}\n\n{command.help}\n\n```\n{usage} [options]\n```\n"
    yield "| argument or option | default | meaning |\n|---|---|---|"
    for parameter in shown:
        names = [_usage(parameter)] if parameter in arguments else [*parameter.opts, *parameter.secondary_opts]
        value = "" if parameter in arguments or parameter.is_flag else f" `{_value(parameter)}`"
        default = "required" if parameter.required else _shown(parameter.default, parameter)
        yield f"| {', '.join(f'`{name}`' for name in names)}{value} | {default} | {_cell(parameter.help or '')} |"
    yield ""


def _is_needed(parameter: Any) -> bool:
    return parameter.required and parameter.param_type_name == "option"


def _longest(parameter: Any) -> str:
    return max(parameter.opts, key=len)


def _value(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _usage(parameter: Any) -> str:
    return _value(parameter) if parameter.required or parameter.metavar else f"[{_value(parameter)}]"


def _shown(default: Any, parameter: Any) -> str:
    flag = getattr(parameter, "is_flag", False) and not parameter.secondary_opts
    return "" if default in (None, "") or flag else f"`{_longest(parameter) if default is True else default}`"


def fields(path: str) -> str:
    """Make a table of a model's fields, with their meanings and their defaults, by preset if these differ.

    Fields that are groups of fields themselves are left out.

    Args:
        path: module and name of the model.

    Raises:
        ValueError: a field has no description.
    """
    module, name = path.rsplit(".", 1)
    model: type[BaseModel] = getattr(import_module(module), name)
    documented = griffe.load(module, search_paths=["src"])[name].members
    groups = {key: field.annotation for key, field in RunConfig.model_fields.items()}
    group = next((key for key, kind in groups.items() if model is kind or model in get_args(kind)), "")
    columns = _columns(model, group)
    rows = [f"| field | {' | '.join(columns)} | meaning |\n|---|{'---|' * len(columns)}---|"]
    for field, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            continue
        if documented[field].docstring is None:
            raise ValueError(f"{path}.{field} has no description; write a string below it")
        default = "required" if info.is_required() else _yaml(info.get_default(call_default_factory=True))
        values = [_yaml(column[field]) if field in column else default for column in columns.values()]
        where = f"`{group}.{field}`" if group else f"`{field}`"
        rows.append(f"| {' | '.join([where, *values, _cell(documented[field].docstring.value)])} |")
    return "\n".join(rows) + "\n"


def _columns(model: type[BaseModel], group: str) -> Mapping[str, Mapping[str, Any]]:
    """Heading of a column → values that replace the fields' own defaults."""
    if model is RunConfig:
        return {f"`{name}`": {**values, "preset": name} for name, values in PRESETS.items()}
    if any(group in values for values in PRESETS.values()):
        return {f"`{name}`": values.get(group, {}) for name, values in PRESETS.items()}
    return {"default": {}}


def _yaml(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, list) and any(isinstance(part, BaseModel) for part in value):
        return "one cell, the run itself"
    plain = list(value) if isinstance(value, tuple) else f"{value}" if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def _cell(text: str) -> str:
    """The text in the form of one table cell."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())
