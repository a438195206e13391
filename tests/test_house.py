"""Which module may import which: the packages are layers, and nothing imports upwards."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

LAYERS = [
    "flapsam.base",
    "flapsam.run",
    "flapsam.volumes",
    "flapsam.sites",
    "flapsam.sam",
    "flapsam.learning",
    "flapsam.adapters",
    "flapsam.federation",
    "flapsam.experiments",
    "flapsam.report",
    "flapsam.cli",
    "flapsam",
]
"""Layers from the bottom up. A module imports from its own layer and from those below.

The top layer is ``flapsam/__init__.py`` alone.
"""
MARKER = "py.typed"
"""An empty file that PEP 561 requires at the root. It is not a package."""

MODULES = {".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCE.rglob("*.py")}


def layer_of(module: str) -> int:
    """Index of the layer that a module belongs to."""
    return LAYERS.index(".".join(module.split(".")[:2]))


def imported(module: str) -> set[str]:
    """The modules of flapsam that a module imports, whether at its top, inside a function or for type checking."""
    targets = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: use an absolute import instead of a relative one"
            package = node.module or ""
            if package.split(".")[0] == "flapsam":
                # An imported name may itself be a module, as in: from flapsam.report import tables
                targets |= {name if name in MODULES else package for a in node.names for name in [f"{package}.{a.name}"]}
        elif isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names if alias.name.split(".")[0] == "flapsam"}
    return targets


def test_the_root_has_one_package_per_layer_and_nothing_else():
    entries = {path.name for path in (SOURCE / "flapsam").iterdir()} - {"__pycache__", MARKER}
    assert entries == {name.removeprefix("flapsam.") for name in LAYERS[:-1]} | {"__init__.py"}
    assert len(entries) <= 12 and len(LAYERS) <= 12


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_upwards(module: str):
    for target in imported(module):
        assert target in MODULES, f"{module} imports {target}, which does not exist"
        assert layer_of(target) <= layer_of(module), f"{module} imports {target}, which is above it"


def test_there_are_no_import_cycles():
    graph = {module: imported(module) - {module} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_every_kind_of_import_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "made_up.py"
    path.write_text(
        "import flapsam.run.config\nfrom flapsam import load\nfrom flapsam.report import tables\n"
        "from flapsam.sites.case import Case\ndef late():\n    from flapsam.cli import app\nimport numpy\n"
    )
    monkeypatch.setitem(MODULES, "made_up", path)
    names = {"run.config", "report.tables", "sites.case", "cli"}
    assert imported("made_up") == {"flapsam", *(f"flapsam.{name}" for name in names)}


def test_only_the_checkpoint_modules_of_sam_touch_files():
    for module in MODULES:
        if module.startswith("flapsam.sam.") and module not in ("flapsam.sam.checkpoints", "flapsam.sam.backbones"):
            names = {node.id for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Name)}
            assert not names & {"open", "Path", "load_file", "save_file", "safe_open"}, module


def test_only_the_nvflare_engine_imports_nvflare():
    for module, path in MODULES.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        if any(name.split(".")[0] == "nvflare" for name in names):
            assert module.startswith("flapsam.federation.engines.nvflare."), module


def test_the_command_line_is_imported_in_under_half_a_second():
    # Seconds of the processor, because the tests run side by side.
    code = "import time; t = time.process_time(); import flapsam.cli; print(time.process_time() - t)"
    heavy = "import flapsam.cli, sys; print([m for m in ('torch', 'numpy', 'transformers', 'monai') if m in sys.modules])"
    assert float(subprocess.check_output([sys.executable, "-c", code])) < 0.5
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "[]"
