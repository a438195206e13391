"""All sites on one machine: volumes → rounds → adapters, label maps and scores.

Every mode is a set of federations: ``federated`` is one of all sites, ``local`` one of each site alone, ``centralised`` one
whose only client holds the pooled data.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flapsam.adapter import save_adapter
from flapsam.config import RunConfig
from flapsam.environment import default_threads
from flapsam.errors import FlapsamError
from flapsam.federation.aggregation import aggregator
from flapsam.federation.agreement import Agreement
from flapsam.federation.engines.local import run_rounds
from flapsam.federation.engines.workers import Workers
from flapsam.federation.folder import LEDGER, LOCK, begin_run, found_run, is_begun
from flapsam.federation.ledger import Ledger, read_ledger, scores_in
from flapsam.federation.observer import Observer
from flapsam.federation.preparation import (
    agree,
    agree_alone,
    assembled_for,
    card_of,
    check_pairs,
    prepare_site,
    resolve,
    start_of,
    with_modalities,
    with_windows,
)
from flapsam.federation.rounds import Client, ClientData, Server
from flapsam.federation.state import ClientState, ServerState
from flapsam.federation.weights import client_weights, training_size
from flapsam.files import alone, write_text
from flapsam.inference import predict_volume
from flapsam.metrics import CaseScores, Summary, by_site, score_case, summarise
from flapsam.model_card import model_card
from flapsam.sam import Sam, fuse, load_tensors, travelling_state
from flapsam.sites import Site, hold_out_validation, label_map, read_sites
from flapsam.slices import read_pair
from flapsam.traffic import full_packet_bytes
from flapsam.volumes import legend_of, write_label_like


@dataclass(frozen=True)
class Traffic:
    """Measured bytes of all federated packets, a round and a site."""

    up: float
    down: float
    full: int
    """What the parameters of full fine-tuning would take one way."""

    @property
    def ratio(self) -> float:
        """How many times less travels than with full fine-tuning."""
        return 2 * self.full / (self.up + self.down)


@dataclass(frozen=True)
class Results:
    """What a simulation ends with."""

    folder: Path
    scores: dict[str, list[CaseScores]]
    """Test scores of each mode, a case an entry."""
    parameters: int
    """That train, and travel."""
    traffic: Traffic | None

    def summaries(self) -> dict[str, dict[str, Summary]]:
        """Mode → site → means over its cases; ``pooled`` holds the means over all cases."""
        return {
            mode: {site: summarise(part) for site, part in by_site(scores).items()} | {"pooled": summarise(scores)}
            for mode, scores in self.scores.items()
        }

    def as_json(self) -> dict[str, Any]:
        """The results for other programs."""
        traffic = {**asdict(self.traffic), "ratio": self.traffic.ratio} if self.traffic else None
        return {
            "folder": str(self.folder),
            "summaries": {
                mode: {site: asdict(summary) for site, summary in sites.items()} for mode, sites in self.summaries().items()
            },
            "cases": {mode: [asdict(score) for score in scores] for mode, scores in self.scores.items()},
            "parameters": self.parameters,
            "traffic": traffic,
        }


@dataclass(frozen=True)
class Federation:
    """Who trains one model together."""

    name: str
    mode: str
    clients: Sequence[ClientData]
    tested: Sequence[Site]
    """Sites on whose test cases the model is scored."""
    adapter: Path
    """Where its adapter goes, relative to the run's folder."""


