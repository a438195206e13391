"""The documentation's pages, taken apart: blocks of code, commands and links."""

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
    """The heading that it stands under."""
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order; ``""`` is a block of commands."""
    found, section = [], ""
    for heading, indent, language, text in re.findall(
        r"^#+ ([^\n]+)$|^( *)```(\w*)[^\n]*\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        if heading:
            section = heading
        elif language in languages:
            lines = [line.removeprefix(indent) for line in text.splitlines()]
            found.append(Block(page, section, language, "\n".join(lines) + "\n"))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of flapsam in a block of commands."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("flapsam "):
            yield shlex.split(line, comments=True)[1:]


def inline_commands(page: Path) -> Iterator[list[str]]:
    """The same of those within sentences, such as `flapsam data list`."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for found in re.findall(r"`flapsam ([^`]+)`", text):
        yield [word for word in shlex.split(found) if word != "…"]


def links(page: Path) -> Iterator[str]:
    """What a page links to, outside of blocks of code."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """What can stand behind a # in links to a page, as both MkDocs and GitHub make them from headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
