"""Parse the documentation's pages into code blocks, commands and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.places import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    section: str
    """Heading above the block."""
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order. ``""`` stands for blocks of commands."""
    result, section = [], ""
    for heading, indent, language, text in re.findall(
        r"^#+ ([^\n]+)$|^( *)```(\w*)[^\n]*\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        if heading:
            section = heading
        elif language in languages:
            lines = [line.removeprefix(indent) for line in text.splitlines()]
            result.append(Block(page, section, language, "\n".join(lines) + "\n"))
    return result


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each flapsam command in a block of commands."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("flapsam "):
            yield shlex.split(line, comments=True)[1:]


def inline_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each flapsam command within a sentence, such as `flapsam data list`."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for command in re.findall(r"`flapsam ([^`]+)`", text):
        yield [word for word in shlex.split(command) if word != "…"]


def links(page: Path) -> Iterator[str]:
    """Yield the targets of a page's links, except those in code blocks."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both MkDocs and GitHub derive them."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
