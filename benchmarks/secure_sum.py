"""What a round of secure aggregation costs: seconds and bytes with 3, 10 and 100 sites, without any training.

    python benchmarks/secure_sum.py

All sites and the server take turns in one process, on one thread. A change has as many numbers as `flap` trains on ViT-B.
Where sites are gone, as many as may drop out did so after they had shared their secrets out, which costs the most. The sum
is compared with the plain one. Results: `benchmarks/results/secure_sum.md`.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from flapsam.federation.secure_aggregation.collector import Collector
from flapsam.federation.secure_aggregation.identity import Identity
from flapsam.federation.secure_aggregation.member import NOTHING, Member
from flapsam.federation.secure_aggregation.messages import threshold
from flapsam.federation.traffic import strategy_table

RUN = "0" * 32
T = TypeVar("T")


class Clock:
    """Adds up the seconds of one side."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - started
        return result


def measure(count: int, gone: int, numbers: int, folder: Path) -> str:
    """A row of the table."""
    names = [f"site_{number:03d}" for number in range(count)]
    identities = {name: Identity(folder / name / "identity.key") for name in names}
    keys = {name: identity.public for name, identity in identities.items()}
    members = {name: Member(RUN, name, identities[name], keys, folder / name) for name in names}
    collector = Collector(RUN, folder / "server", dict.fromkeys(names, 1 / count))
    rng = np.random.default_rng(0)
    changes = {name: rng.integers(-8, 9, numbers).astype(np.int32) for name in names}
    at_sites, at_server = Clock(), Clock()
    masked: dict[str, np.ndarray] = {}
    up = down = 0
    for step in collector.begin(1, {"w": 1.0}):
        there = names if step in ("keys", "shares") else names[gone:]
        for name in there:
            member, message = members[name], at_server(lambda name=name: collector.message(name))
            down += len(message)
            if step == "fit":
                at_sites(lambda m=member, t=message: m.begin(1, t, NOTHING))
                masked[name] = at_sites(lambda m=member, n=name: m.masked(1, changes[n]))
            else:
                answer = at_sites(lambda m=member, t=message: m.answer(t))
                up += len(answer)
                at_server(lambda name=name, answer=answer: collector.take(name, answer))
        at_server(lambda: collector.end(masked))
    total = at_server(lambda: collector.total(masked, numbers))
    bits = collector.ring.bits
    exact = sum(changes[name].astype(np.int64) for name in names[gone:]) % 2**bits
    assert (total == exact).all()
    cells = [
        f"{count}",
        f"{gone}",
        f"{threshold(count)}",
        f"{bits}",
        f"{len(masked[names[-1]]) / 2**20:.2f}",
        f"{up / count / 1024:.1f}",
        f"{down / count / 1024:.1f}",
        f"{at_sites.seconds / count:.2f}",
        f"{at_server.seconds:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    (flap,) = (row for row in strategy_table("sam-vit-b") if row.strategy == "flap")
    print(f"{flap.parameters:,} numbers\n")
    titles = ["sites", "gone", "needed", "bits a number", "masked change, MiB"]
    titles += ["messages up, KiB a site", "messages down, KiB a site", "seconds a site", "seconds at the server"]
    print("| " + " | ".join(titles) + " |\n|" + "---:|" * len(titles))
    for count in (3, 10, 100):
        for gone in sorted({0, count - threshold(count)}):
            with tempfile.TemporaryDirectory() as folder:
                print(measure(count, gone, flap.parameters, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
