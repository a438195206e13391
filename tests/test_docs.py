"""The documentation is correct: its commands run or exist, its links resolve, and its configurations are valid."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
import yaml

from flapsam.cli import app
from flapsam.federation.engines.nvflare.kits import FederationFile
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.run.config import RunConfig
from flapsam.run.reading import validated
from tests.helpers.command import flapsam
from tests.helpers.docs import DOCS, PAGES, ROOT, Block, anchors, blocks, commands, inline_commands, links

SERVES = "view"
"""A command that runs until Ctrl-C, so it is skipped here."""
SMALLER = {
    "flapsam data phantom sites": "flapsam data phantom sites --sites 2 --cases 4",
    "--cases 3 --seed 7": "--cases 2 --seed 7",
    "size: 128 ": "size: 32 ",
    "count: 12,": "count: 2,",
    "batch_size: 4 ": "batch_size: 12 ",
}
"""Text of the tutorial → its replacement, with fewer cases, rounds, pixels and steps, so that it runs in a minute."""


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run the blocks in order: commands, files to write, and Python."""
    monkeypatch.chdir(tmp_path)
    applied = set()
    run = []
    for block in blocks(DOCS / "tutorial.md", "", "yaml", "python"):
        text = block.text
        for original, smaller in SMALLER.items():
            if original in text:
                applied.add(original)
                text = text.replace(original, smaller)
        if block.language == "yaml":
            name = text.splitlines()[0].removeprefix("# ")
            assert Path(name).exists(), "init writes this file"
            Path(name).write_text(text)
        elif block.language == "python":
            exec(text, {})
        else:
            for words in commands(Block(block.page, block.section, "", text)):
                if words[0] == SERVES:
                    continue
                outcome = flapsam(capfd, *words)
                assert outcome.code == 0, outcome.err
                run.append(words[0])
    assert applied == set(SMALLER)
    assert run == ["data", "data", "init", "traffic", "simulate", "data", "predict", "evaluate"]
    for path in (
        "runs/run/report/index.html",
        "runs/run/adapter/README.md",
        "out/volumes.csv",
        "out/labels.txt",
        "labels.nii.gz",
    ):
        assert Path(path).exists()


ROOT_COMMAND: Any = typer.main.get_command(app)


def unknown(words: list[str]) -> str:
    """The first part of a command line that does not exist, or an empty string."""
    command = ROOT_COMMAND
    left = list(words)
    while hasattr(command, "commands"):
        if not left or left[0].startswith("-") or left[0].isupper():
            return ""
        name = left.pop(0)
        if name not in command.commands:
            return f"command {name}"
        command = command.commands[name]
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    given = 0
    while left:
        word = left.pop(0)
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            if name == "--help":
                continue
            if name not in options:
                return f"option {name}"
            values = 0 if options[name].is_flag else options[name].nargs - bool(equals)
            if len(left) < values:
                return f"a value of {name}"
            del left[:values]
        else:
            given += 1
    if given > len(arguments) and all(argument.nargs == 1 for argument in arguments):
        return f"argument {given}"
    return ""


SHOWN = [(page, words) for page in PAGES for block in blocks(page, "", "bash", "sh") for words in commands(block)]
MENTIONED = [(page, words) for page in PAGES for words in inline_commands(page)]


def test_the_pages_contain_commands():
    assert len(SHOWN) > 60
    assert len(MENTIONED) > 20


def as_id(value: Path | list[str]) -> str:
    return " ".join(value) if isinstance(value, list) else value.name


@pytest.mark.parametrize(("page", "words"), SHOWN + MENTIONED, ids=as_id)
def test_commands_exist(page: Path, words: list[str]):
    assert unknown(words) == ""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("simulat run.yaml", "command simulat"),
        ("data chek sites", "command chek"),
        ("simulate run.yaml --worker 2", "option --worker"),
        ("simulate run.yaml --workers", "a value of --workers"),
        ("simulate run.yaml other.yaml", "argument 2"),
        ("simulate run.yaml --workers 2 --set a=1 --json", ""),
        ("predict run a b c -o out", ""),
    ],
)
def test_unknown_parts_of_a_command_are_detected(line: str, reason: str):
    assert unknown(line.split()) == reason


def test_every_command_is_shown_somewhere():
    """Look at the hand-written pages only. The generated reference has every command anyway."""
    shown = [" ".join(words) for _, words in SHOWN + MENTIONED]
    leaves = [name for name, command in ROOT_COMMAND.commands.items() if not hasattr(command, "commands")]
    leaves += [f"{name} {part}" for name, group in ROOT_COMMAND.commands.items() for part in getattr(group, "commands", {})]
    assert [name for name in leaves if not any(line.startswith(name) for line in shown)] == []


MAKE = sorted(
    {target for page in PAGES for target in re.findall(r"`make ([\w-]+)`", page.read_text())}
    | {target for page in PAGES for block in blocks(page, "") for target in re.findall(r"^make ([\w-]+)", block.text, re.M)}
)


