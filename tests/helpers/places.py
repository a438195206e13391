"""Folders of the repository."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SOURCE = ROOT / "src" / "flapsam"
GOLDEN = TESTS / "golden"
WRITTEN = TESTS / "written"
SHARED = ROOT.parent / "shared"
