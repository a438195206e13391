"""A configuration as its author wrote it: the fields, and the line of each, which error messages quote.

YAML reads some words and numbers as something else than people mean: no as false, 010 as 8, 1:30 as 90. Where that could
pass unnoticed, it is an error that quotes the line.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flapsam.base.errors import FlapsamError
from flapsam.base.escaping import one_line
from flapsam.base.text import read_document

Place = tuple[str | int, ...]
"""Keys and indices that lead to a part of the fields."""
SHOWN = 100
"""Number of characters of a line that a message shows."""
TAG = "tag:yaml.org,2002:"
TYPOGRAPHIC = "“”„‟‘’‚«»"
"""Quotation marks of word processors. To YAML they are letters."""


@dataclass
class Document:
    """The fields of a configuration, and where each was written."""

    tree: Any
    lines: dict[Place, str] = field(default_factory=dict)
    """Place → number and text of its line, or the assignment on the command line."""
    words: dict[Place, str] = field(default_factory=dict)
    """Place → the word that YAML read as something that is not text, as it was written."""

    def quote(self, place: Place) -> str:
        """The author's own line, in brackets, for the end of a sentence. Empty if it is not known."""
        for length in range(len(place), 0, -1):
            if line := self.lines.get(place[:length]):
                return f" ({line})"
        return ""

    def forget(self, place: Place) -> None:
        """Forget what was written at a place and below it, since something else replaces it."""
        for noted in (self.lines, self.words):
            for other in [other for other in noted if other[: len(place)] == place]:
                del noted[other]

    def misread(self, place: Place, value: Any) -> str:
        """A sentence about a word that YAML reads as something that is not text. Empty if there is none."""
        word = self.words.get(place)
        return f"YAML reads {word} as {meaning(value)}, so put it in quotation marks if it is text" if word else ""


def read_yaml(path: Path) -> Document:
    """Read a file of YAML.

    Raises:
        FlapsamError: the file cannot be read, is not valid YAML, or says something that cannot be meant.
    """
    try:
        text = read_document(path)
    except OSError as error:
        raise FlapsamError(f"{path}: cannot read the configuration ({error.strerror})") from error
    return parse(text, str(path))


def parse(text: str, where: str, place: Place = (), assigned: str = "") -> Document:
    """Parse YAML.

    Args:
        text: the YAML.
        where: the file or assignment, for error messages.
        place: where the text belongs among the fields. The places of the result begin with it.
        assigned: the assignment that the text is part of, which messages quote in place of a line.

    Raises:
        FlapsamError: the text is not valid YAML, or says something that cannot be meant.
    """
    source = _Source(text.splitlines(), assigned)
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        document = Document(None)
        if node is not None:
            for mark, fault in _faults(node, place, document, source, set()):
                raise FlapsamError(f"{where}: {fault} ({source.line(mark)})")
            document.tree = loader.construct_document(node)
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        quoted = f" ({source.line(mark)})" if mark else ""
        raise FlapsamError(f"{where}: not valid YAML: {one_line(error.problem or 'it cannot be read')}{quoted}") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        raise FlapsamError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        if loader is not None:
            loader.dispose()


def meaning(value: Any) -> str:
    """What YAML has read, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the number {value}" if isinstance(value, int | float) else "a date"


@dataclass(frozen=True)
class _Source:
    lines: list[str]
    assigned: str

    def line(self, mark: Any) -> str:
        """The line of a mark, with its number."""
        if self.assigned:
            return one_line(self.assigned[:SHOWN])
        text = self.lines[mark.line].strip(" ") if mark.line < len(self.lines) else "the end of the file"
        return f"line {mark.line + 1}: {one_line(text[:SHOWN])}"


def _faults(node: yaml.Node, place: Place, document: Document, source: _Source, seen: set[int]) -> Iterator[tuple[Any, str]]:
    """Walk through the nodes, note the line of each, and yield what cannot be meant, with its mark."""
    if id(node) in seen:
        return
    seen.add(id(node))
    document.lines.setdefault(place, source.line(node.start_mark))
    if isinstance(node, yaml.MappingNode):
        keys: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{TAG}merge":
                continue
            if fault := _fault_of_pair(key, value, place, keys):
                yield key.start_mark, fault
            keys[key.value] = key.start_mark
            # A single value may stand in a line below its name.
            shown = value if isinstance(value, yaml.ScalarNode) and value.value else key
            document.lines[*place, key.value] = source.line(shown.start_mark)
            yield from _faults(value, (*place, key.value), document, source, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _faults(item, (*place, index), document, source, seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        if node.tag != f"{TAG}str":
            document.words[place] = node.value
        if fault := _fault_of_word(node):
            yield node.start_mark, fault


def _fault_of_pair(key: yaml.ScalarNode, value: yaml.Node, place: Place, keys: dict[str, Any]) -> str:
    if key.value in keys:
        return f"'{one_line(key.value[:SHOWN])}' stands here and in line {keys[key.value].line + 1}; remove one"
    labels = place[-1:] == ("labels",) or place[-2:-1] == ("site_labels",)
    if labels and _is_whole(key.value) and value.tag == f"{TAG}str" and not _is_whole(str(value.value)):
        return f"labels are written as name: value; write {one_line(str(value.value)[:SHOWN])}: {key.value}"
    if key.style is None and key.tag != f"{TAG}str":
        if not value.value:
            return f"{key.value} has no value; in braces, a comma begins another field"
        return f"YAML reads the name {key.value} as {_read_as(key)}; put it in quotation marks"
    return _fault_of_word(key) if key.style is None else ""


def _fault_of_word(node: yaml.ScalarNode) -> str:
    word, kind = node.value, node.tag.removeprefix(TAG)
    if kind == "timestamp":
        return f"YAML reads {word} as a date; put it in quotation marks"
    octal = kind == "int" and re.fullmatch(r"[-+]?0[0-7_]+", word)
    if octal or (kind in ("int", "float") and ":" in word):
        base = "8" if octal else "60"
        return (
            f"YAML reads {word} as {_read_as(node)}, in base {base}; write the number in base 10, or text in quotation marks"
        )
    if kind == "float" and word.lower() == ".nan":
        return f"{word} is not a number; write one"
    if kind == "str" and word[:1] in TYPOGRAPHIC and word:
        return f"{word[:1]} is a word processor's quotation mark; write \" or '"
    return ""


def _read_as(node: yaml.ScalarNode) -> str:
    return meaning(yaml.safe_load(node.value)) if node.tag != f"{TAG}timestamp" else "a date"


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[-+]?\d+", text) is not None
