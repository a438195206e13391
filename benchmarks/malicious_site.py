"""One malicious site of three, against every aggregator and every codec: does the run end, and what does its adapter lose?

    OMP_NUM_THREADS=1 python benchmarks/malicious_site.py [--minutes 30] [--only TEXT]

Three sites hold synthetic volumes: a bright ball with a brighter core on a dark, noisy background. The run is one between
hospitals, with its handshake, its checks and its files, but no engine carries the packets: they are passed on in this
process. The third site is sabotaged and always answers first. Its row says how:

- huge numbers: every floating-point number in its packets is ±1e30, or the largest of its type. NaN: each is NaN.
- missing keys: one tensor is missing. Text scores: every Dice, in packets and after the last round, is the text "0.9".
- false Dice: every Dice is 1 in the first half of the run and 0 afterwards.
- false counts: the site claims 10¹⁰ slices, but trains honestly.
- modalities first: the site claims to have three modalities.
- NaN seconds: the engine reports that the site took NaN seconds.
- opposite: the site's own change with the other sign. Nine times opposite: nine times that, which is below the limit on the
  size of a change. No check of single updates finds these two. They show what is left to a site that poisons with care.

A cell is the mean test Dice of the honest sites' cases, on the slices' own grid, minus that of a run without the third site.
``median`` and ``trimmed-mean`` need more sites than two, so they are compared with ``fedavg`` with equal weights, which is
the same for two sites. ``trimmed-mean`` refuses three sites, so its run has five, of which one is malicious. Cells that are
missing in ``results/malicious_site.json`` are computed until the minutes are over. Then ``results/malicious_site.md`` is
rewritten.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import nibabel
import numpy as np
import torch
import zstandard
from cells import HERE, Cells, read_cells, write_cells
from safetensors.torch import save
from torch import Tensor

from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.federation.aggregation import AGGREGATORS
from flapsam.federation.client import score_cases
from flapsam.federation.compression import CODECS
from flapsam.federation.hospitals.server_side import ServerSide
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.federation.packets import ENTRY, MAGIC, checksum, decode
from flapsam.federation.preparation import resolve
from flapsam.federation.rounds import Answer, Work
from flapsam.learning.prepared import prepare
from flapsam.run.config import RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import Fitted
from flapsam.run.reading import read_config
from flapsam.sam import load_tensors
from flapsam.sites import label_map, read_site

RESULTS = HERE / "results" / "malicious_site.json"
TABLE = HERE / "results" / "malicious_site.md"
LIAR = "liar"
SHAPE, CASES, ROUNDS = (40, 40, 6), 10, 6
SIZE, RANK = 64, 8
ALLOWED = 0.02
"""Dice that an attack may cost."""
NONE, REFUSED = "nobody", "refused"
ATTACKS = (
    "huge numbers",
    "NaN",
    "missing keys",
    "text scores",
    "false Dice",
    "false counts",
    "modalities first",
    "NaN seconds",
    "opposite",
    "nine times opposite",
)
POISONS = ATTACKS[-2:]
DEFAULT = {"aggregator": "flexlora-aligned", "compression.codec": "steps"}
COLUMNS: dict[str, dict[str, Any]] = {
    **{name: {**DEFAULT, "aggregator": name} for name in AGGREGATORS},
    **{name: {**DEFAULT, "compression.codec": name} for name in CODECS if name != DEFAULT["compression.codec"]},
}
"""Aggregators with the default codec, then codecs with the default aggregator."""
SITES = {"trimmed-mean": 4}
"""Aggregator → number of honest sites; two otherwise."""
ROBUST = ("median", "trimmed-mean")


def make_data(folder: Path, names: Sequence[str]) -> None:
    """Write each site's volumes. A site's volumes depend on its place in the list only."""
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        grid = np.meshgrid(*[np.arange(size) for size in SHAPE], indexing="ij")
        for case in range(CASES):
            centre = [rng.uniform(0.35, 0.65) * size for size in SHAPE]
            offsets = [(axis - middle) / (0.35 * size) for axis, middle, size in zip(grid, centre, SHAPE, strict=True)]
            away = np.square(offsets).sum(axis=0)
            label = (away < 1).astype(np.uint8) + (away < 0.3).astype(np.uint8)
            image = (60 * label + rng.normal(0, 30, SHAPE)).astype(np.float32)
            for kind, array in (("images", image), ("labels", label)):
                path = folder / name / kind / f"{name}_{case}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def configuration(folder: Path, fields: dict[str, Any]) -> RunConfig:
    """The run's configuration."""
    path = folder / "run.yaml"
    path.write_text("data: {path: data, labels: {ball: 1, core: 2}}\noutput: run\n")
    values = {
        "samples.size": SIZE,
        "backbone.name": "sam-tiny-1",
        "lora.rank": RANK,
        "rounds.count": ROUNDS,
        "rounds.patience": 3,
        "data.test_fraction": 0.5,
        "training.batch_size": 4,
        "training.warmup_steps": 4,
        "threads": 1,
        **fields,
    }
    return resolve(read_config(path, [f"{field}={json.dumps(value)}" for field, value in values.items()]))


