"""Adapters in which slices meet, on every family of backbones."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flapsam.base.errors import FlapsamError
from flapsam.federation.preparation import resolve
from flapsam.learning.inference import class_probabilities
from flapsam.learning.slices import SliceStack, stack_of, to_square
from flapsam.run.config import Backbone, Data, Lora, RunConfig, Samples
from flapsam.sam import Sam, assemble, checkpoint_layers, fuse
from flapsam.sam.slice_adapters import SliceAdapter, Stack
from flapsam.volumes import Volume
from tests.helpers.adapters import trained
from tests.helpers.families import SMALL

pytestmark = pytest.mark.usefixtures("small_families")

SLICES = 23
IMAGES = torch.rand(SLICES, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def network(backbone: str, name: str = "flap-volume") -> Sam:
    return trained(name, backbone=backbone, lora=Lora(rank=4))[0].network.eval()


def stack() -> SliceStack:
    """A volume of random slices, the first four of them blank."""
    array = np.random.default_rng(0).normal(size=(20, 18, SLICES)).astype(np.float32)
    array[:, :, :4] = array.min()
    return stack_of(Volume(array, np.diag([1.0, 1, 3, 1])), Samples(size=64, axis="axial", scaling="volume"))


@pytest.mark.parametrize("backbone", SMALL)
def test_before_training_slices_are_those_of_flap_to_the_bit(backbone: str):
    options = {"image_size": 64, "classes": 2, "lora": Lora(rank=4), "seed": 0}
    plain, volume = (
        assemble(Backbone(name=backbone, weights="random"), strategy_name=name, **options).network.eval()
        for name in ("flap", "flap-volume")
    )
    assert volume.reach == plain.sizes.depth and plain.reach == 0
    with torch.inference_mode():
        assert torch.equal(volume(IMAGES[:6], depth=3), plain(IMAGES[:6]))
        assert torch.equal(fuse(volume)(IMAGES[:6]), fuse(plain)(IMAGES[:6]))


def test_an_adapter_is_a_depthwise_convolution_over_slices_between_two_linear_layers():
    """Compared with PyTorch's own convolution, for two runs of five slices in four windows each."""
    adapter = SliceAdapter(6, 3, Stack(slices=10, depth=5))
    nn.init.normal_(adapter.mix)
    nn.init.normal_(adapter.up.weight)
    rows = torch.randn(10 * 4, 7, 6)
    hidden = F.linear(rows, adapter.down.weight, adapter.down.bias).view(2, 5, 28, 3)
    channels = hidden.permute(0, 2, 3, 1).reshape(2 * 28, 3, 5)
    kernel = adapter.mix.T[:, None]
    mixed = F.conv1d(F.pad(channels, (1, 1), mode="replicate"), kernel, groups=3)
    back = F.gelu(mixed).view(2, 28, 3, 5).permute(0, 3, 1, 2).reshape(40, 7, 3)
    expected = rows + F.linear(back, adapter.up.weight, adapter.up.bias)
    torch.testing.assert_close(adapter(rows), expected)


@pytest.mark.parametrize("backbone", SMALL)
def test_only_slices_of_the_same_window_meet(backbone: str):
    net = network(backbone)
    with torch.inference_mode():
        both = net(IMAGES[:6], depth=3)
        for window in (slice(0, 3), slice(3, 6)):
            torch.testing.assert_close(both[window], net(IMAGES[window], depth=3), atol=1e-5, rtol=1e-4)
        changed = IMAGES[:3].clone()
        changed[2] = 0
        assert not torch.allclose(net(changed, depth=3)[1], both[1], atol=1e-4)


@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("batch", [1, SLICES])
def test_a_streamed_volume_has_the_logits_of_one_training_window(backbone: str, batch: int):
    """The volume is one window of 23 slices. Streamed, it is cut into runs with a halo, and the network is fused."""
    net, slices = network(backbone), stack()
    images = torch.cat([to_square(slices.window(index), 64, "stretch") for index in range(SLICES)])
    with torch.inference_mode():
        expected = net(images, depth=SLICES).softmax(1)
    fused = fuse(deepcopy(net))
    parts: dict[int, Tensor] = {}
    for indices, probabilities in class_probabilities(fused, slices, batch=batch):
        parts |= dict(zip(indices, probabilities, strict=True))
    assert list(parts) == list(range(SLICES))
    if batch == 1:
        assert 4 * fused.reach < SLICES  # so there are several runs
    shown = torch.stack(list(parts.values()))
    grid = F.interpolate(expected, shown.shape[2:], mode="bilinear", antialias=True)
    torch.testing.assert_close(shown, grid, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", SMALL)
def test_checkpointing_and_a_copy_change_nothing(backbone: str):
    gradients = []
    for prepared in (lambda net: net, lambda net: checkpoint_layers(net) or net, deepcopy):
        net = prepared(network(backbone)).train()
        net(IMAGES[:6], depth=3).square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert any(".slices." in name for name in gradients[0])
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient)


def test_a_strategy_whose_slices_meet_needs_windows(tmp_path):
    data = Data(path=tmp_path, labels={"kidney": 1})
    with pytest.raises(FlapsamError, match=r"training\.window: flap-volume needs neighbouring slices"):
        resolve(RunConfig(data=data, strategy="flap-volume"))
