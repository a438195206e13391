"""A malicious site of three answers the first fit a thousand times more than it was asked, with 15 MiB each.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/flood.py [--answers 1000]

Real processes communicate over mutual TLS on loopback. The site's kit is valid, and its job is flapsam's own, but before it
answers a fit it sends the server's job answers that nobody asked for. The figures go to `results/flood.json` and
`results/flood.md`: whether the run ended with an adapter, the seconds of its rounds, and the peak memory (VmHWM) and the
disk of the server's processes, also without the attack.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from cells import HERE, read_cells, write_cells

sys.path.insert(0, str(HERE.parent))
from flapsam.base.files import write_text
from flapsam.run.ledger import Fitted, RoundClosed, read_ledger
from tests.helpers.hospitals import Hospitals, kill_all, until
from tests.helpers.sites import write_run

FLOOD = """
import os, sys
if "site-job" in sys.argv or "site-job" in sys.orig_argv:
    import numpy as np
    from nvflare.private.fed.client.client_run_manager import ClientRunManager
    send = ClientRunManager.send_task_result
    calls = []

    def flooding(self, result, fl_ctx, timeout=None):
        calls.append(1)
        if len(calls) != 2:
            # The first answer joins the run, and after the flood NVFLARE tries to send the refused answer again.
            return send(self, result, fl_ctx, timeout)
        junk = type(result)()
        junk.headers = getattr(result, "headers", None)
        for key, value in dict(result).items():
            junk[key] = value
        junk["answer"] = np.random.default_rng(0).integers(0, 256, 15 << 20, np.uint8)
        junk["code"] = ""
        sent = 0
        for _ in range(ANSWERS):
            sent += send(self, junk, fl_ctx, 5.0) is not None
        with open("SENT", "a") as file:
            print(sent, file=file)
        return send(self, result, fl_ctx, timeout)

    ClientRunManager.send_task_result = flooding
"""


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(answers: int, folder: Path) -> dict[str, Any]:
    """Run the federation with this number of answers too many, and return its figures."""
    hospitals = Hospitals(folder, ["site_a", "site_b", "site_c"], proxied=False)
    hospitals.make_data()
    (folder / "sitecustomize.py").write_text(FLOOD.replace("ANSWERS", str(answers)).replace("SENT", str(folder / "sent")))
    config = write_run(folder / "run.yaml", hospitals.data, rounds={"count": 2, "deadline": 120, "require": 2})
    peak, disk = 0, 0
    try:
        hospitals.start_server()
        for site in ("site_a", "site_b"):
            hospitals.start_site(site)
        hospitals.start_site("site_c", environment={"PYTHONPATH": f"{folder}:{HERE.parent}"} if answers else {})
        until(lambda: all("Connected to the server" in hospitals.said(site) for site in hospitals.sites))
        hospitals.start_run(config)
        server = psutil.Process(hospitals.running["server"].pid)
        while hospitals.running["run-run"].poll() is None:
            for child in server.children(recursive=True):
                try:
                    lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                except OSError:
                    continue
                peak = max([peak, *(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))])
            disk = max(disk, folder_bytes(hospitals.kit("server")) + folder_bytes(folder / "run"))
            time.sleep(1)
        code = hospitals.running["run-run"].returncode
        print(hospitals.said("run-run"))
    finally:
        for process in hospitals.running.values():
            if process.poll() is None:
                kill_all(process)
    events = read_ledger(folder / "run/events.jsonl")
    rounds = [round(event.seconds) for event in events if isinstance(event, RoundClosed)]
    sent = folder / "sent"
    return {
        "exit code": code,
        "adapter": (folder / "run/adapter").exists(),
        "sent": sum(map(int, sent.read_text().split())) if sent.exists() else 0,
        "seconds of each round": rounds,
        "sites that answered in each round": [
            sorted(event.site for event in events if isinstance(event, Fitted) and event.round == number)
            for number in range(1, len(rounds) + 1)
        ],
        "peak of a process at the server in MiB": peak,
        "disk at the server in MiB": disk >> 20,
    }


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[0, 1000])
    kept = HERE / "results" / "flood.json"
    cells = read_cells(kept)
    for answers in parser.parse_args().answers:
        with tempfile.TemporaryDirectory() as folder:
            cells[str(answers)] = measure(answers, Path(folder))
        write_cells(kept, cells)
    names = list(next(iter(cells.values())))
    lines = [
        "# Answers that nobody asked for",
        "",
        "Written by `python benchmarks/flood.py`, whose docstring describes it.",
        "",
    ]
    lines += ["| answers too many | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    lines += [f"| {count} | " + " | ".join(str(cell[name]) for name in names) + " |" for count, cell in cells.items()]
    write_text(HERE / "results" / "flood.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
