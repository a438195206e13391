"""Simulation of all sites on one machine, from volumes through rounds to adapters, label maps and scores.

Every mode is a set of cohorts. ``federated`` has one cohort of all sites, ``local`` has one cohort per site, and
``centralised`` has one cohort whose only client holds the pooled data. ``ensemble`` trains nothing: it averages the
probabilities of the adapters from ``local``.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flapsam.adapters.card import write_model_card
from flapsam.adapters.store import AdapterCard, read_tensors, save_adapter
from flapsam.base.device import describe_device, device_of_worker, on_one_device
from flapsam.base.errors import FlapsamError
from flapsam.base.files import alone, write_text
from flapsam.federation.aggregation import aggregator
from flapsam.federation.agreement import Agreement
from flapsam.federation.borne import check_borne, false_sites_borne
from flapsam.federation.client import Client, ClientData
from flapsam.federation.engines.local import own_adapters, run_rounds
from flapsam.federation.engines.workers import Workers
from flapsam.federation.going_back import go_back
from flapsam.federation.preparation import (
    agree,
    agree_alone,
    assembled_for,
    card_of,
    check_pairs,
    collector_of,
    first_range,
    has_own_adapters,
    prepare_site,
    resolve,
    start_of,
    with_modalities,
    with_threads,
    with_windows,
)
from flapsam.federation.privacy.budget import Budget
from flapsam.federation.server import Server
from flapsam.federation.shares import client_shares, training_size, weights_of
from flapsam.federation.state import ClientState, ServerState
from flapsam.federation.traffic import full_packet_bytes
from flapsam.learning.metrics import (
    CaseScores,
    Summary,
    by_site,
    crossed,
    rule_for_absent,
    scores_of,
    spread,
    summarise,
    tested,
)
from flapsam.learning.testing import tested_case
from flapsam.run.config import LEAST_SECURE, SPLITS, Mode, RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import (
    TOGETHER,
    CaseTested,
    Cohort,
    Event,
    Fitted,
    Ledger,
    MicroBatchChosen,
    OwnAdapterKept,
    RunEnded,
    SiteJoined,
    bytes_sent,
)
from flapsam.run.observer import Observer
from flapsam.sam import Assembled, Sam, fuse, load_tensors, trained_state, travelling_state
from flapsam.sites import Site, hold_out_validation, keep_for_training, read_sites
from flapsam.volumes import legend_of, write_label_like

if TYPE_CHECKING:
    from flapsam.federation.secure_aggregation.member import Member


@dataclass(frozen=True)
class Traffic:
    """Measured traffic of the federated cohort, in bytes per round and site."""

    up: float
    down: float
    full: int
    """Bytes of full fine-tuning's parameters, one way."""

    @property
    def ratio(self) -> float:
        """Factor by which full fine-tuning's traffic is larger."""
        return 2 * self.full / (self.up + self.down)


@dataclass(frozen=True)
class Results:
    """What a simulation produced."""

    folder: Path
    scores: dict[str, list[CaseScores]]
    """Mode → test scores, one entry per case."""
    parameters: int
    """Number of parameters that train and travel."""
    traffic: Traffic | None
    """None where nothing travelled."""
    events: Sequence[Event] = ()
    """The run's ledger."""

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
                mode: {site: summary.as_json() for site, summary in sites.items()}
                for mode, sites in self.summaries().items()
            },
            "cases": {mode: [asdict(score) for score in scores] for mode, scores in self.scores.items()},
            "spread": {mode: asdict(found) if (found := spread(scores)) else None for mode, scores in self.scores.items()},
            "absent": rule_for_absent(score for scores in self.scores.values() for score in scores),
            "parameters": self.parameters,
            "traffic": traffic,
            "crossed": crossed(self.events),
        }


