import pytest

from flapsam.learning.memory import SHARE, memory_table, step_bytes, windows_that_fit
from flapsam.run.config import Backbone, Lora, Training
from flapsam.sam import assemble
from flapsam.sam.checkpointing import checkpoint_layers


def network():
    return assemble(
        Backbone(weights="random"), image_size=64, classes=2, strategy_name="flap", lora=Lora(rank=2), seed=0
    ).network


def test_memory_grows_linearly_with_the_slices():
    net = network()
    one, two, four = (step_bytes(net, slices, Training()) for slices in (1, 2, 4))
    assert 0 < one < two < four
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_checkpointing_saves_memory():
    net = network()
    straight = step_bytes(net, 2, Training())
    checkpoint_layers(net)
    assert step_bytes(net, 2, Training()) < 0.8 * straight


def test_the_number_of_windows_fits_the_free_memory():
    net, options = network(), Training(window=5, batch_size=4)
    one, two = (step_bytes(net, slices, options) for slices in (1, 2))
    training_state = 12 * sum(p.numel() for p in net.parameters() if p.requires_grad)

    def enough_for(slices: float) -> int:
        return int((one + (slices - 1) * (two - one) + training_state) / SHARE)

    assert windows_that_fit(net, options, free=enough_for(10.5)) == 2
    assert windows_that_fit(net, options, free=enough_for(14.5)) == 2
    assert windows_that_fit(net, options, free=enough_for(15.5)) == 3
    assert windows_that_fit(net, options, free=enough_for(1000)) == 4
    assert windows_that_fit(net, options, free=0) == 1


def test_the_memory_table_includes_the_parameters():
    rows = memory_table("sam-tiny", image_size=64, strategy="full", rank=2, device="cpu", precision="fp32")
    assert [row.slices for row in rows] == [1, 2, 4, 8, 16]
    fixed = 4 * 4 * sum(p.numel() for p in network().parameters())  # parameters, gradients and two moments
    growth = rows[1].straight - rows[0].straight
    assert rows[0].straight - growth == pytest.approx(fixed, rel=0.1)
    assert rows[4].straight - rows[3].straight == 8 * growth
    assert all(row.checkpointing < row.straight for row in rows)
