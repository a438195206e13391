"""What a run may ask of a site: the run's configuration is compared with the bounds of the site's own."""

import math
from collections.abc import Iterator, Sequence

from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.learning.prepared import PreparedCase
from flapsam.learning.training import batches_per_epoch, learning_rate, steps_a_round
from flapsam.run.config import Rounds, RunConfig, Training


def refusals(config: RunConfig, site: SiteConfig) -> Iterator[tuple[str, str]]:
    """Compare a run with a site's bounds.

    Args:
        config: the run's configuration.
        site: the site's configuration.

    Yields:
        For each bound that the run exceeds, a code of ``REASONS`` and a sentence for the site's own log.
    """
    # An evaluation trains nothing, and nothing leaves but figures over patients.
    trains = config.rounds.count > 0
    if config.strategy not in site.strategies:
        yield "strategy", f"the run's strategy is {config.strategy}, this site's strategies are {', '.join(site.strategies)}"
    if trains and site.aggregators is not None and config.aggregator not in site.aggregators:
        allowed = ", ".join(site.aggregators)
        yield "aggregator", f"the run's aggregator is {config.aggregator}, this site's aggregators are {allowed}"
    if site.privacy is not None and config.privacy is None:
        yield "privacy", "the run has no differential privacy, but this site requires it (privacy)"
    if trains and site.secure is not None and site.secure.required and not config.secure:
        yield "secure", "the run has no secure aggregation, but this site requires it (secure.required)"
    if config.secure and site.secure is None:
        yield "secure", "the run has secure aggregation, but site.yaml does not name this site's partners (secure.partners)"
    structures = len(config.evaluation.regions) + len(config.evaluation.means)
    if structures > site.bounds.max_classes:
        yield "bounds", f"the run has {structures} regions and means, this site allows {site.bounds.max_classes}"
    for name, value, low, high in _ranges(config, site):
        if not low <= value <= high:
            yield "bounds", f"the run's {name} is {value:g}, this site allows {low:g} to {high:g}"


def _ranges(config: RunConfig, site: SiteConfig) -> Iterator[tuple[str, float, float, float]]:
    """Name, value and range of everything that has bounds."""
    training, bounds = config.training, site.bounds
    yield "lora.rank", config.lora.rank, 1, bounds.max_rank
    yield "samples.size", config.samples.size or 1, 1, bounds.max_size
    yield "number of classes", len(config.data.classes), 1, bounds.max_classes
    if config.rounds.count == 0:
        return
    below_one = 1 - 1e-6
    yield "training.epochs", training.epochs, 1, bounds.max_epochs
    yield "rounds.last_epochs", config.rounds.last_epochs, 0, bounds.max_epochs
    yield "rounds.steps", config.rounds.steps or 1, 1, bounds.max_steps
    yield "training.batch_size", training.batch_size, 1, bounds.max_batch_size
    yield "training.learning_rate", training.learning_rate, 0, bounds.max_learning_rate
    yield "training.weight_decay", training.weight_decay, 0, bounds.max_weight_decay
    yield "training.betas[0]", training.betas[0], bounds.min_betas[0], below_one
    yield "training.betas[1]", training.betas[1], bounds.min_betas[1], below_one
    yield "sum of training.cross_entropy and training.dice", training.cross_entropy + training.dice, *bounds.loss_weights
    yield "training.foreground_weight", training.foreground_weight, *bounds.loss_weights
    yield "training.proximal", training.proximal, 0, bounds.max_proximal
    if config.privacy:
        yield "privacy.windows", config.privacy.windows, 1, bounds.max_batch_size
        yield "privacy.sampling", config.privacy.sampling, bounds.min_sampling, 1


def cases_used(cases: Sequence[PreparedCase], options: Training, rounds: Rounds) -> int:
    """Number of cases of which a fit is certain to use a slice.

    Args:
        cases: the training cases.
        options: the run's training options. With ``empty_slices`` below 1, slices without any class may not be used.
        rounds: the run's rounds. If they count in steps, a fit may be shorter than an epoch.
    """
    whole = sum(case.slices > 0 and (options.empty_slices == 1 or len(case.occupied) > 0) for case in cases)
    if rounds.steps is None or rounds.steps > 2 * (batches_per_epoch(cases, options) - 1):
        return whole
    # The longer of the two epochs that a fit may belong to gives it at least half of its batches, the last of them perhaps
    # with one window alone. In the worst case, these windows are of the cases with the most slices.
    left, fewest = (math.ceil(rounds.steps / 2) - 1) * options.batch_size + 1, 0
    for slices in sorted((case.slices for case in cases), reverse=True):
        if left <= 0:
            break
        left, fewest = left - slices, fewest + 1
    return min(whole, fewest)


def steps_of(cases: Sequence[PreparedCase], options: Training, done: int, rounds: Rounds) -> float:
    """Number of steps of a fit, each counted by its learning rate as a share of the highest one.

    A schedule that falls to 0 at once would otherwise make one step out of many. A fit whose learning rate is 0 throughout
    reveals nothing and counts in full.

    Args:
        cases: the training cases.
        options: the run's training options.
        done: number of steps that the client has done in earlier rounds.
        rounds: the rounds of the run.
    """
    batches = batches_per_epoch(cases, options)
    rates = [learning_rate(done + step, batches, options, rounds) for step in range(steps_a_round(cases, options, rounds))]
    highest = max(rates, default=0)
    return sum(rates) / highest if highest > 0 else float(len(rates))
