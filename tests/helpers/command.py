"""Run the command line as a user does, but within the test's process."""

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
    """Run ``flapsam`` with these arguments. A traceback fails the test."""
    capfd.readouterr()
    argv, sys.argv = sys.argv, ["flapsam", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = argv
    captured = capfd.readouterr()
    return Outcome(code, captured.out, captured.err)
