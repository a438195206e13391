"""The global model averaged over a run's last rounds, compared with the last round's alone.

    python benchmarks/averaging.py DATA [--minutes 30]

DATA is the Medical Segmentation Decathlon's hippocampus with one folder per site. The run is federated, with preset
``fast``, strategy ``flap`` and 8 rounds on one thread. The global models of the last rounds are averaged with equal weights
(low-rank factors by their product) and scored on the validation cases, once at the end of the run, where the learning rate
has fallen to zero, and once in the middle. Differences are paired by case. Cells that are missing in
``results/averaging.json`` are computed until the minutes are over.
"""

import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from cells import HERE, Cells, arguments, hippocampus, paired, prepared, read_cells, write_cells
from torch import Tensor

from flapsam.experiments.simulation import simulate
from flapsam.federation.aggregation import Reply, aggregator
from flapsam.federation.client import score_cases
from flapsam.federation.state import ServerState
from flapsam.run.observer import Observer
from flapsam.sam import assemble_run, load_trained

RESULTS = HERE / "results" / "averaging.json"
ROUNDS = 8
ENDS = (4, 8)
LENGTHS = (1, 2, 3, 4)
SEEDS = (0, 1)


class Keeper(Observer):
    """Keeps every round's global tensors."""

    def __init__(self, run: Path) -> None:
        self.state = ServerState(run / "state" / "federated" / "server")
        self.tensors: dict[int, dict[str, Tensor]] = {}

    def event(self, entry: dict[str, Any]) -> None:
        """Keep the global tensors when a round closes."""
        if entry["event"] == "round":
            newest = self.state.newest()
            if newest is not None:
                self.tensors[entry["round"]] = newest[1]["global"]


def compute(data: Path, seed: int) -> dict[str, Any]:
    """Train with a seed. Returns the Dice of every validation case, by last round and number of rounds in the mean."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = {"rounds.count": ROUNDS, "rounds.validate_every": ROUNDS}
        values = {"output": f"{folder}/run", "seed": seed, "threads": 1, **rounds}
        config = hippocampus(data, values)
        keeper = Keeper(config.output)
        simulate(config, observer=keeper)
        cases = prepared(config, Path(folder), "val")
        network = assemble_run(config).network
        dice: dict[str, dict[str, float]] = {}
        for end in ENDS:
            for length in LENGTHS:
                numbers = range(end - length + 1, end + 1)
                replies = [Reply.of(keeper.tensors[number], 1 / length) for number in numbers]
                average = aggregator("flexlora", config.lora.rank).aggregate(replies, keeper.tensors[end], end)
                load_trained(network, average)
                scores = score_cases(network, cases, config)
                dice[f"{end}/{length}"] = {s.case: mean(value or 0.0 for value in s.dice.values()) for s in scores}
    return dice


def table(cells: Cells) -> str:
    """The cells as Markdown."""
    lines = ["| seed | after round | rounds averaged | Dice | difference to the last round alone |", "|---:" * 5 + "|"]
    for seed in SEEDS:
        cell = cells.get(str(seed))
        if cell is None:
            lines.append(f"| {seed} |" + " missing |" * 4)
            continue
        for end in ENDS:
            for length in LENGTHS:
                dice = cell[f"{end}/{length}"]
                difference = paired(dice, cell[f"{end}/1"])[0] if length > 1 else ""
                lines.append(f"| {seed} | {end} | {length} | {mean(dice.values()):.3f} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    cells = read_cells(RESULTS)
    end = time.monotonic() + 60 * given.minutes
    for seed in SEEDS:
        if str(seed) not in cells and time.monotonic() < end:
            cells[str(seed)] = compute(given.data, seed)
            write_cells(RESULTS, cells)
    print(table(cells))


if __name__ == "__main__":
    main()
