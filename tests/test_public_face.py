"""The names that users import from ``flapsam`` itself."""

import ast
import re
import subprocess
import sys

import pytest

import flapsam
from tests.helpers.places import ROOT, SOURCE


def test_every_public_name_exists_and_matches_what_type_checkers_see():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (type_checking,) = (node for node in tree.body if isinstance(node, ast.If))
    modules = {
        alias.name: node.module.removeprefix("flapsam.")
        for node in type_checking.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert modules == flapsam._MODULES
    assert sorted(flapsam.__all__) == sorted([*modules, "FlapsamError", "__version__"])
    for name, module in modules.items():
        assert getattr(flapsam, name) is getattr(sys.modules[f"flapsam.{module}"], name)
    assert set(flapsam.__all__) <= set(dir(flapsam))


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'federate'"):
        flapsam.federate  # noqa: B018


def test_the_import_loads_no_heavy_libraries():
    heavy = ("torch", "numpy", "pydantic", "transformers", "monai")
    code = f"import flapsam, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_python_page_documents_only_public_names():
    documented = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
    assert len(documented) > 20
    assert {name.removeprefix("flapsam.") for name in documented} <= set(flapsam.__all__)
