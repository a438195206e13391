"""A site's side of a run between hospitals on any engine: it enforces the site's limits and reports failures as codes."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from flapsam.adapters.store import CARD, save_adapter
from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.base.version import __version__
from flapsam.federation.client import Client, ClientData, Disclosure
from flapsam.federation.hospitals.aggregates import aggregated, unchanged
from flapsam.federation.hospitals.bounds import cases_used, refusals, steps_of
from flapsam.federation.hospitals.evaluation import MOST_ADAPTERS
from flapsam.federation.hospitals.handshake import Presence, Proposal, SiteFailed, read_message, version_in
from flapsam.federation.hospitals.journal import Journal
from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.hospitals.split import fixed_split
from flapsam.federation.hospitals.words import in_words
from flapsam.federation.packets import PacketRefused, checksum
from flapsam.federation.preparation import (
    agree,
    assembled_for,
    card_of,
    check_pairs,
    has_own_adapters,
    prepare_site,
    resolve,
    with_modalities,
    with_windows,
)
from flapsam.federation.privacy.accounting import planned
from flapsam.federation.privacy.budget import Budget, BudgetError
from flapsam.federation.shares import rounded, training_size, weights_of
from flapsam.federation.state import ClientState
from flapsam.learning.metrics import CaseScores
from flapsam.learning.private import by_patient
from flapsam.learning.testing import tested_case
from flapsam.run.config import RANDOM, RunConfig
from flapsam.run.reading import validated
from flapsam.run.site_scores import SiteScores
from flapsam.sam import Sam, fuse, tensors_of
from flapsam.sam.checkpoints import find_checkpoint
from flapsam.sites import Case, hold_out_validation, label_map, read_site

if TYPE_CHECKING:
    from flapsam.federation.secure_aggregation.member import Member

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
        self.run = ""
        self.chosen_after = ""
        """SHA-256 of the packets after which this site chose its own adapter."""
        with failing_as("state"):
            self.journal = Journal(site.journal)

    def join(self, message: bytes) -> bytes:
        """Take part in a run.

        Args:
            message: the server's proposal message.

        Returns:
            The site's presence message.

        Raises:
            SiteFailed: the site does not take part.
        """
        # A run that cannot be joined must not leave the client of another one behind.
        self.__dict__.pop("client", None)
        version = version_in(message)
        if version != __version__:
            log.error("the server runs flapsam %s, this site runs %s", version, __version__)
            raise SiteFailed("version")
        with failing_as("configuration"):
            proposal = read_message(Proposal, message)
            config = self._own(proposal.config)
            self.run = proposal.run
            self.journal.write("asked", self.run, words=in_words(config, self.site))
            self._check_bounds(config)
        with failing_as("state"):
            self.budget = self._open_budget(config)
        with failing_as("backbone"):
            find_checkpoint(config.backbone)
        with failing_as("configuration"):
            config = resolve(config)
        with failing_as("data"):
            own = self.site.data
            drawn = read_site(config.data, own.split_seed, self.name, own.site)
            site = fixed_split(hold_out_validation(drawn, own.validation_fraction, own.split_seed), self.site.split)
            check_pairs([site])
            self.cases = site.of("test")
            # Validation cases count unless the data have a split of their own, as in a simulation.
            size = training_size(site.of("train") if drawn.of("val") else site.of("train", "val"), config)
            config = with_modalities(config, site.cases)
            # In a private run, a failure would tell the server which values the site's label maps contain.
            private = config.privacy is not None
            # An evaluation trains nothing, so nothing is prepared for it.
            used = replace(site, cases=()) if config.rounds.count == 0 else site
            data = prepare_site(used, config, self.site.state / "volumes", ignores_unknown=private)
            if config.rounds.count:
                self._check_cases(data, config)
        with failing_as("backbone"):
            assembled = assembled_for(config)
            self.network, self.origin = assembled.network, assembled.origin
        self.folder = self.site.run_folder(proposal.run)
        with failing_as("state"):
            self._check_same_run(proposal, config)
            self.config = self._with_windows(config, self.network)
            agreement = agree(proposal.run, self.config, self.network)
            state = ClientState(self.folder / "site", self.config.rounds.keep)
            self.client = Client(
                self.network,
                data,
                self.config,
                agreement,
                state,
                disclosure=Disclosure(
                    losses=self.site.metrics,
                    scores=self.site.metrics and len(data.val) >= self.site.min_validation_cases,
                    exact_counts=False,
                ),
                budget=self.budget,
                member=self._member(proposal, config),
                check=self._check_fit,
            )
            held = self.client.held
        log.info("taking part in run %s with %d training cases, from round %d", self.run, len(data.train), held + 1)
        told = self.config.privacy is None
        presence = Presence(
            contract=agreement.contract.hash,
            backbone=self.origin.checksum,
            modalities=self.config.samples.modalities,
            cases={split: rounded(len(site.of(split))) if told else 0 for split in ("train", "val", "test")},
            # A site with test cases alone takes part in evaluations.
            training_cases=max(rounded(size.cases), 1) if told else 1,
            training_slices=max(rounded(size.slices), 1) if told else 1,
            held=held,
        )
        answer = presence.model_dump_json().encode()
        self.journal.write("joined", self.run, left=json.loads(answer))
        return answer

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
            answer = self.client.fit(packets)
            # Without masks, which differ between attempts at a round.
            digest = hashlib.sha256(self.client.kept or answer).hexdigest()[:16]
            # An answer that is sent again counts once, and one that a crash has kept out of the journal counts, too.
            if (self.run, digest) not in self.journal.fits:
                self.journal.write("fit", self.run, round=self.client.held + 1, answer=digest, bytes=len(answer))
            return answer

    def agree(self, packets: Iterable[bytes]) -> bytes:
        """Run ``Client.agree``.

        Args:
            packets: the server's message alone.

        Returns:
            The site's message for the server.

        Raises:
            SiteFailed: the message was refused.
        """
        with failing_as("error"):
            try:
                return self.client.agree(packets)
            except PacketRefused as reason:
                log.error("refused the server's message: %s", reason)
                raise SiteFailed("secure") from reason

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
            scores = self._answered(self.client.validate(packets))
            card = card_of(self.client.agreement.run, "federated", self.client.held, self.config, self.origin)
            names = self.client.agreement.contract.shapes
            save_adapter(
                self.folder / "adapter", card, {**self.client.agreement.personal, **tensors_of(self.network, names)}
            )
            log.info("the adapter is in %s", self.folder / "adapter")
            return json.dumps(scores).encode()

    def own(self, packets: Iterable[bytes]) -> bytes:
        """Choose this site's own adapter and save it. The answer is empty: nothing about the choice leaves the site.

        Args:
            packets: the server's packets for this site, oldest first.

        Raises:
            SiteFailed: a packet was refused, or the choice failed.
        """
        with failing_as("error"):
            if not has_own_adapters(self.config):
                self._refuse([("configuration", "the server asks for an adapter of this site's own, but the run has none")])
            if self.config.privacy is None:
                self._keep_own(packets)
            # In a private run, the server must not learn whether this succeeds, or watch how long it takes again and again.
            elif not (self.folder / "adapter-personal" / CARD).exists():
                with suppress(SiteFailed), failing_as("error"):
                    self._keep_own(packets)
            return b""

    def test(self, packets: Iterable[bytes]) -> bytes:
        """Score the adapter on this site's test cases. Single scores stay in the run's folder in this site's state.

        Args:
            packets: the server's packets for this site, oldest first.

        Returns:
            Figures over the patients as JSON. Empty if the site tells none, as in a private run or with ``metrics: false``.

        Raises:
            SiteFailed: a packet was refused, the site has told its scores too often, or a case cannot be read.
        """
        with failing_as("error"):
            held = self.client.load(packets)
            if self.config.privacy is not None or not self.site.metrics:
                return b""
            run, tensors = self.run, checksum(tensors_of(self.network, self.client.agreement.contract.shapes))[:16]
            if (run, held, tensors) not in self.journal.tests:
                self._check_tests(held)
                told = self._tested(held, tensors)
                self.journal.write("tested", run, round=held, tensors=tensors, left=told and told.model_dump(mode="json"))
            left = self.journal.tests[run, held, tensors]
            return json.dumps(left).encode() if left else b""

    def _check_tests(self, held: int) -> None:
        """Check before a test that the site may tell its scores once more, for the result of a run or of an evaluation."""
        if held > max(self.config.rounds.count, MOST_ADAPTERS):
            self._refuse([("rounds", f"the server asks for test scores after round {held}, which the run does not have")])
        if len(self.journal.tests) >= self.site.max_tests:
            self._refuse([("rounds", f"max_tests is {self.site.max_tests}, and test scores have left as often")])
        if sum(known == self.run for known, *_ in self.journal.tests) >= MOST_ADAPTERS:
            self._refuse([("rounds", f"the server asks for test scores of more than {MOST_ADAPTERS} adapters in one run")])

    def _tested(self, held: int, tensors: str) -> SiteScores | None:
        """Score the test cases, keep the scores, and aggregate them. None if nothing may be told."""
        cases, least = self._test_cases(), self.site.min_test_patients
        if not cases:
            return None
        network = fuse(deepcopy(self.network))
        scores = []
        for case in cases:
            try:
                # A failure would tell the server what a label map contains.
                scores.append(tested_case(network, case, self.config, ignores_unknown=True).scores)
            except FlapsamError as error:
                log.error("no test scores leave: %s", error)
                return None
            log.info("tested case %d of %d", len(scores), len(cases))
        folder = self.folder / "tests"
        # Those of the first adapter, if the server has several tested.
        first = sorted(folder.glob("000001-*.json"))[:1] if self.config.rounds.count == 0 and held > 1 else []
        before = [CaseScores(**score) for path in first for score in json.loads(path.read_text())]
        write_text(folder / f"{held:06d}-{tensors}.json", json.dumps([asdict(score) for score in scores], indent=1))
        return aggregated(scores, least, self.config.evaluation, before)

    def _test_cases(self) -> list[Case]:
        """The cases to score: those that were scored before, and new ones once they are of enough patients.

        With other label values, too, two runs could show the score of a single patient.
        """
        path, least = self.site.tested, self.site.min_test_patients
        mapping = label_map(self.config.data, self.name)
        labels = json.dumps([mapping.classes, sorted(mapping.index_of.items()), sorted(mapping.annotated)])
        stored = json.loads(path.read_text()) if path.exists() else {"labels": labels, "cases": []}
        if stored["labels"] != labels:
            log.error("no test scores leave, because %s holds those of other label values", path)
            return []
        present = {
            (case.subject, case.name, hashlib.sha256(case.label.read_bytes()).hexdigest()): case for case in self.cases
        }
        chosen = unchanged([(case[0], case[1], case[2]) for case in stored["cases"]], present, least)
        if chosen is None:
            log.error("no test scores leave, because cases of fewer than %d patients in %s are gone or changed", least, path)
            return []
        if len({subject for subject, *_ in chosen}) < least:
            log.info("no test scores leave, because there are fewer than %d test patients", least)
            return []
        write_text(path, json.dumps({"labels": labels, "cases": sorted(chosen)}))
        return [present[case] for case in sorted(chosen)]

    def _keep_own(self, packets: Iterable[bytes]) -> None:
        """Choose and save the adapter, unless it was chosen after the same packets before."""
        packets, folder = list(packets), self.folder / "adapter-personal"
        after = hashlib.sha256(b"".join(packets)).hexdigest()
        if after == self.chosen_after:
            return
        own = self.client.own(packets)
        card = card_of(self.client.agreement.run, "personal", self.client.held, self.config, self.origin)
        save_adapter(folder, card, {**self.client.agreement.personal, **own.tensors})
        scores = ", ".join(f"{name} {value:.3f}" for name, value in own.dice.items() if value is not None)
        log.info("this site's own adapter is in %s: the %s one (validation Dice: %s)", folder, own.kept, scores or "none")
        self.chosen_after = after

    def _answered(self, scores: Mapping[str, Any]) -> Mapping[str, Any]:
        """Enter scores in the journal before they leave. The same tensors get the same answer, and no run gets many.

        A server that could have any number of tensors scored could search for those that reveal a case.
        """
        run, held = self.run, self.client.held
        tensors = checksum(tensors_of(self.network, self.client.agreement.contract.shapes))[:16]
        if (run, held, tensors) not in self.journal.scores:
            self._check_round(held)
            answers = sum(known == run for known, *_ in self.journal.scores)
            # A run that goes back to an earlier round asks again.
            most = 2 * self.config.rounds.count
            if answers >= most:
                self._refuse([("rounds", f"the server asks for scores for more than {most} times")])
            self.journal.write("validated", run, round=held, tensors=tensors, left=scores)
        return self.journal.scores[run, held, tensors]

    def _own(self, tree: Mapping[str, Any]) -> RunConfig:
        """Complete the proposed configuration with this site's data, weights and machine."""
        if not isinstance(tree.get("data"), dict) or not isinstance(tree.get("backbone"), dict):
            raise FlapsamError("the proposed run has no data or no backbone")
        site, data = self.site, dict(tree["data"])
        data |= {"path": site.data.path, "layout": site.data.layout, "table": site.data.table}
        # What decides which cases are used, and for what, is the site's own.
        data |= {name: getattr(site.data, name) for name in ("test_fraction", "validation_fraction")}
        data |= {"simulated_sites": None, "sites": None, "unseen": [], "training_cases": None}
        # The labels of other sites do not apply here.
        labels = data.get("site_labels")
        data["site_labels"] = {self.name: labels[self.name]} if isinstance(labels, dict) and self.name in labels else {}
        backbone = dict(tree["backbone"])
        if backbone.get("weights") != RANDOM:
            backbone["weights"] = site.weights
        own = {"device": site.device, "threads": site.threads, "output": site.state, "modes": ["federated"]}
        return validated({**tree, **own, "data": data, "backbone": backbone}, RunConfig, "the proposed run")

    def _check_bounds(self, config: RunConfig) -> None:
        """Check the run against the site's configuration, which no server can override."""
        refused = list(refusals(config, self.site))
        used = sum(run != self.run for run, _ in self.journal.fits)
        if self.site.max_rounds is not None and used + config.rounds.count > self.site.max_rounds:
            rest = f"max_rounds is {self.site.max_rounds}, of which other runs have used {used}"
            refused.append(("rounds", f"the run has {config.rounds.count} rounds, {rest}"))
        self._refuse(refused)

    def _open_budget(self, config: RunConfig) -> Budget | None:
        """Open the ledger of the privacy that was spent, and check that there is enough left for a private run."""
        if config.privacy is None:
            return None
        budget = Budget(self.site.privacy_spent, self.site.privacy)
        budget.create(begun=self.journal.private)
        self.journal.write("private", self.run, epsilon=config.privacy.epsilon, delta=config.privacy.delta)
        try:
            budget.check(self.run, planned(config))
        except BudgetError as reason:
            self._refuse([("privacy", str(reason))])
        return budget

    def _member(self, proposal: Proposal, config: RunConfig) -> "Member | None":
        """The site's side of secure aggregation; None for a run without it."""
        if not config.secure or self.site.secure is None:
            return None
        from flapsam.federation.secure_aggregation.identity import Identity
        from flapsam.federation.secure_aggregation.member import Member
        from flapsam.federation.secure_aggregation.messages import threshold

        secure = self.site.secure
        return Member(
            self.run,
            self.name,
            Identity(self.site.identity),
            secure.partners,
            self.folder / "site" / "secure",
            asked=digest_of(proposal),
            weights=weights_of(config.rounds),
            least=secure.min_sites or threshold(len(secure.partners) + 1),
        )

    def _check_same_run(self, proposal: Proposal, config: RunConfig) -> None:
        """Check that a run has the configuration with which this site joined it first.

        Otherwise, a server could make what a run has kept at this site, such as personal tensors, part of what is sent.
        """
        path = self.folder / "proposal.sha256"
        digest = digest_of(proposal)
        if not path.exists() and not (config.privacy and any((self.folder / "site").glob("*"))):
            write_text(path, digest)
        elif not path.exists() or path.read_text() != digest:
            self._refuse([("bounds", "the run's configuration is not the one with which this site joined the run")])

    def _check_cases(self, data: ClientData, config: RunConfig) -> None:
        """Check that a fit uses enough cases and takes enough steps, from its first round on."""
        site = self.site
        # A step of a private fit may draw any patient, with all of the patient's cases. So patients count here, not cases.
        # Not the patients of a step on average: with many values of privacy.sampling, a server could count them.
        used = len(by_patient(data.train)) if config.privacy else cases_used(data.train, config.training, config.rounds)
        if used < site.min_cases:
            unit = "patients" if config.privacy else "cases with a slice to train on"
            self._refuse([("cases", f"this site has {used} training {unit}, min_cases is {site.min_cases}")])
        self._check_steps(data, config, 0)

    def _check_steps(self, data: ClientData, config: RunConfig, done: int) -> None:
        steps = steps_of(data.train, config.training, done, config.rounds)
        if steps < self.site.bounds.min_steps:
            self._refuse(
                [("bounds", f"a fit has the effect of {steps:.1f} steps, this site requires {self.site.bounds.min_steps}")]
            )

    def _check_fit(self, number: int, steps: int) -> None:
        """Check before a fit that the site may answer another round, and that the fit has enough steps."""
        self._check_round(number)
        if self.site.max_rounds is not None and len(self.journal.fits) >= self.site.max_rounds:
            self._refuse([("rounds", f"max_rounds is {self.site.max_rounds}, and as many rounds have been answered")])
        self._check_steps(self.client.data, self.config, steps)

    def _check_round(self, number: int) -> None:
        count = self.config.rounds.count
        if number > count:
            self._refuse([("rounds", f"the server asks for round {number}, but the run has {count} rounds")])

    def _refuse(self, refused: Sequence[tuple[str, str]]) -> None:
        """Write all reasons into the log and the journal, and report the first one's code, if there is one."""
        for _, sentence in refused:
            log.error("%s", sentence)
        if refused:
            self.journal.write("refused", self.run, reasons=[sentence for _, sentence in refused])
            raise SiteFailed(refused[0][0])

    def _with_windows(self, config: RunConfig, network: Sam) -> RunConfig:
        """Resolve ``micro_batch: auto`` to a number, and keep it for the rest of the run."""
        path = self.folder / "micro_batch.json"
        known = json.loads(path.read_text()) if path.exists() else None
        result = with_windows(config, network, known)
        if result is not config and known is None:
            write_text(path, json.dumps(result.training.micro_batch))
        return result


def digest_of(proposal: Proposal) -> str:
    """SHA-256 of what a run asks of every site."""
    return hashlib.sha256(json.dumps(proposal.config, sort_keys=True).encode()).hexdigest()


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
    except BudgetError as error:
        log.error("%s", error)
        raise SiteFailed("privacy") from error
    except FlapsamError as error:
        log.error("%s", error)
        raise SiteFailed(code) from error
    except Exception as error:
        # Torch has no error of its own for memory that the system refuses.
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
            log.error("out of memory; raise memory_gib, or free memory")
            raise SiteFailed("memory") from error
        log.exception("unexpected error")
        raise SiteFailed("error") from error