class Lazy(SiteSide):
    """A site that trains only if it has not been sent the same tensors in the same rounds of another cell.

    Where an attack is left out, the other sites train as without it, so their packets are known.
    """

    cache: dict[str, bytes]
    """Checksum of all that a site was sent so far → its packet."""
    seen = ""
    waiting: list[list[bytes]]
    """Packets of the rounds that it has not trained yet."""
    trained: tuple[int, dict[str, Tensor]]
    """The round whose result it held when it trained last, and these tensors."""

    def join(self, message: bytes) -> bytes:
        answer = super().join(message)
        self.trained = (0, dict(self.client.agreement.start))
        return answer

    def fit(self, packets: Any) -> bytes:
        self.waiting = [*getattr(self, "waiting", []), list(packets)]
        _, start = self.client._receive(self.waiting[-1])
        self.seen = sha256(f"{self.seen} {self.name} {checksum(start)}".encode()).hexdigest()
        if self.seen not in self.cache:
            if len(self.waiting) > 1:
                # It has received rounds that it must train first, from the tensors that it held before them.
                self.client.state.hold(*self.trained)
            while self.waiting:
                self.cache[self.seen] = super().fit(self.waiting.pop(0))
            self.trained = self.client.state.held() or self.trained
        return self.cache[self.seen]


class Sabotaged(Lazy):
    """A site that lies."""

    attack: str
    rounds = 0

    def join(self, message: bytes) -> bytes:
        tree = json.loads(super().join(message))
        if self.attack == "false counts":
            tree |= {"training_slices": 10**10}
        if self.attack == "modalities first":
            tree |= {"modalities": 3}
        return json.dumps(tree).encode()

    def fit(self, packets: Any) -> bytes:
        packets = list(packets)
        _, start = self.client._receive(packets)
        packet = super().fit(packets)
        self.rounds += 1
        agreement = self.client.agreement
        contract = agreement.up(self.name, self.rounds)
        header, tensors = decode(packet, lambda header: contract, contract.tensor_bytes)
        if self.attack == "false counts":
            return packet
        if agreement.lossless:
            tensors = {name: tensor - start[name] for name, tensor in tensors.items()}
        tensors = {name: self.change(tensor) for name, tensor in tensors.items()}
        if agreement.lossless:
            tensors = {name: start[name] + tensor for name, tensor in tensors.items()}
        entries = contract.coder.encode(tensors, 0)
        if self.attack == "huge numbers":
            entries = {n: huge(e) if e.is_floating_point() else e for n, e in entries.items()}
        if self.attack == "NaN":
            entries = {n: torch.full_like(e, torch.nan) if e.is_floating_point() else e for n, e in entries.items()}
        if self.attack == "missing keys":
            entries.pop(min(entries))
        text = json.loads(header.model_dump_json())
        text["metrics"] = self.scores(text["metrics"])
        content = save({n: e.contiguous() for n, e in entries.items()}, metadata={ENTRY: json.dumps(text)})
        body = zstandard.ZstdCompressor(write_checksum=True).compress(content)
        return MAGIC + sha256(body).digest() + body

    def validate(self, packets: Any) -> bytes:
        return json.dumps(self.scores(json.loads(super().validate(packets)))).encode()

    def change(self, tensor: Tensor) -> Tensor:
        """What the site sends in place of a tensor's change."""
        return tensor * {"opposite": -1.0, "nine times opposite": -9.0}.get(self.attack, 1.0)

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What the site reports in place of its metrics."""
        lie = {"text scores": "0.9", "false Dice": 1.0 if self.rounds <= ROUNDS // 2 else 0.0}.get(self.attack)
        if lie is None:
            return metrics
        return {name: lie if name.startswith("validation.") else value for name, value in metrics.items()}


def huge(entry: Tensor) -> Tensor:
    """±1e30 with the entry's signs, or the largest number of its type."""
    return entry.sign() * min(1e30, torch.finfo(entry.dtype).max)


