"""More sites take no more memory: there is one network and one optimizer, and packets and moments are on disk."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.sites import make_sites

# Prints the peak resident memory of its own process, in KiB.
PROGRAM = """
import resource, sys
from pathlib import Path
import flapsam
try:
    flapsam.simulate(flapsam.read_config(Path(sys.argv[1])))
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(config: Path) -> float:
    """Peak resident memory of a simulation, in MiB."""
    command = [sys.executable, "-c", PROGRAM, str(config)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
    return float(process.stdout.rsplit("peak", 1)[1]) / 1024


def test_twelve_sites_take_no_more_memory_than_three(tmp_path: Path, record_property):
    peaks = {}
    for sites in (3, 12):
        make_sites(tmp_path / f"data{sites}", sites=sites, cases=3)
        config = tmp_path / f"{sites}.yaml"
        config.write_text(f"""
data: {{path: data{sites}, labels: {{ball: 1, core: 2}}}}
samples: {{size: 64}}
backbone: {{name: sam-tiny, weights: random}}
training: {{window: 1, batch_size: 12, augment: false, empty_slices: 0}}
rounds: {{count: 1}}
threads: 1
output: run{sites}
""")
        peaks[sites] = peak(config)
    record_property("peak_mib", peaks)
    print(f"peak resident memory in MiB by number of sites: {peaks}")
    assert peaks[12] < 1.1 * peaks[3]
