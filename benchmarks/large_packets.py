"""Large packets between hospitals: memory and time of NVFLARE with `full` on ViT-B, 345 MiB of tensors each way.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/large_packets.py [--sites 2]

Real processes communicate over mutual TLS on loopback: a server, and sites with three small cases each. Weights are random,
the codec is `fp32`, and there are two rounds. Peaks are those that the kernel records (VmHWM), for each kind of process:
NVFLARE's at the server and at a site, the server's job (network, aggregation, state), a site's job (carries packets), and
the process that fits. They are kept in `results/large_packets.json`, and `results/large_packets.md` is rewritten.
"""

import sys
import time
from pathlib import Path

import psutil
from cells import HERE, by_sites

sys.path.insert(0, str(HERE.parent))
from flapsam.run.ledger import Fitted, RoundClosed, read_ledger
from tests.helpers.hospitals import Hospitals
from tests.helpers.sites import write_run

ROLES = {
    "fit_process": "a site's fit",
    "nvflare.process site-job": "a site's job",
    "nvflare.process server-job": "the server's job",
    "nvflare.process site": "a site's NVFLARE",
    "nvflare.process server": "the server's NVFLARE",
}


def peaks(hospitals: Hospitals, seen: dict[str, int]) -> None:
    """Update the peak memory of each kind of process, in MiB."""
    for name, process in hospitals.running.items():
        if name.startswith("run-") or process.poll() is not None:
            continue
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                command = " ".join(child.cmdline())
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            except (psutil.NoSuchProcess, OSError):
                continue
            role = next((role for part, role in ROLES.items() if part in command), None)
            peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
            if role:
                seen[role] = max(seen.get(role, 0), peak >> 10)


def measure(sites: int, folder: Path) -> dict:
    """Run the federation, and return its figures."""
    hospitals = Hospitals(folder, [f"site_{number}" for number in range(sites)], proxied=False)
    hospitals.make_data()
    config = write_run(
        folder / "run.yaml",
        hospitals.data,
        backbone={"name": "sam-vit-b", "weights": "random"},
        samples={"size": 224},
        strategy="full",
        aggregator="fedavg",
        compression={"codec": "fp32"},
        training={"window": 1, "batch_size": 2, "warmup_steps": 2},
        rounds={"count": 2, "min_sites": 1, "validate_every": 2},
    )
    seen: dict[str, int] = {}
    try:
        hospitals.start_all()
        started = time.perf_counter()
        hospitals.start_run(config)
        while hospitals.running["run-run"].poll() is None:
            peaks(hospitals, seen)
            time.sleep(0.1)
        assert hospitals.running["run-run"].returncode == 0, hospitals.said("run-run")
        seconds = time.perf_counter() - started
    finally:
        hospitals.stop_all()
    events = read_ledger(folder / "run/events.jsonl")
    rounds = [event for event in events if isinstance(event, RoundClosed)]
    fits = [event for event in events if isinstance(event, Fitted)]
    slowest = [max(fit.site_seconds or 0 for fit in fits if fit.round == closed.round) for closed in rounds]
    return {
        "sites": sites,
        "packet_mib": max(fit.bytes_up for fit in fits) >> 20,
        "down_mib": max(fit.bytes_down for fit in fits) >> 20,
        "peak_mib": dict(sorted(seen.items())),
        "seconds": seconds,
        "round_seconds": [event.seconds for event in rounds],
        "slowest_site_seconds": slowest,
        "aggregation_seconds": [event.aggregation_seconds for event in rounds],
    }


def table(rows: list[dict]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Packets of ViT-B with `full` between hospitals",
        "",
        "Measured by `benchmarks/large_packets.py`: two rounds over mutual TLS on loopback, on two cores. Peaks of resident",
        "memory are in MiB and as multiples of the packet.",
        "",
    ]
    for row in rows:
        packet = row["packet_mib"]
        lines += [
            f"{row['sites']} sites, packets of {packet} MiB up and {row['down_mib']} MiB down. The rounds took "
            f"{', '.join(f'{s:.0f}' for s in row['round_seconds'])} s, of which the slowest site took "
            f"{', '.join(f'{s:.0f}' for s in row['slowest_site_seconds'])} s and aggregation "
            f"{', '.join(f'{s:.1f}' for s in row['aggregation_seconds'])} s.",
            "",
            "| process | peak, MiB | × packet |",
            "|---|---:|---:|",
            *(f"| {role} | {peak} | {peak / packet:.1f} |" for role, peak in row["peak_mib"].items()),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    by_sites(__doc__, "large_packets", [2], measure, table)
