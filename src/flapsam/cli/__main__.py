"""``python -m flapsam.cli``."""

from flapsam.cli import main

main()
