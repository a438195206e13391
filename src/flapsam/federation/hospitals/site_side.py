"""A hospital's side of a run, whatever the engine: its own file is asked first, and what goes wrong leaves as a code."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from flapsam.adapters.store import save_adapter
from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.base.version import __version__
from flapsam.federation.client import Client
from flapsam.federation.hospitals.handshake import Presence, Proposal, SiteFailed, read_message, version_in
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.packets import PacketRefused
from flapsam.federation.preparation import (
    agree,
    assembled_for,
    card_of,
    check_pairs,
    prepare_site,
    resolve,
    with_modalities,
    with_windows,
)
from flapsam.federation.shares import training_size
from flapsam.federation.state import ClientState
from flapsam.run.config import RANDOM, RunConfig
from flapsam.run.reading import validated
from flapsam.sam import Sam, tensors_of
from flapsam.sam.checkpoints import find_checkpoint
from flapsam.sites import hold_out_validation, read_site

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class SiteSide:
    """A site in the runs of a federation, one at a time."""

    def __init__(self, name: str, site: SiteConfig) -> None:
        """Know the site.

        Args:
            name: in the federation.
            site: its configuration.
        """
        self.name = name
        self.site = site

    def join(self, message: bytes) -> bytes:
        """Take part in a run.

        Args:
            message: the server's proposal.

        Returns:
            The presence.

        Raises:
            SiteFailed: it does not.
        """
        version = version_in(message)
        if version != __version__:
            log.error("the server runs flapsam %s, this site %s", version, __version__)
            raise SiteFailed("version")
        with failing_as("configuration"):
            proposal = read_message(Proposal, message)
            config = self._own(proposal.config)
        self._ask_own_file(config)
        with failing_as("backbone"):
            find_checkpoint(config.backbone)
        with failing_as("configuration"):
            config = resolve(config)
        with failing_as("data"):
            own = self.site.data
            site = read_site(config.data, config.seed, self.name, own.site)
            check_pairs([site])
            size = training_size(site, config)
            if size.cases < self.site.min_cases:
                log.error("%d training cases, min_cases is %d", size.cases, self.site.min_cases)
                raise SiteFailed("cases")
            config = with_modalities(config, site.cases)
            site = hold_out_validation(site, config.data.validation_fraction, config.seed)
            data = prepare_site(site, config, self.site.state / "volumes")
        with failing_as("backbone"):
            assembled = assembled_for(config)
            self.network, self.origin = assembled.network, assembled.origin
        self.folder = self.site.run_folder(proposal.run)
        with failing_as("state"):
            self.config = self._with_windows(config, self.network)
            agreement = agree(proposal.run, self.config, self.network)
            state = ClientState(self.folder / "site")
            self.client = Client(self.network, data, self.config, agreement, state, tells_metrics=self.site.metrics)
            held = self.client.held
        log.info("takes part in run %s with %d training cases, from round %d", proposal.run, size.cases, held + 1)
        presence = Presence(
            contract=agreement.contract.hash,
            backbone=self.origin.checksum,
            modalities=self.config.samples.modalities,
            cases={split: len(site.of(split)) for split in ("train", "val", "test")},
            training_cases=size.cases,
            training_slices=size.slices,
            held=held,
        )
        return presence.model_dump_json().encode()

    def fit(self, packets: Iterable[bytes]) -> bytes:
        """As ``Client.fit``.

        Raises:
            SiteFailed: it cannot.
        """
        with failing_as("error"):
            return self.client.fit(packets)

    def validate(self, packets: Iterable[bytes]) -> bytes:
        """As ``Client.validate``, the scores as JSON; the adapter is kept for the site's own use."""
        with failing_as("error"):
            scores = self.client.validate(packets)
            card = card_of(self.client.agreement.run, "federated", self.client.held, self.config, self.origin)
            names = self.client.agreement.contract.shapes
            save_adapter(self.folder / "adapter", card, tensors_of(self.network, names))
            log.info("the adapter is in %s", self.folder / "adapter")
            return json.dumps(scores).encode()

    def _own(self, tree: Mapping[str, Any]) -> RunConfig:
        """The run with this site's data, weights and machine in it."""
        if not isinstance(tree.get("data"), dict) or not isinstance(tree.get("backbone"), dict):
            raise FlapsamError("the proposed run has no data or no backbone")
        site, data = self.site, dict(tree["data"])
        data |= {"path": site.data.path, "layout": site.data.layout, "table": site.data.table}
        # Other sites' are not here.
        labels = data.get("site_labels")
        data["site_labels"] = {self.name: labels[self.name]} if isinstance(labels, dict) and self.name in labels else {}
        backbone = dict(tree["backbone"])
        if backbone.get("weights") != RANDOM:
            backbone["weights"] = site.weights
        own = {"device": site.device, "threads": site.threads, "output": site.state, "modes": ["federated"]}
        return validated({**tree, **own, "data": data, "backbone": backbone}, RunConfig, "the proposed run")

    def _ask_own_file(self, config: RunConfig) -> None:
        site = self.site
        if site.strategies is not None and config.strategy not in site.strategies:
            log.error("the run's strategy is %s, strategies has %s", config.strategy, ", ".join(site.strategies))
            raise SiteFailed("strategy")
        if site.aggregators is not None and config.aggregator not in site.aggregators:
            log.error("the run's aggregator is %s, aggregators has %s", config.aggregator, ", ".join(site.aggregators))
            raise SiteFailed("aggregator")
        if site.max_rounds is not None and config.rounds.count > site.max_rounds:
            log.error("the run has %d rounds, max_rounds is %d", config.rounds.count, site.max_rounds)
            raise SiteFailed("rounds")

    def _with_windows(self, config: RunConfig, network: Sam) -> RunConfig:
        """``micro_batch: auto`` as a number, the same in all of a run."""
        kept = self.folder / "micro_batch.json"
        known = json.loads(kept.read_text()) if kept.exists() else None
        result = with_windows(config, network, known)
        if result is not config and known is None:
            write_text(kept, json.dumps(result.training.micro_batch))
        return result


@contextmanager
def failing_as(code: str) -> Iterator[None]:
    """Whatever goes wrong within is told as this code; all of it stands in the site's own log."""
    try:
        yield
    except SiteFailed:
        raise
    except PacketRefused as reason:
        log.error("the server's packet is refused: %s", reason)
        raise SiteFailed("packet") from reason
    except FlapsamError as error:
        log.error("%s", error)
        raise SiteFailed(code) from error
    except Exception as error:
        log.exception("unexpected")
        raise SiteFailed("error") from error