@dataclass(frozen=True)
class CohortTraining:
    """What one cohort trains with, and the sites on whose test cases its model is scored."""

    cohort: Cohort
    clients: Sequence[ClientData]
    """None in an ensemble, which does not train."""
    tested: Sequence[Site]


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before its first round."""

    config: RunConfig
    """The resolved configuration, in which every field has a value."""
    run: str
    """The run's id."""
    folder: RunFolder
    ledger: Ledger
    assembled: Assembled
    start: Mapping[str, Tensor]
    """The tensors that every cohort starts from, personal ones included."""
    shares: Mapping[str, float]
    """Site → its share in the mean."""
    trainings: Sequence[CohortTraining]
    """One training per cohort, in the order of ``modes``."""


def simulate(
    config: RunConfig,
    *,
    resume: bool = False,
    from_round: int | None = None,
    workers: int = 1,
    sites: Sequence[Site] | None = None,
    observer: Observer | None = None,
) -> Results:
    """Run a simulation to its end.

    Args:
        config: the run's configuration.
        resume: whether to resume the run in ``config.output`` from where it stopped.
        from_round: resume it from before this federated round instead, and drop everything since.
        workers: number of sites that train in parallel, each on ``config.threads`` threads, or on an equal share of all
            cores if that is None. The result depends on the number of threads, not on the number of workers.
        sites: the sites of ``config.data``, if they have been read before.
        observer: follows the run.

    Returns:
        The run's results, which are also in its folder.

    Raises:
        FlapsamError: the configuration, the data or the output folder is wrong.
    """
    config = with_threads(config, workers)
    observer = observer or Observer()
    if config.rounds.count == 0:
        raise FlapsamError("rounds.count: it is 0, so nothing would train; raise it")
    config = resolve(config)
    sites = read_sites(config.data, config.seed) if sites is None else sites
    if config.data.training_cases is not None:
        sites = divided(config, sites)
    training = [site for site in sites if site.name not in config.data.unseen]
    _check_cases(sites, training)
    _check_ranks(training, config)
    config = with_modalities(config, [case for site in sites for case in site.cases])
    shares = client_shares({site.name: training_size(site.of("train"), config) for site in training}, config.rounds)
    if "federated" in config.modes:
        count = sum(share > 0 for share in shares.values())
        check_borne(config, count)
        if config.secure and count < LEAST_SECURE:
            raise FlapsamError(f"secure: a sum needs at least {LEAST_SECURE} sites, and there are {count}")
    elif from_round is not None:
        raise FlapsamError("--from-round: this run has no federated rounds; add federated to modes, or leave the option out")
    folder = RunFolder(config.output)
    run = _open_folder(folder, config, resume or from_round is not None)
    with alone(folder.lock, wait=False):
        if from_round is not None:
            go_back(folder, from_round)
        prepared = prepare(config, run, sites, shares, observer, workers)
        for part in prepared.trainings:
            if not part.clients:
                test(prepared, part, observer)
                continue
            rounds = train(prepared, part, workers, observer)
            test(prepared, part, observer)
            write_model_card(*_card(prepared, part.cohort, rounds), part.cohort, prepared.ledger.events())
            if part.cohort == TOGETHER and has_own_adapters(config):
                for data in part.clients:
                    own = CohortTraining(Cohort("personal", data.site), [data], part.tested)
                    load_tensors(prepared.assembled.network, read_tensors(folder.adapter(own.cohort)))
                    test(prepared, own, observer)
                    write_model_card(*_card(prepared, own.cohort, rounds), own.cohort, prepared.ledger.events())
        results = _results(prepared)
        write_text(folder.results, json.dumps(results.as_json(), indent=2) + "\n")
        prepared.ledger.write(RunEnded())
        shutil.rmtree(folder.cache, ignore_errors=True)
    return results


def divided(config: RunConfig, sites: Sequence[Site]) -> list[Site]:
    """The sites with the split that a run uses: validation cases held out, and ``data.training_cases`` of each site kept.

    Args:
        config: the run's configuration.
        sites: the sites, each with its test cases.
    """
    fraction, seed, count = config.data.validation_fraction, config.seed, config.data.training_cases
    held_out = [hold_out_validation(site, fraction, seed) for site in sites]
    return held_out if count is None else [keep_for_training(site, count, seed) for site in held_out]


