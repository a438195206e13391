"""Who may import whom: data flows one way, and nothing imports upwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

FLOORS = [
    ["flapsam.errors"],
    ["flapsam.files", "flapsam.seeds", "flapsam.presets", "flapsam.prefetch", "flapsam.cleaning"],
    ["flapsam.download"],
    ["flapsam.config"],
    ["flapsam.volumes"],
    ["flapsam.sites"],
    ["flapsam.slices"],
    ["flapsam.augmentation"],
    ["flapsam.sam"],
    ["flapsam.device", "flapsam.environment"],
    ["flapsam.features"],
    ["flapsam.training", "flapsam.inference", "flapsam.metrics"],
    ["flapsam.memory"],
    ["flapsam.adapter"],
    ["flapsam.federation.aggregation", "flapsam.federation.compression", "flapsam.federation.server_optimizers"],
    ["flapsam.federation.packets", "flapsam.federation.state"],
    ["flapsam.federation.agreement", "flapsam.federation.ledger", "flapsam.federation.weights"],
    ["flapsam.federation.observer", "flapsam.federation.rounds", "flapsam.federation.folder"],
    ["flapsam.federation.handshake", "flapsam.federation.site_file", "flapsam.model_card"],
    ["flapsam.federation.conduct", "flapsam.federation.preparation"],
    ["flapsam.federation.site", "flapsam.federation.coordinator"],
    ["flapsam.federation.engines", "flapsam.traffic"],
    ["flapsam.trained"],
    ["flapsam.images", "flapsam.model"],
    ["flapsam.prediction", "flapsam.check", "flapsam.datasets", "flapsam.backbones", "flapsam.export"],
    ["flapsam.evaluation", "flapsam.experiments", "flapsam.site_check"],
    ["flapsam.report"],
    ["flapsam.tracking"],
    ["flapsam.console"],
    ["flapsam.cli_federation"],
    ["flapsam.cli"],
]
"""From the ground up: a module imports from its own package and from floors below."""

MODULES = {".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCE.rglob("*.py")}


def room(module: str) -> tuple[int, str] | None:
    """The floor and the entry in ``FLOORS`` that a module belongs to."""
    for floor, rooms in enumerate(FLOORS):
        for name in rooms:
            if module == name or module.startswith(name + "."):
                return floor, name
    return None


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flapsam."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("flapsam.")}
    return found


def test_every_module_has_its_place():
    homeless = {name for name in MODULES if room(name) is None}
    assert homeless == {"flapsam", "flapsam.federation"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"flapsam", "flapsam.federation"}))
def test_nothing_imports_upwards(module: str):
    place = room(module)
    assert place is not None
    for target in imported(MODULES[module]):
        above = room(target)
        assert above is not None, f"{module} imports {target}"
        assert above[1] == place[1] or above[0] < place[0], f"{module} imports {target}, which is not below it"


def test_only_checkpoints_touch_files_in_the_network():
    for module in MODULES:
        if module.startswith("flapsam.sam.") and module != "flapsam.sam.checkpoints":
            names = {node.id for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Name)}
            assert not names & {"open", "Path", "load_file", "save_file", "safe_open"}, module


def test_only_its_engine_imports_nvflare():
    for module, path in MODULES.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        if any(name.split(".")[0] == "nvflare" for name in names):
            assert module.startswith("flapsam.federation.engines.nvflare."), module


def test_help_answers_in_under_half_a_second():
    code = "import time; t = time.perf_counter(); import flapsam.cli; print(time.perf_counter() - t)"
    heavy = "import flapsam.cli, sys; print([m for m in ('torch', 'numpy', 'transformers', 'monai') if m in sys.modules])"
    assert float(subprocess.check_output([sys.executable, "-c", code])) < 0.5
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "[]"
