"""A site's side of a run between hospitals on any engine: it enforces the site's limits and reports failures as codes."""

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
    """A site's side of the runs of a federation, one run at a time."""

    def __init__(self, name: str, site: SiteConfig) -> None:
        """Prepare to take part in runs.

        Args:
            name: the site's name in the federation.
            site: the site's configuration.
        """
        self.name = name
        self.site = site

    def join(self, message: bytes) -> bytes:
        """Take part in a run.

        Args:
            message: the server's proposal message.

        Returns:
            The site's presence message.

        Raises:
            SiteFailed: the site does not take part.
        """
        version = version_in(message)
        if version != __version__:
            log.error("the server runs flapsam %s, this site runs %s", version, __version__)
            raise SiteFailed("version")
        with failing_as("configuration"):
            proposal = read_message(Proposal, message)
            config = self._own(proposal.config)
        self._check_limits(config)
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
                log.error("this site has %d training cases, min_cases is %d", size.cases, self.site.min_cases)
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
            state = ClientState(self.folder / "site", self.config.rounds.keep)
            self.client = Client(self.network, data, self.config, agreement, state, reports_metrics=self.site.metrics)
            held = self.client.held
        log.info("taking part in run %s with %d training cases, from round %d", proposal.run, size.cases, held + 1)
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
        """Run ``Client.fit``.

        Args:
            packets: the server's packets for this site, oldest first.

        Returns:
            The site's packet for the server.

        Raises:
            SiteFailed: a packet was refused, or the fit failed.
        """
        with failing_as("error"):
            return self.client.fit(packets)

    def validate(self, packets: Iterable[bytes]) -> bytes:
        """Run ``Client.validate`` and save the adapter for the site's own use.

        Args:
            packets: the server's packets for this site, oldest first.

        Returns:
            The validation scores as JSON.

        Raises:
            SiteFailed: a packet was refused, or validation failed.
        """
        with failing_as("error"):
            scores = self.client.validate(packets)
            card = card_of(self.client.agreement.run, "federated", self.client.held, self.config, self.origin)
            names = self.client.agreement.contract.shapes
            save_adapter(self.folder / "adapter", card, tensors_of(self.network, names))
            log.info("the adapter is in %s", self.folder / "adapter")
            return json.dumps(scores).encode()

    def _own(self, tree: Mapping[str, Any]) -> RunConfig:
        """Complete the proposed configuration with this site's data, weights and machine."""
        if not isinstance(tree.get("data"), dict) or not isinstance(tree.get("backbone"), dict):
            raise FlapsamError("the proposed run has no data or no backbone")
        site, data = self.site, dict(tree["data"])
        data |= {"path": site.data.path, "layout": site.data.layout, "table": site.data.table}
        # The labels of other sites do not apply here.
        labels = data.get("site_labels")
        data["site_labels"] = {self.name: labels[self.name]} if isinstance(labels, dict) and self.name in labels else {}
        backbone = dict(tree["backbone"])
        if backbone.get("weights") != RANDOM:
            backbone["weights"] = site.weights
        own = {"device": site.device, "threads": site.threads, "output": site.state, "modes": ["federated"]}
        return validated({**tree, **own, "data": data, "backbone": backbone}, RunConfig, "the proposed run")

    def _check_limits(self, config: RunConfig) -> None:
        """Check the run against the site's configuration, which no server can override."""
        site = self.site
        if site.strategies is not None and config.strategy not in site.strategies:
            log.error("the run's strategy is %s, this site's strategies are %s", config.strategy, ", ".join(site.strategies))
            raise SiteFailed("strategy")
        if site.aggregators is not None and config.aggregator not in site.aggregators:
            log.error(
                "the run's aggregator is %s, this site's aggregators are %s", config.aggregator, ", ".join(site.aggregators)
            )
            raise SiteFailed("aggregator")
        if site.max_rounds is not None and config.rounds.count > site.max_rounds:
            log.error("the run has %d rounds, max_rounds is %d", config.rounds.count, site.max_rounds)
            raise SiteFailed("rounds")

    def _with_windows(self, config: RunConfig, network: Sam) -> RunConfig:
        """Resolve ``micro_batch: auto`` to a number, and keep it for the rest of the run."""
        path = self.folder / "micro_batch.json"
        known = json.loads(path.read_text()) if path.exists() else None
        result = with_windows(config, network, known)
        if result is not config and known is None:
            write_text(path, json.dumps(result.training.micro_batch))
        return result


@contextmanager
def failing_as(code: str) -> Iterator[None]:
    """Report any error within as this code, and write the details to the site's own log only."""
    try:
        yield
    except SiteFailed:
        raise
    except PacketRefused as reason:
        log.error("refused the server's packet: %s", reason)
        raise SiteFailed("packet") from reason
    except FlapsamError as error:
        log.error("%s", error)
        raise SiteFailed(code) from error
    except Exception as error:
        log.exception("unexpected error")
        raise SiteFailed("error") from error
