"""All sites on one machine: volumes → rounds → adapters, label maps and scores.

Every mode is a set of federations: ``federated`` is one of all sites, ``local`` one of each site alone, ``centralised`` one
whose only client holds the pooled data.
"""

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flapsam.adapter import AdapterCard, BackboneCard, save_adapter
from flapsam.config import Compression, RunConfig, write_config
from flapsam.device import default_threads, find_device, set_up_torch
from flapsam.environment import environment
from flapsam.errors import FlapsamError, choose
from flapsam.federation.aggregation import Aggregator, aggregator
from flapsam.federation.agreement import Agreement
from flapsam.federation.compression import codec
from flapsam.federation.engines.local import run_rounds
from flapsam.federation.engines.workers import Workers
from flapsam.federation.ledger import Ledger, read_ledger
from flapsam.federation.observer import Observer
from flapsam.federation.rounds import Client, ClientData, Server
from flapsam.federation.server_optimizers import SERVER_OPTIMIZERS
from flapsam.federation.state import ClientState, ServerState
from flapsam.federation.weights import client_weights
from flapsam.files import check_writable, write_text
from flapsam.inference import predict_volume
from flapsam.memory import windows_that_fit
from flapsam.metrics import CaseScores, Summary, by_site, score_case, summarise
from flapsam.model_card import model_card
from flapsam.sam import (
    Assembled,
    Sam,
    adapted_weights,
    architecture,
    assemble_run,
    load_tensors,
    strategy,
    tensors_of,
    travelling_state,
)
from flapsam.sam.checkpoints import find_weights
from flapsam.sam.encoder import checkpoint_layers
from flapsam.sam.sources import source
from flapsam.sites import Site, hold_out_validation, label_map, read_sites
from flapsam.slices import check_geometry, prepare, read_pair
from flapsam.traffic import full_packet_bytes
from flapsam.volumes import count_modalities, read_geometry, write_label_like


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


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with everything left open filled in.

    Raises:
        FlapsamError: a name in it is unknown.
    """
    sizes = architecture(source(config.backbone.name).architecture)
    find_weights(config.backbone)
    strategy(config.strategy)
    size = config.samples.size or sizes.default_size
    sizes.tokens(size)
    method = aggregator(config.aggregator, config.lora.rank)
    codec(config.compression)
    if choose("server.optimizer", config.server.optimizer, SERVER_OPTIMIZERS) and not method.keeps_basis:
        raise FlapsamError(
            f"server.optimizer: {config.server.optimizer} needs adapters whose rows mean the same from round to round, and "
            f"aggregator {config.aggregator} turns them; choose flexlora-aligned or fedavg"
        )
    larger = [site for site, rank in config.site_ranks.items() if rank > config.lora.rank]
    if larger:
        raise FlapsamError(f"site_ranks.{larger[0]}: larger than lora.rank, {config.lora.rank}; raise that one")
    return config.model_copy(
        update={
            "samples": config.samples.model_copy(update={"size": size}),
            "threads": config.threads or default_threads(),
            "device": str(find_device(config.device)),
        }
    )


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
        config = self._count_modalities(sites)
        weights = client_weights(training, config)
        training = [hold_out_validation(site, config.data.validation_fraction, config.seed) for site in training]
        self.run_id = self._open_folder()
        self.ledger = Ledger(self.folder / "events.jsonl")
        clients = self._prepare(training)
        self.assembled = _assemble(config)
        self.observer.say(self.assembled.about)
        self._measure_memory()
        self.initial = travelling_state(self.assembled.network)
        self.network_start = self._start(aggregator(config.aggregator, config.lora.rank))
        scores: dict[str, list[CaseScores]] = {}
        for federation in self._federations(training, clients, sites):
            rounds = self._train(federation, weights)
            self._test(federation)
            text = model_card(self._card(federation, rounds), federation.name, read_ledger(self.ledger.path))
            write_text(self.folder / federation.adapter / "README.md", text)
        for event in read_ledger(self.ledger.path):
            if event["event"] == "test":
                score = CaseScores(event["case"], event["site"], event["dice"], event["hd95"])
                scores.setdefault(event["federation"].split("/")[0], []).append(score)
        results = Results(self.folder, scores, sum(tensor.numel() for tensor in self.initial.values()), self._traffic())
        write_text(self.folder / "results.json", json.dumps(results.as_json(), indent=2) + "\n")
        self.observer.event(self.ledger.write("end"))
        shutil.rmtree(self._cache, ignore_errors=True)
        return results

    @property
    def _cache(self) -> Path:
        return self.folder / "cache"

    def _open_folder(self) -> str:
        """Make the run's folder, or check that it holds this run; returns the run's id."""
        description, identity = self.folder / "run.yaml", self.folder / "environment.json"
        text = write_config(self.config)
        if identity.exists():
            if not self.resume:
                raise FlapsamError(f"{self.folder}: there is a run here already; add --resume, or choose another output")
            if description.read_text() != text:
                raise FlapsamError(
                    f"{description}: the run here was started with another configuration; give that one to resume it"
                )
            return json.loads(identity.read_text())["run"]
        if self.resume:
            raise FlapsamError(f"{self.folder}: there is no run here to resume; leave out --resume")
        check_writable(self.folder)
        write_text(description, text)
        run = uuid.uuid4().hex
        write_text(identity, json.dumps({"run": run, **environment()}, indent=2) + "\n")
        return run

    def _count_modalities(self, sites: Sequence[Site]) -> RunConfig:
        """The configuration with what the cases' headers say, which must be the same in all."""
        counts = {case: count_modalities(case.images) for site in sites for case in site.cases}
        first, number = next(iter(counts.items()))
        for case, count in counts.items():
            if count != number:
                raise FlapsamError(f"{case.image}: the case has {count} modalities, {first.image} has {number}")
        samples = self.config.samples.model_copy(update={"modalities": number})
        self.config = self.config.model_copy(update={"samples": samples})
        return self.config

    def _prepare(self, sites: Sequence[Site]) -> list[ClientData]:
        """Unpack every training and validation case."""
        self.observer.begin("reading volumes", sum(len(site.of("train", "val")) for site in sites))
        clients = []
        for site in sites:
            labels = label_map(self.config.data, site.name)
            parts = {}
            for split in ("train", "val"):
                parts[split] = []
                for case in site.of(split):
                    parts[split].append(prepare(case, labels, self.config.samples, self._cache / site.name))
                    self.observer.step()
            clients.append(ClientData(site.name, parts["train"], parts["val"]))
            cases = {split: len(site.of(split)) for split in ("train", "val", "test")}
            self.observer.event(self.ledger.write("site", site=site.name, cases=cases))
        self.observer.end()
        return clients

    def _measure_memory(self) -> None:
        """Put a number in the place of ``micro_batch: auto``; a run that is gone on with keeps its first."""
        training = self.config.training
        if training.micro_batch != "auto":
            return
        known = [event["windows"] for event in read_ledger(self.ledger.path) if event["event"] == "micro_batch"]
        windows = known[0] if known else windows_that_fit(self.assembled.network, training, self.config.precision)
        if not known:
            self.observer.event(self.ledger.write("micro_batch", windows=windows))
        self.observer.say(f"micro_batch: {windows} of a batch's {training.batch_size} windows fit into memory at once")
        training = training.model_copy(update={"micro_batch": windows})
        self.config = self.config.model_copy(update={"training": training})

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
        # The mean of one client's tensors is those tensors, and nothing travels: a site alone is never aggregated.
        method = aggregator(config.aggregator if together else "fedavg", config.lora.rank)
        load_tensors(assembled.network, self.network_start)
        agreement = Agreement(
            self.run_id,
            self._start(method),
            list(self.initial),
            method,
            config.compression if together else Compression(codec="fp32"),
            config.site_ranks if together else {},
        )
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
        save_adapter(self.folder / federation.adapter, self._card(federation, server.rounds_done), server.tensors)
        load_tensors(assembled.network, server.tensors)
        return server.rounds_done

    def _start(self, method: Aggregator) -> dict[str, Tensor]:
        """The global tensors that this aggregator begins with."""
        more = adapted_weights(self.initial) if method.base_weights else set()
        return self.initial | tensors_of(self.assembled.network, more - self.initial.keys())

    def _card(self, federation: Federation, rounds: int) -> AdapterCard:
        config = self.config
        return AdapterCard(
            run=self.run_id,
            mode=federation.mode,
            rounds=rounds,
            strategy=config.strategy,
            lora=config.lora,
            frozen=config.frozen,
            backbone=BackboneCard(
                name=config.backbone.name,
                pixels=config.backbone.pixels,
                weights=Path(self.assembled.weights).name,
                masks=config.backbone.masks,
                seed=config.seed,
                checksum=self.assembled.checksum,
            ),
            samples=config.samples,
            classes=config.data.classes,
            labels=config.data.labels,
            licence=config.licence or source(config.backbone.name).licence,
        )

    def _test(self, federation: Federation) -> None:
        """Predict and score the test cases, each once; label maps go to ``predictions``."""
        config = self.config
        cases = [case for site in federation.tested for case in site.of("test")]
        self.observer.begin(f"{federation.name}: test", len(cases))
        for case in cases:
            identity = {"federation": federation.name, "site": case.site, "case": case.name}
            if not self.ledger.holds("test", **identity):
                labels = label_map(config.data, case.site)
                image, truth = read_pair(case, labels)
                predicted = predict_volume(
                    self.assembled.network,
                    image,
                    config.samples,
                    batch=config.inference_batch,
                    precision=config.precision,
                    site=case.site,
                )
                target = self.folder / "predictions" / federation.mode / case.site / f"{case.name}.nii.gz"
                write_label_like(predicted, case.image, target)
                score = score_case(
                    case.name, case.site, predicted, truth.array, image.spacing, labels.classes, labels.annotated
                )
                self.observer.event(self.ledger.write("test", **identity, dice=score.dice, hd95=score.hd95))
            self.observer.step()
        self.observer.end()

    def _traffic(self) -> Traffic | None:
        if "federated" not in self.config.modes:
            return None
        events = [event for event in read_ledger(self.ledger.path) if event.get("federation") == "federated"]
        fits = sum(event["event"] == "fit" for event in events)
        up, down = (sum(event.get(key, 0) for event in events) / fits for key in ("bytes_up", "bytes_down"))
        return Traffic(up, down, full_packet_bytes(self.config))


def _assemble(config: RunConfig) -> Assembled:
    """The network where and as the run wants it."""
    set_up_torch(config.threads or 1, deterministic=config.deterministic)
    assembled = assemble_run(config)
    assembled.network.to(config.device)
    if config.training.checkpointing:
        checkpoint_layers(assembled.network.vision_encoder)
    return assembled


def _clients(
    network: Sam, config: RunConfig, agreement: Agreement, data: Sequence[ClientData], folder: Path
) -> dict[str, Client]:
    """Site → client; all share the network."""
    return {one.site: Client(network, one, config, agreement, ClientState(folder / one.site)) for one in data}


def _own_clients(config: RunConfig, agreement: Agreement, data: Sequence[ClientData], folder: Path) -> dict[str, Client]:
    """The same in a worker, on a network of its own."""
    return _clients(_assemble(config).network, config, agreement, data, folder)


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
    for site in sites:
        for case in site.cases:
            check_geometry(case, read_geometry(case.image, modalities=True), read_geometry(case.label))
