import pytest
import torch

from flapsam.learning import training
from flapsam.learning.features import can_be_kept
from flapsam.learning.training import Learner, fit
from flapsam.run.config import Backbone, Lora, Samples, Training
from flapsam.sam import STRATEGIES, Sam, assemble, travelling_state

PLAIN = Training(window=1, batch_size=6, warmup_steps=2, augment="none")


def network(strategy: str) -> Sam:
    backbone = Backbone(weights="random")
    return assemble(backbone, image_size=32, classes=2, strategy_name=strategy, lora=Lora(rank=2), seed=0).network


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_features_are_kept_only_for_a_frozen_encoder(strategy: str):
    net = network(strategy)
    assert can_be_kept(net, PLAIN, Samples()) == (strategy in ("decoder", "partial-decoder"))
    # Gradients reach no further back than the parameters that train.
    assert net.embed(torch.zeros(1, 3, 32, 32)).requires_grad != (strategy in ("decoder", "partial-decoder"))


@pytest.mark.parametrize(
    ("options", "samples", "expected"),
    [
        ({}, {}, True),
        ({"augment": "gentle"}, {}, False),
        ({"window": 3}, {}, False),
        ({"window": 3}, {"scaling": "volume"}, True),
    ],
)
def test_features_are_kept_only_for_unchanging_slices(options: dict, samples: dict, expected: bool):
    assert can_be_kept(network("decoder"), PLAIN.model_copy(update=options), Samples(**samples)) == expected


@pytest.mark.parametrize(("window", "scaling"), [(1, "window"), (3, "volume")])
def test_training_on_kept_features_has_the_same_result(cases, window: int, scaling: str, monkeypatch: pytest.MonkeyPatch):
    options, samples = PLAIN.model_copy(update={"window": window}), Samples(scaling=scaling)  # type: ignore[arg-type]

    def trained() -> tuple[float, dict[str, torch.Tensor]]:
        net = network("decoder")
        report = fit(net, Learner(net, options), cases, samples, seed=0)
        return report.loss, travelling_state(net)

    loss, tensors = trained()
    with monkeypatch.context() as patch:
        patch.setattr(Sam, "embed", None)  # The encoder must not run again.
        kept_loss, kept = trained()
    assert kept_loss == loss
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    monkeypatch.setattr(training, "can_be_kept", lambda *_: False)
    direct_loss, direct = trained()
    assert direct_loss == pytest.approx(loss, rel=1e-4)
    for name, tensor in tensors.items():
        torch.testing.assert_close(direct[name], tensor, atol=2e-3, rtol=0)


def test_features_of_another_encoder_are_not_reused(cases):
    first, second = network("decoder"), network("decoder")
    with torch.no_grad():
        next(second.vision_encoder.parameters()).add_(1.0)
    losses = [fit(net, Learner(net, PLAIN), cases, Samples(), seed=0).loss for net in (first, second)]
    assert losses[0] != losses[1]
    assert len(list(cases[0].folder.glob(f"{cases[0].name}.*.npy"))) == 4  # image, labels and two files of features
