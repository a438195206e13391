"""Calling the command line as a user does, within the test's process."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flapsam import cli


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def flapsam(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Outcome:
    """Run ``flapsam`` with these arguments; a traceback fails the test."""
    capfd.readouterr()
    before, sys.argv = sys.argv, ["flapsam", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    captured = capfd.readouterr()
    return Outcome(code, captured.out, captured.err)