def run(attack: str, honest: int, fields: dict[str, Any], folder: Path, cache: dict[str, bytes]) -> dict[str, Any]:
    """Run a federation and return the honest sites' test Dice by case, its rounds, and what the ledger says of the liar."""
    names = [f"site_{number}" for number in range(honest)]
    make_data(folder / "data", [*names, LIAR])
    config = configuration(folder, fields)
    begun = RunFolder(config.output)
    begun.begin(config)
    # The same id in every cell, so that packets are the same, too.
    begun.environment.write_text(json.dumps({**begun.read_environment(), "run": "0" * 32}))
    server = ServerSide(config.output)
    sides: dict[str, Lazy] = {}
    for name in names if attack == NONE else [LIAR, *names]:
        site = {
            "data": {"path": folder / "data" / name},
            "state": folder / "state" / name,
            "threads": 1,
            "min_cases": 1,
            "bounds": {"min_steps": 1},
        }
        side = sides[name] = (Sabotaged if name == LIAR else Lazy)(name, SiteConfig.model_validate(site))
        side.cache = cache
        if isinstance(side, Sabotaged):
            side.attack = attack
        server.admit(name, side.join(server.proposal))
    server.open()

    def carry(work: Work) -> Iterator[Answer]:
        for name, side in sides.items():
            if name not in server.held:
                continue
            packets = server.packets(name, work)
            down = sum(map(len, packets))
            seconds = float("nan") if name == LIAR and attack == "NaN seconds" else 1.0
            if work == "fit":
                yield Answer(name, down, fitted=side.fit(packets), seconds=seconds)
            else:
                scores = server.read_scores(side.validate(packets))
                yield Answer(name, down, scores=scores, missing="" if scores is not None else "its scores are invalid")

    server.train(carry, lambda: False)
    events = [event.as_json() for event in server.ledger.events() if not isinstance(event, Fitted)]
    about = [event for event in events if event.get("site") == LIAR and "reason" in event]
    return {
        "rounds": server.server.rounds_done,
        "dice": test_dice(sides[names[0]], server, config, folder, names),
        "ledger": about[0]["reason"] if about else "",
        "times": len(about),
    }


