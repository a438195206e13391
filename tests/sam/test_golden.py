"""The network, the loss, the schedule and the samples match tensors of the reference implementation."""

import math
import re

import numpy as np
import pytest
import torch

from flapsam.learning.slices import SliceStack, ranges_of
from flapsam.learning.training import learning_rate, segmentation_loss
from flapsam.run.config import Samples, Training
from flapsam.sam import Sam, build, load_checkpoint, named_parameters
from flapsam.sam.families import to_own_names
from flapsam.sam.vit import Vit
from tests.helpers.golden import (
    golden,
    golden_json,
    golden_network,
    golden_network_with_lora,
    golden_sizes,
    reference_to_public,
)


def test_logits_without_lora_match_the_reference():
    with torch.no_grad():
        logits = golden_network()(golden("forward")["image"])
    torch.testing.assert_close(logits, golden("forward")["logits_without_lora"], atol=2e-4, rtol=0)


def test_embedding_logits_and_iou_with_lora_match_the_reference():
    network, expected = golden_network_with_lora(), golden("forward")
    with torch.no_grad():
        embedding = network.embed(expected["image"])
        logits, iou = network.decode(embedding)
    torch.testing.assert_close(embedding, expected["image_embedding"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected["logits"], atol=2e-4, rtol=0)
    torch.testing.assert_close(iou, expected["iou"], atol=2e-4, rtol=0)


def test_the_embedding_with_merged_lora_matches_the_reference():
    """The reference has no embedding without LoRA, so LoRA is merged here into the weights of the network without it."""
    network, merged, expected = golden_network_with_lora(), golden_network(), golden("forward")
    factors = dict(named_parameters(network))
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            if name.endswith(("q_proj.weight", "v_proj.weight")):
                layer = name.removesuffix(".weight")
                weight += factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        embedding = merged.embed(expected["image"])
    torch.testing.assert_close(embedding, expected["image_embedding"], atol=1e-5, rtol=0)


def test_loss_and_gradients_match_the_reference():
    network, expected, numbers = golden_network_with_lora(), golden("forward"), golden_json("forward")
    loss = segmentation_loss(network(expected["image"]), expected["label"], Training())
    assert loss.total.item() == pytest.approx(numbers["loss"], abs=1e-5)
    assert loss.cross_entropy.item() == pytest.approx(numbers["cross_entropy"], abs=1e-5)
    assert loss.dice.item() == pytest.approx(numbers["dice_loss"], abs=1e-5)
    loss.total.backward()
    parameters = dict(named_parameters(network))
    compared = 0
    for name, norm in numbers["gradient_norms"].items():
        if norm <= 1e-4:
            continue
        public = reference_to_public(name)
        # The gradient of the fused qkv is the stack of the gradients of its three parts.
        parts = [public.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")] if ".qkv." in name else [public]
        gradients = [parameters[part].grad for part in parts]
        measured = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients if g is not None))
        assert measured == pytest.approx(norm, rel=0.01), name
        compared += 1
    assert compared == 209


def test_parameters_without_gradient_are_the_iou_head_and_unused_prompts():
    network, expected = golden_network_with_lora(), golden("forward")
    segmentation_loss(network(expected["image"]), expected["label"], Training()).total.backward()
    without = {re.sub(r"\.\d.*|\.weight|\.bias", "", name) for name, p in named_parameters(network) if p.grad is None}
    assert without == {
        "mask_decoder.iou_prediction_head.layers",
        "prompt_encoder.mask_embed.conv1",
        "prompt_encoder.mask_embed.conv2",
        "prompt_encoder.mask_embed.conv3",
        "prompt_encoder.mask_embed.layer_norm1",
        "prompt_encoder.mask_embed.layer_norm2",
        "prompt_encoder.not_a_point_embed",
        "prompt_encoder.point_embed",
    }


def test_resized_positions_match_the_reference():
    tensors = golden("resize")
    stored = to_own_names({n.removeprefix("stored."): t for n, t in tensors.items() if n.startswith("stored.")})
    expected = to_own_names({n.removeprefix("loaded."): t for n, t in tensors.items() if n.startswith("loaded.")})
    resized = golden_sizes().fitted(stored, 96)
    assert resized.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(resized[name], tensor, atol=1e-5, rtol=0)


def test_the_learning_rate_matches_the_reference():
    schedule = golden_json("learning_rate")
    # 200 epochs of 20 batches are the 4000 iterations of the reference.
    options = Training(learning_rate=schedule["base_lr"], warmup_steps=schedule["warmup"], schedule_power=schedule["power"])
    batches = schedule["max_iterations"] // options.schedule_epochs
    for step, rate in schedule["at"].items():
        assert learning_rate(int(step), batches, options) == pytest.approx(rate, abs=1e-12)


def test_the_learning_rate_stays_zero_after_the_schedule():
    assert learning_rate(10**6, 1, Training()) == 0


def test_windows_match_the_reference():
    tensors = golden("windows")
    volume = tensors["volume"].numpy()  # height, width, slices
    stack = SliceStack(np.moveaxis(volume, 2, 0), Samples(), ranges_of(np.moveaxis(volume, 2, 0)))
    for centre, expected in enumerate(tensors["windows"]):
        window = stack.window(centre, depth=5)[:, 0].permute(1, 2, 0)
        torch.testing.assert_close(window, expected, atol=1e-6, rtol=0)


def sam_checkpoint(network: Sam) -> dict[str, torch.Tensor]:
    """The golden weights under Meta's names, with SAM's upscaling, which doubles the resolution twice."""
    state = {name: tensor for name, tensor in golden("sam").items() if ".output_upscaling" not in name}
    state["mask_decoder.output_upscaling.0.weight"] = torch.ones(32, 8, 2, 2)
    state["mask_decoder.output_upscaling.0.bias"] = torch.ones(8)
    state["mask_decoder.output_upscaling.1.weight"] = torch.full((8,), 2.0)
    state["mask_decoder.output_upscaling.1.bias"] = torch.full((8,), 3.0)
    state["mask_decoder.output_upscaling.3.weight"] = torch.full((8, 4, 2, 2), 4.0)
    state["mask_decoder.output_upscaling.3.bias"] = torch.full((4,), 5.0)
    return state


def test_all_but_the_new_parts_are_loaded_from_a_sam_checkpoint():
    network = build(golden_sizes(), image_size=96, classes=2, seed=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = load_checkpoint(network, sam_checkpoint(network), "sam")
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert set(report.new) == {
        name
        for name in before
        if name.startswith(("mask_decoder.output.mask_tokens", "mask_decoder.output.hyper", "mask_decoder.iou_prediction"))
        or (name.startswith("mask_decoder.output.upscaling") and name.split(".")[3] not in "013")
    }
    assert not changed & set(report.new)
    assert changed <= set(report.loaded)
    assert network.state_dict()["mask_decoder.output.upscaling.3.weight"].unique().tolist() == [4]


def test_the_image_size_must_be_a_multiple_of_the_patch_size():
    from flapsam.base.errors import FlapsamError

    with pytest.raises(FlapsamError, match=r"samples\.size 100 is not a multiple of 16"):
        Vit(width=8, depth=1, heads=1, global_blocks=(0,)).tokens(100)
