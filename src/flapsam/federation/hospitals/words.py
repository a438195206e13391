"""What a run asks of a site, in plain words, for the people who decide whether the site takes part."""

from flapsam.federation.hospitals.site_config import SiteConfig
from flapsam.federation.preparation import has_own_adapters
from flapsam.run.config import RunConfig
from flapsam.sam import strategy


def in_words(config: RunConfig, site: SiteConfig) -> list[str]:
    """Describe a run to a site.

    Args:
        config: the run's configuration, completed with what is the site's own.
        site: the site's configuration.

    Returns:
        Sentences: what is trained, on what, for how long, and what leaves the site.
    """
    training, rounds = config.training, config.rounds
    if rounds.count == 0:
        figures = f"figures over {site.min_test_patients} or more test patients" if site.metrics else "no scores"
        return [
            f"Score finished adapters of {config.backbone.name} on this site's test cases. Nothing is trained.",
            f"Leaves this site: {figures}, and the numbers of cases and slices, rounded.",
        ]
    chosen = strategy(config.strategy)
    trained = ["low-rank adapters"] * chosen.lora + ["adapters between neighbouring slices"] * chosen.volume
    trained += [f"SAM's parameters {', '.join(chosen.trains)}"] * bool(chosen.trains)
    amount, unit = (rounds.steps, "step") if rounds.steps else (training.epochs, "epoch")
    length = f"{amount} {unit}" + "s" * (amount > 1)
    left = "the trained tensors" + " except this site's own" * bool(config.personal)
    if config.privacy:
        left += ", with noise"
    else:
        left += ", and the numbers of cases and slices, rounded"
    own: list[str] = []
    if site.metrics and not config.privacy:
        left += "; losses, validation Dice, steps and times"
        least = site.min_test_patients
        own.append(
            f"At the end, score the adapter on the test cases. Figures over {least} or more patients leave this site."
        )
    if config.secure:
        own.append(
            "Mask the trained tensors, so that the server learns only the sum with the other sites' (secure aggregation)."
        )
    if privacy := config.privacy:
        own.append(
            f"Add enough noise that the run reveals at most ε = {privacy.epsilon:g} about any patient of this site, with "
            f"δ = {privacy.delta:g} (differential privacy)."
        )
    if config.personal:
        own.append(f"Train the parameters {', '.join(config.personal)} for this site alone. They never leave this site.")
    if rounds.last_epochs:
        more = f"{rounds.last_epochs} more epoch" + "s" * (rounds.last_epochs > 1)
        without = ", without noise. The result never leaves this site" if config.privacy else ""
        own.append(f"At the end, train {more} for this site alone{without}.")
    if has_own_adapters(config):
        own.append("Then keep the model with the highest validation Dice for this site's own use.")
    return [
        f"Train {' and '.join(trained)} (strategy {config.strategy}) of {config.backbone.name}.",
        f"Learn to segment {', '.join(config.data.classes)} from this site's training cases.",
        f"Take part in up to {rounds.count} rounds of {length} each, with a learning rate of {training.learning_rate:g}.",
        *own,
        f"Leaves this site in each round: {left}. Codec: {config.compression.codec}, aggregator: {config.aggregator}.",
    ]