def prepare(
    config: RunConfig,
    run: str,
    sites: Sequence[Site],
    shares: Mapping[str, float],
    observer: Observer,
    workers: int = 1,
) -> Prepared:
    """Unpack the volumes and assemble the network.

    Args:
        config: the resolved configuration.
        run: the run's id.
        sites: all sites, each with its test cases.
        shares: site that trains → its share in the mean.
        observer: follows the work.
        workers: number of sites that train in parallel, which share the memory of a device.

    Raises:
        FlapsamError: a case or the backbone cannot be used.
    """
    folder = RunFolder(config.output)
    fraction = config.data.validation_fraction
    training = [hold_out_validation(site, fraction, config.seed) for site in sites if site.name in shares]
    ledger = Ledger(folder.ledger, observer.event)
    observer.opened(config, ledger.events())
    observer.begin("reading volumes", sum(len(site.of("train", "val")) for site in training))
    clients = []
    for site in training:
        clients.append(prepare_site(site, config, folder.cache / site.name, observer.step))
        ledger.write(SiteJoined(site=site.name, cases={split: len(site.of(split)) for split in SPLITS}))
    observer.end()
    assembled = assembled_for(config)
    observer.say(assembled.origin.about)
    if config.training.micro_batch == "auto":
        config = _measured(config, assembled.network, ledger, on_one_device(config.device, workers))
        windows, batch = config.training.micro_batch, config.training.batch_size
        observer.say(f"micro_batch: {windows} of the {batch} windows of a batch fit into memory at once")
    start = trained_state(assembled.network) | start_of(assembled.network, aggregator(config.aggregator, config.lora.rank))
    trainings = [part for mode in config.modes for part in _trainings(mode, training, clients, sites)]
    return Prepared(config, run, folder, ledger, assembled, start, shares, trainings)


def train(prepared: Prepared, training: CohortTraining, workers: int, observer: Observer) -> int:
    """Run a cohort's rounds and save its adapter, which the network holds afterwards.

    Args:
        prepared: the run.
        training: the cohort and its data.
        workers: number of sites that train in parallel.
        observer: follows the rounds.

    Returns:
        The number of rounds done.
    """
    network, cohort = prepared.assembled.network, training.cohort
    config = _with_all_steps(prepared) if cohort.mode == "centralised" else prepared.config
    together = cohort == TOGETHER
    load_tensors(network, prepared.start)
    agreement = agree(prepared.run, config, network) if together else agree_alone(prepared.run, network, config.lora.rank)
    state = ServerState(prepared.folder.server_state(cohort), config.rounds.keep)
    server = Server(
        agreement,
        prepared.shares if together else {data.site: 1.0 for data in training.clients},
        state,
        options=config.server if together else None,
        seed=config.seed,
        max_change=config.rounds.max_change,
        classes=config.data.classes,
        collector=collector_of(prepared.run, config, state, prepared.shares) if together else None,
        first_range=first_range(config),
    )
    if together and (event := false_sites_borne(config, sum(share > 0 for share in prepared.shares.values()), least=1)):
        prepared.ledger.write(event)
    description = (config, agreement, training.clients, prepared.folder.client_states(cohort))
    clients = list(_clients(network, *description).values())
    side_by_side = min(workers, len(clients)) > 1
    with Workers(workers, partial(_own_clients, *description)) if side_by_side else nullcontext() as processes:
        run_rounds(cohort, server, clients, prepared.ledger, observer, processes)
        shared = dict(prepared.start) | server.tensors
        folder, card = _card(prepared, cohort, server.rounds_done)
        save_adapter(folder, card, shared)
        kept = {event.site for event in prepared.ledger.events() if isinstance(event, OwnAdapterKept)}
        if together and has_own_adapters(config) and kept != {client.data.site for client in clients}:
            for site, own in own_adapters(cohort, server, clients, observer, processes):
                folder, card = _card(prepared, Cohort("personal", site), server.rounds_done)
                save_adapter(folder, card, shared | own.tensors)
                event = OwnAdapterKept(cohort=cohort, round=server.rounds_done, site=site, kept=own.kept, dice={**own.dice})
                prepared.ledger.write(event)
    load_tensors(network, shared)
    return server.rounds_done