def test_dice(side: SiteSide, server: ServerSide, config: RunConfig, folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Case → mean Dice over the classes, of the honest sites' test cases."""
    load_tensors(side.network, server.server.tensors)
    cases = []
    for name in names:
        data = config.data.model_copy(update={"path": folder / "data" / name})
        site = read_site(data, config.seed, name, None)
        labels = label_map(data, name)
        cases += [prepare(case, labels, side.config.samples, folder / "test" / name) for case in site.of("test")]
    return {
        score.case: mean(v or 0.0 for v in score.dice.values()) for score in score_cases(side.network, cases, side.config)
    }


def key(attack: str, column: str) -> str:
    """Name of a cell."""
    return f"{attack}, {column}"


def compute(attack: str, column: str, cache: dict[str, bytes]) -> dict[str, Any]:
    """Run one cell. ``cache`` belongs to the column."""
    fields = dict(COLUMNS[column])
    if attack == NONE and column in ROBUST:
        fields |= {"aggregator": "fedavg", "rounds.weights": "uniform"}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            cell = run(attack, SITES.get(column, 2), fields, Path(folder), cache)
        except FlapsamError as error:
            cell = {"ended": str(error)}
    return {**cell, "seconds": round(time.perf_counter() - began)}


def shown(cells: Cells, attack: str, column: str) -> str:
    """A cell as text: the Dice lost or gained, against the run without the liar."""
    cell, without = cells.get(key(attack, column)), cells.get(key(NONE, column))
    if cell is None or without is None:
        return "missing"
    if "ended" in cell:
        return f"**ended: {cell['ended']}**"
    lost = mean(cell["dice"].values()) - mean(without["dice"].values())
    return f"{lost:+.3f}" if lost >= -ALLOWED else f"**{lost:+.3f}**"


def part(cells: Cells, columns: Sequence[str], title: str) -> list[str]:
    lines = [
        f"## {title}",
        "",
        f"| attack | {' | '.join(f'`{name}`' for name in columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    baselines = [cells.get(key(NONE, name)) for name in columns]
    dice = " | ".join(f"{mean(cell['dice'].values()):.3f}" if cell else "missing" for cell in baselines)
    lines.append(f"| *Dice without the attacker* | {dice} |")
    lines += [f"| {attack} | {' | '.join(shown(cells, attack, name) for name in columns)} |" for attack in ATTACKS]
    return [*lines, ""]


def table(cells: Cells) -> str:
    """The cells as Markdown."""
    attacked = {name: cell for name, cell in cells.items() if not name.startswith(NONE)}
    ended = sum("dice" in cell for cell in attacked.values())
    plain = [name for name in attacked if not name.startswith(POISONS)]
    within = sum(not shown(cells, *name.split(", ", 1)).startswith("**") for name in plain)
    lines = [
        "# One malicious site of three",
        "",
        "Written by `OMP_NUM_THREADS=1 python benchmarks/malicious_site.py`. The script's docstring describes the attacks",
        "and the measurement. A number is the honest sites' test Dice minus that of the run without the attacker. Bold is a",
        f"loss of more than {ALLOWED}, or a run that did not end with an adapter.",
        "",
        f"Runs that ended with an adapter: {ended} of {len(attacked)}. Of the attacks other than the last two,",
        f"{within} of {len(plain)} runs ended and cost at most {ALLOWED} Dice. The last two are poison that no check of",
        "single updates can find. Only `median` and `trimmed-mean` are made for it.",
        "",
        *part(cells, list(AGGREGATORS), "Aggregators, with codec `steps`"),
        *part(cells, [name for name in COLUMNS if name not in AGGREGATORS], "Codecs, with aggregator `flexlora-aligned`"),
        "## What the ledger says",
        "",
        "With `flexlora-aligned` and `steps`. Lines are those about the malicious site that give a reason.",
        "",
        "| attack | first reason | lines | rounds |",
        "|---|---|---:|---:|",
    ]
    for attack in ATTACKS:
        if cell := cells.get(key(attack, "flexlora-aligned")):
            reason, times, rounds = cell.get("ledger") or "nothing", cell.get("times", 0), cell.get("rounds", 0)
            lines.append(f"| {attack} | {reason} | {times} | {rounds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="minutes after which no further cell is started")
    parser.add_argument("--only", default="", help="compute only cells whose name contains this text")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = read_cells(RESULTS)
    end = time.monotonic() + 60 * given.minutes
    columns = ["flexlora-aligned", *(name for name in COLUMNS if name != "flexlora-aligned")]
    caches: dict[str, dict[str, bytes]] = {name: {} for name in columns}
    plain = [attack for attack in ATTACKS if attack not in POISONS]
    order = [(attack, name) for some in ((NONE, *plain), POISONS) for name in columns for attack in some]
    work = {key(attack, name): partial(compute, attack, name, caches[name]) for attack, name in order}
    for name, cell in work.items():
        if name not in cells and given.only in name and time.monotonic() < end:
            cells[name] = cell()
            write_cells(RESULTS, cells)
            print(f"{name}: {shown(cells, *name.split(', ', 1))}, {cells[name]['seconds']} s", flush=True)
    write_text(TABLE, table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