@pytest.mark.parametrize("target", MAKE)
def test_make_targets_exist(target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path):
    for link in links(page):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link
        # The built site contains nothing from outside docs/.
        assert page.parent != DOCS or target.is_relative_to(DOCS), link


@pytest.mark.parametrize("diagram", sorted((DOCS / "images").glob("*.svg")), ids=lambda diagram: diagram.name)
def test_diagrams_have_a_description_and_load_nothing(diagram: Path):
    tree = ElementTree.parse(diagram).getroot()
    assert [element.tag.partition("}")[2] for element in tree][:2] == ["title", "desc"]
    assert all(element.text for element in tree[:2])
    assert not [element for element in tree.iter() if element.tag.endswith(("script", "image", "foreignObject"))]
    references = [element.attrib["href"] for element in tree.iter() if "href" in element.attrib]
    references += re.findall(r"url\(([^)]*)\)|@import", diagram.read_text())
    assert references
    assert all(reference.startswith("#") for reference in references)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_files_exist(page: Path):
    for path in re.findall(r"`((?:benchmarks|examples|tests|src)/[\w./-]+)", page.read_text()):
        assert (ROOT / path).exists(), path


CONFIGURATIONS = [block for page in PAGES for block in blocks(page, "yaml")]
KINDS = {"FEDERATION.yaml": FederationFile, "site.yaml": SiteConfig}
"""File name → its model. Every other block is the configuration of a run."""


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=lambda block: f"{block.page.stem}: {block.section}")
def test_configurations_are_valid(block: Block):
    first = block.text.splitlines()[0].removeprefix("# ")
    tree = yaml.safe_load(block.text)
    validated(tree, KINDS.get(Path(first).name, RunConfig), block.page.name)  # type: ignore[type-var]


def test_the_navigation_lists_every_page():
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in DOCS.glob("*.md")}


def test_the_tests_named_by_the_method_exist():
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", (DOCS / "method.md").read_text()):
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {name}" in path.read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as ``make docs`` builds them. The build must print nothing, because anything it prints is a warning."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


def test_built_pages_load_nothing_from_the_network(site: Path):
    pages = sorted(site.glob("*.html"))
    assert len(pages) == len(list(DOCS.glob("*.md"))) + 1  # and 404.html
    for page in pages:
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", page.read_text())
        assert fetched
        for address in fetched:
            assert not address.startswith(("http:", "https:", "//")), (page.name, address)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet
    for script in ("mathjax", "katex", "mermaid"):
        assert not any(f'class="{script}"' in page.read_text() for page in pages), (
            "its script would be loaded from elsewhere"
        )


def test_formulas_become_mathml(site: Path):
    """Compare with the number of LaTeX formulas in the Markdown, which are ``math`` blocks or inline between two dollars."""
    text = re.sub(r"^```math\n.*?^```$", "", (DOCS / "method.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    page = (site / "method.html").read_text()
    assert page.count('display="block"') == len(blocks(DOCS / "method.md", "math")) == 11
    assert page.count('display="inline"') == text.count("$") / 2 > 20
    for built in site.glob("*.html"):
        assert "arithmatex" not in built.read_text(), "no script would render it"


@pytest.mark.parametrize("latex", [r"\unknown{x}", r"\frac{1}", r"\left( x", "a & b"])
def test_an_invalid_formula_stops_the_build(latex: str):
    pytest.importorskip("latex2mathml")
    specification = importlib.util.spec_from_file_location("formulas", DOCS / "formulas.py")
    assert specification is not None and specification.loader is not None
    formulas = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(formulas)
    assert "<mfrac>" in formulas.mathml(r"\frac{1}{2}", "block")
    with pytest.raises(ValueError, match="cannot convert the formula"):
        formulas.mathml(latex, "block")


def test_the_reference_lists_every_command_and_every_field(site: Path):
    text = (site / "commands.html").read_text()
    for _, words in SHOWN:
        group = 2 if words[0] in ("data", "backbone", "federation") else 1
        assert f"flapsam {' '.join(words[:group])}<" in text
    assert "<code>--workers WORKERS</code>" in text or "<code>--workers</code>" in text
    fields = re.findall(r"<td><code>([\w.]+)</code></td>", (site / "configuration.html").read_text())
    for name, field in RunConfig.model_fields.items():
        parts = getattr(field.annotation, "model_fields", None)
        assert {f"{name}.{part}" for part in parts} <= set(fields) if parts else name in fields


def test_the_reference_shows_the_defaults_of_the_presets(site: Path):
    (row,) = re.findall(
        r"<tr>\s*<td><code>training.batch_size</code></td>(.*?)</tr>", (site / "configuration.html").read_text(), re.S
    )
    assert re.findall(r"<td><code>(.*?)</code></td>", row) == ["3", "12", "12"]