def test(prepared: Prepared, training: CohortTraining, observer: Observer) -> None:
    """Predict and score a cohort's test cases, each once.

    Args:
        prepared: the run, whose network holds the cohort's adapter. An ensemble takes its adapters from their folders.
        training: the cohort and the sites that it is tested on.
        observer: follows the cases.
    """
    config, cohort = prepared.config, training.cohort
    cases = [case for site in training.tested for case in site.of("test")]
    scored = {
        (event.site, event.case)
        for event in prepared.ledger.events()
        if isinstance(event, CaseTested) and event.cohort == cohort
    }
    # The fused network, as in ``flapsam predict``, so that label maps are the same to the last voxel.
    network = fuse(deepcopy(prepared.assembled.network)) if training.clients else None
    observer.begin(f"{cohort}: test", len(cases))
    for case in cases:
        if (case.site, case.name) not in scored:
            found = tested_case(network or _alone(prepared), case, config)
            if cohort.mode != "personal" or cohort.site == case.site:
                target = prepared.folder.label_map(cohort.mode, case.site, case.name)
                write_label_like(found.labels, case.image, target, legend_of(config.data.classes))
            prepared.ledger.write(tested(cohort, found.scores))
        observer.step()
    observer.end()


def _alone(prepared: Prepared) -> Iterator[Sam]:
    """The network with the adapter of each site that trained alone, one after another."""
    for site in prepared.shares:
        own = read_tensors(prepared.folder.adapter(Cohort("local", site)))
        load_tensors(prepared.assembled.network, dict(prepared.start) | own)
        yield prepared.assembled.network


def _open_folder(folder: RunFolder, config: RunConfig, resume: bool) -> str:
    """Create the run's folder, or check that it holds this run, and return the run's id."""
    if folder.is_begun:
        if not resume:
            raise FlapsamError(f"{folder.path}: already holds a run; add --resume, or choose another output")
        return folder.resume(config)
    if resume:
        raise FlapsamError(f"{folder.path}: there is no run here to resume; leave out --resume")
    return folder.begin(config, describe_device(config.device))


def _measured(config: RunConfig, network: Sam, ledger: Ledger, sharing: int) -> RunConfig:
    """The configuration with a number in place of ``micro_batch: auto``. A resumed run keeps its first number."""
    known = [event.windows for event in ledger.events() if isinstance(event, MicroBatchChosen)]
    config = with_windows(config, network, *known[:1], sharing=sharing)
    if isinstance(config.training.micro_batch, int):
        ledger.write(MicroBatchChosen(windows=config.training.micro_batch))
    return config


def _with_all_steps(prepared: Prepared) -> RunConfig:
    """The configuration of the client that holds the pooled data: as many steps a round as all sites take together."""
    rounds = prepared.config.rounds
    if rounds.steps is None:
        return prepared.config
    rounds = rounds.model_copy(update={"steps": rounds.steps * len(prepared.shares)})
    return prepared.config.model_copy(update={"rounds": rounds})


def _trainings(
    mode: Mode, training: Sequence[Site], clients: Sequence[ClientData], sites: Sequence[Site]
) -> Iterator[CohortTraining]:
    """One training for each cohort of a mode."""
    if mode == "federated":
        yield CohortTraining(TOGETHER, clients, sites)
    elif mode == "ensemble":
        yield CohortTraining(Cohort(mode), [], sites)
    elif mode == "centralised":
        train = [case for data in clients for case in data.train]
        val = [case for data in clients for case in data.val]
        yield CohortTraining(Cohort(mode), [ClientData(mode, train, val)], sites)
    else:
        for site, data in zip(training, clients, strict=True):
            yield CohortTraining(Cohort(mode, site.name), [data], [site])


