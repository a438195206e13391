"""Ten thousand randomly broken packets pass through the engine: is each refused, and does the run complete?

    OMP_NUM_THREADS=1 python benchmarks/broken_packets.py [--rounds 145]

A round has 22 sites whose packets are broken and one that repeats its packet, for each of three codecs. The checks are those
of ``tests/federation/test_broken_packets.py``. The program prints what was refused, and ends with an error if a check fails.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from cells import HERE

sys.path.insert(0, str(HERE.parent))
from tests.federation.test_broken_packets import CODECS, send_broken_packets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=145)
    rounds = parser.parse_args().rounds
    for codec in CODECS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            refused = send_broken_packets(codec, rounds, Path(folder))
        print(f"{codec}: {refused:,} packets refused in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
