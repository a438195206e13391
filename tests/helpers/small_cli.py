"""``python -m tests.helpers.small_cli``: the command line, in which runs may also name the members of ``SMALL``."""

from flapsam import cli
from flapsam.sam import ARCHITECTURES
from flapsam.sam.sources import SOURCES
from tests.helpers.families import SMALL, SMALL_SOURCES

ARCHITECTURES |= SMALL
SOURCES |= SMALL_SOURCES

if __name__ == "__main__":
    cli.main()