def _card(prepared: Prepared, cohort: Cohort, rounds: int) -> tuple[Path, AdapterCard]:
    """The folder of a cohort's adapter, and the adapter's card."""
    card = card_of(prepared.run, cohort.mode, rounds, prepared.config, prepared.assembled.origin)
    return prepared.folder.adapter(cohort), card


def _results(prepared: Prepared) -> Results:
    scores: dict[str, list[CaseScores]] = {}
    events = prepared.ledger.events()
    for event in events:
        if isinstance(event, CaseTested) and not event.elsewhere:
            scores.setdefault(event.cohort.mode, []).append(scores_of(event))
    parameters = sum(tensor.numel() for tensor in travelling_state(prepared.assembled.network).values())
    return Results(prepared.folder.path, scores, parameters, _traffic(prepared.config, events), tuple(events))


def _traffic(config: RunConfig, events: Sequence[Event]) -> Traffic | None:
    """Mean traffic per round and site, over everything that the federated cohort sent and received."""
    fits = sum(isinstance(event, Fitted) and event.cohort == TOGETHER for event in events)
    if not fits:
        return None
    up, down = bytes_sent(events, TOGETHER)
    return Traffic(up / fits, down / fits, full_packet_bytes(config))


def _clients(
    network: Sam, config: RunConfig, agreement: Agreement, data: Sequence[ClientData], folder: Path
) -> dict[str, Client]:
    """Site → client. All clients share the network."""
    keep = config.rounds.keep
    budgets = {part.site: Budget(folder / part.site / "privacy.jsonl") for part in data} if config.privacy else {}
    for budget in budgets.values():
        budget.create(begun=False)
    members = _members(config, agreement, [part.site for part in data], folder) if agreement.secure else {}
    return {
        part.site: Client(
            network,
            part,
            config,
            agreement,
            ClientState(folder / part.site, keep),
            budget=budgets.get(part.site),
            member=members.get(part.site),
        )
        for part in data
    }


def _members(config: RunConfig, agreement: Agreement, sites: Sequence[str], folder: Path) -> dict[str, "Member"]:
    """Site → its side of secure aggregation."""
    from flapsam.federation.secure_aggregation.identity import Identity
    from flapsam.federation.secure_aggregation.member import Member

    identities = {site: Identity.simulated(config.seed, site) for site in sites}
    keys = {site: identity.public for site, identity in identities.items()}
    weights = weights_of(config.rounds)
    return {
        site: Member(agreement.run, site, identity, keys, folder / site / "secure", weights=weights)
        for site, identity in identities.items()
    }


def _own_clients(
    config: RunConfig, agreement: Agreement, data: Sequence[ClientData], folder: Path, worker: int
) -> dict[str, Client]:
    """Site → client in a worker process, which has a network of its own, on the next GPU if there are several."""
    config = config.model_copy(update={"device": device_of_worker(config.device, worker)})
    return _clients(assembled_for(config).network, config, agreement, data, folder)


def _check_ranks(training: Sequence[Site], config: RunConfig) -> None:
    names = [site.name for site in training]
    unknown = [site for site in config.site_ranks if site not in names]
    if unknown:
        raise FlapsamError(f"site_ranks.{unknown[0]}: unknown site; choose from {', '.join(names)}")


def _check_cases(sites: Sequence[Site], training: Sequence[Site]) -> None:
    """Check that every site can train and that images and label maps match. Reads headers only, before long work begins."""
    if not training:
        raise FlapsamError("data.unseen: names every site, so none is left to train; remove one")
    for site in training:
        if not site.of("train"):
            raise FlapsamError(f"site {site.name}: it has no training case; add one, or leave the site out with data.sites")
    check_pairs(sites)