def simulate(config: RunConfig, *, resume: bool = False, workers: int = 1, observer: Observer | None = None) -> Results:
    """Run a configuration to its end.

    Args:
        config: the run.
        resume: go on with the run in ``config.output`` where a crash or an interruption stopped it.
        workers: sites that are fitted side by side, each on ``config.threads`` threads, or an equal part of all cores if
            these are not given. The result depends on the threads, not on the workers.
        observer: is told what happens.

    Raises:
        FlapsamError: the configuration, the data or the output folder is wrong.
    """
    if workers > 1 and config.threads is None:
        config = config.model_copy(update={"threads": max(1, default_threads() // workers)})
    return _Simulation(resolve(config), resume=resume, workers=workers, observer=observer or Observer()).run()


class _Simulation:
    def __init__(self, config: RunConfig, *, resume: bool, workers: int, observer: Observer) -> None:
        self.config = config
        self.folder = config.output
        self.resume = resume
        self.workers = workers
        self.observer = observer

    def run(self) -> Results:
        config = self.config
        sites = read_sites(config.data, config.seed)
        training = [site for site in sites if site.name not in config.data.unseen]
        _check_cases(sites, training)
        _check_ranks(training, config)
        config = self.config = with_modalities(config, [case for site in sites for case in site.cases])
        weights = client_weights({site.name: training_size(site, config) for site in training}, config.rounds)
        training = [hold_out_validation(site, config.data.validation_fraction, config.seed) for site in training]
        self.run_id = self._open_folder()
        with alone(self.folder / "state" / LOCK, wait=False):
            return self._run(sites, training, weights)

    def _run(self, sites: Sequence[Site], training: Sequence[Site], weights: Mapping[str, float]) -> Results:
        config = self.config
        self.ledger = Ledger(self.folder / LEDGER, self.observer.event)
        self.observer.opened(config, read_ledger(self.ledger.path))
        clients = self._prepare(training)
        self.assembled = assembled_for(config)
        self.observer.say(self.assembled.origin.about)
        self._measure_memory()
        self.start = start_of(self.assembled.network, aggregator(config.aggregator, config.lora.rank))
        scores: dict[str, list[CaseScores]] = {}
        for federation in self._federations(training, clients, sites):
            rounds = self._train(federation, weights)
            self._test(federation)
            card = card_of(self.run_id, federation.mode, rounds, config, self.assembled.origin)
            text = model_card(card, federation.name, read_ledger(self.ledger.path))
            write_text(self.folder / federation.adapter / "README.md", text)
        for event in read_ledger(self.ledger.path):
            if event["event"] == "test":
                scores.setdefault(event["federation"].split("/")[0], []).append(scores_in(event))
        parameters = sum(tensor.numel() for tensor in travelling_state(self.assembled.network).values())
        results = Results(self.folder, scores, parameters, self._traffic())
        write_text(self.folder / "results.json", json.dumps(results.as_json(), indent=2) + "\n")
        self.ledger.write("end")
        shutil.rmtree(self._cache, ignore_errors=True)
        return results

    @property
    def _cache(self) -> Path:
        return self.folder / "cache"

    def _open_folder(self) -> str:
        """Make the run's folder, or check that it holds this run; returns the run's id."""
        if is_begun(self.folder):
            if not self.resume:
                raise FlapsamError(f"{self.folder}: there is a run here already; add --resume, or choose another output")
            return found_run(self.config)
        if self.resume:
            raise FlapsamError(f"{self.folder}: there is no run here to resume; leave out --resume")
        return begin_run(self.config)

    def _prepare(self, sites: Sequence[Site]) -> list[ClientData]:
        """Unpack every training and validation case."""
        self.observer.begin("reading volumes", sum(len(site.of("train", "val")) for site in sites))
        clients = []
        for site in sites:
            clients.append(prepare_site(site, self.config, self._cache / site.name, self.observer.step))
            cases = {split: len(site.of(split)) for split in ("train", "val", "test")}
            self.ledger.write("site", site=site.name, cases=cases)
        self.observer.end()
        return clients

    def _measure_memory(self) -> None:
        """Put a number in the place of ``micro_batch: auto``; a run that is gone on with keeps its first."""
        training = self.config.training
        if training.micro_batch != "auto":
            return
        known = [event["windows"] for event in read_ledger(self.ledger.path) if event["event"] == "micro_batch"]
        self.config = with_windows(self.config, self.assembled.network, *known[:1])
        if not known:
            self.ledger.write("micro_batch", windows=self.config.training.micro_batch)
        windows = self.config.training.micro_batch
        self.observer.say(f"micro_batch: {windows} of a batch's {training.batch_size} windows fit into memory at once")

    def _federations(
        self, training: Sequence[Site], clients: Sequence[ClientData], tested: Sequence[Site]
    ) -> list[Federation]:
        result = []
        for mode in self.config.modes:
            if mode == "federated":
                result.append(Federation(mode, mode, clients, tested, Path("adapter")))
            elif mode == "centralised":
                pooled = ClientData(
                    mode, [c for data in clients for c in data.train], [c for data in clients for c in data.val]
                )
                result.append(Federation(mode, mode, [pooled], tested, Path("adapter-centralised")))
            else:
                result += [
                    Federation(f"{mode}/{site.name}", mode, [data], [site], Path("adapter-local") / site.name)
                    for site, data in zip(training, clients, strict=True)
                ]
        return result

    def _train(self, federation: Federation, weights: Mapping[str, float]) -> int:
        """Run the rounds and save the adapter, which the network holds afterwards; returns the number of rounds."""
        config, assembled = self.config, self.assembled
        state = self.folder / "state" / federation.name
        together = federation.mode == "federated"
        load_tensors(assembled.network, self.start)
        agreement = (agree if together else agree_alone)(self.run_id, config, assembled.network)
        server = Server(
            agreement,
            weights if together else {data.site: 1.0 for data in federation.clients},
            ServerState(state / "server"),
            options=config.server if together else None,
            seed=config.seed,
        )
        description = (config, agreement, federation.clients, state / "sites")
        clients = list(_clients(assembled.network, *description).values())
        side_by_side = min(self.workers, len(clients)) > 1
        with Workers(self.workers, partial(_own_clients, *description)) if side_by_side else nullcontext() as workers:
            run_rounds(federation.name, server, clients, self.ledger, self.observer, workers)
        card = card_of(self.run_id, federation.mode, server.rounds_done, config, assembled.origin)
        save_adapter(self.folder / federation.adapter, card, server.tensors)
        load_tensors(assembled.network, server.tensors)
        return server.rounds_done

    def _test(self, federation: Federation) -> None:
        """Predict and score the test cases, each once; label maps go to ``predictions``."""
        config = self.config
        cases = [case for site in federation.tested for case in site.of("test")]
        # As ``flapsam predict`` has it, so that label maps are the same to the last voxel.
        network = fuse(deepcopy(self.assembled.network))
        self.observer.begin(f"{federation.name}: test", len(cases))
        for case in cases:
            identity = {"federation": federation.name, "site": case.site, "case": case.name}
            if not self.ledger.holds("test", **identity):
                labels = label_map(config.data, case.site)
                image, truth = read_pair(case, labels)
                predicted = predict_volume(
                    network,
                    image,
                    config.samples,
                    batch=config.inference_batch,
                    precision=config.precision,
                    site=case.site,
                ).labels
                target = self.folder / "predictions" / federation.mode / case.site / f"{case.name}.nii.gz"
                write_label_like(predicted, case.image, target, legend_of(config.data.classes))
                score = score_case(
                    case.name, case.site, predicted, truth.array, image.spacing, labels.classes, labels.annotated
                )
                self.ledger.write("test", **identity, dice=score.dice, hd95=score.hd95)
            self.observer.step()
        self.observer.end()

    def _traffic(self) -> Traffic | None:
        if "federated" not in self.config.modes:
            return None
        events = [event for event in read_ledger(self.ledger.path) if event.get("federation") == "federated"]
        fits = sum(event["event"] == "fit" for event in events)
        up, down = (sum(event.get(key, 0) for event in events) / fits for key in ("bytes_up", "bytes_down"))
        return Traffic(up, down, full_packet_bytes(self.config))


def _clients(
    network: Sam, config: RunConfig, agreement: Agreement, data: Sequence[ClientData], folder: Path
) -> dict[str, Client]:
    """Site → client; all share the network."""
    return {one.site: Client(network, one, config, agreement, ClientState(folder / one.site)) for one in data}


def _own_clients(config: RunConfig, agreement: Agreement, data: Sequence[ClientData], folder: Path) -> dict[str, Client]:
    """The same in a worker, on a network of its own."""
    return _clients(assembled_for(config).network, config, agreement, data, folder)


def _check_ranks(training: Sequence[Site], config: RunConfig) -> None:
    names = [site.name for site in training]
    odd = [site for site in config.site_ranks if site not in names]
    if odd:
        raise FlapsamError(f"site_ranks.{odd[0]}: there is no such site; there are {', '.join(names)}")


def _check_cases(sites: Sequence[Site], training: Sequence[Site]) -> None:
    """From headers alone, before long work begins: every site can do its part, every pair fits together."""
    if not training:
        raise FlapsamError("data.unseen: it names every site, so none is left to train")
    for site in training:
        if not site.of("train"):
            raise FlapsamError(f"site {site.name}: it has no training case; give it one, or leave it out with data.sites")
    check_pairs(sites)
