"""Every strategy: its parameter count in the paper, and saving and loading."""

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from flapsam.adapters.store import CARD_FORMAT, load_adapter, read_tensors, save_adapter
from flapsam.base.errors import FlapsamError
from flapsam.federation.traffic import strategy_table
from flapsam.learning.inference import predict_volume
from flapsam.run.config import Backbone, Lora
from flapsam.sam import (
    STRATEGIES,
    apply_strategy,
    architecture,
    assemble,
    build,
    load_trained,
    strategy,
    travelling,
    travelling_state,
)
from flapsam.volumes import Volume
from tests.helpers.adapters import saved, trained
from tests.helpers.places import WRITTEN

EXPECTED = {
    "full": (90_532_927, 67.452, 1.0),
    "attention": (30_053_104, 22.391, 3.01),
    "decoder": (3_902_195, 2.907, 23.2),
    "partial-decoder": (478_320, 0.3564, 189.3),
    "lora": (1_368_064, 1.0193, 66.2),
    "lora-decoder": (5_270_259, 3.9266, 17.2),
    "flap": (1_846_384, 1.3757, 49.0),
    # Each of 12 blocks adds linear layers 768 → 32 and 32 → 768 with biases, and three weights for each of the 32 channels.
    "flap-volume": (1_846_384 + 12 * (768 * 32 + 32 + 32 * 768 + 768 + 3 * 32), 1.8231, 37.0),
}
"""Strategy → parameters, GiB of 100 rounds, and the factor saved over ``full``.

Counted by running the reference implementation with ViT-B, 224 pixels, 2 classes and rank 32, but for the last one.
"""


def test_counts_match_the_table_of_the_paper():
    rows = {row.strategy: row for row in strategy_table("sam-vit-b", image_size=224, classes=2, rank=32, rounds=100)}
    assert rows.keys() == STRATEGIES.keys() == EXPECTED.keys()
    for name, (parameters, gib, less) in EXPECTED.items():
        assert rows[name].parameters == parameters
        assert rows[name].gib == pytest.approx(gib, abs=5.1e-4)
        assert rows[name].less == pytest.approx(less, rel=2e-3)


@pytest.mark.parametrize("backbone", ["sam-vit-h", "sam-tiny", "mobile-sam", "sam2.1-small"])
def test_counts_of_other_backbones_add_up(backbone: str):
    counts = {row.strategy: row.parameters for row in strategy_table(backbone)}
    assert counts["flap"] == counts["lora"] + counts["partial-decoder"]
    assert counts["lora-decoder"] == counts["lora"] + counts["decoder"]
    assert counts["full"] == max(counts.values())


# ViT-B at rank 32. Query and value of an encoder block have 2 · (768 + 768) · 32 = 98,304 parameters. In each of the
# decoder's two layers, self-attention has 2 · (256 + 256) · 32 = 32,768, and each of the two cross-attentions has
# 2 · (256 + 128) · 32 = 24,576. The final attention has 24,576, too.
ENCODER, DECODER = 12 * 98_304, 2 * (32_768 + 2 * 24_576) + 24_576
TOKENS, UPSCALING, HYPERNETWORKS = 3 * 256, 76_632, 3 * 133_640


@pytest.mark.parametrize(
    ("lora", "frozen", "parameters"),
    [
        (Lora(layers=["encoder"]), [], ENCODER),
        (Lora(layers=["decoder"]), [], DECODER),
        (Lora(layers=["encoder-first"]), [], ENCODER // 2),
        (Lora(layers=["encoder-last", "decoder"]), [], ENCODER // 2 + DECODER),
        (Lora(layers=["encoder-first", "encoder-last", "decoder"]), [], ENCODER + DECODER),
        (Lora(projections=["v"]), [], (ENCODER + DECODER) // 2),
        (Lora(projections=["q", "k", "v", "out"]), [], 2 * (ENCODER + DECODER)),
        (Lora(projections=["out"], layers=["encoder"]), [], ENCODER // 2),
        (Lora(rank=4), [], (ENCODER + DECODER) // 8),
        (Lora(), ["mask-tokens"], ENCODER + DECODER - TOKENS),
        (Lora(), ["upscaling"], ENCODER + DECODER - UPSCALING),
        (Lora(), ["hypernetworks", "mask-tokens"], ENCODER + DECODER - HYPERNETWORKS - TOKENS),
    ],
)
def test_lora_options_and_frozen_parts_change_the_count(lora: Lora, frozen: list, parameters: int):
    with torch.device("meta"):
        network = build(architecture("sam-vit-b"), image_size=224, classes=2)
        apply_strategy(network, STRATEGIES["flap"], lora, frozen=frozen)
    assert sum(p.numel() for p in travelling(network).values()) == parameters + TOKENS + UPSCALING + HYPERNETWORKS


def volume() -> Volume:
    array = np.random.default_rng(0).normal(size=(20, 18, 3)).astype(np.float32)
    return Volume(array, np.diag([1.0, 1, 3, 1]))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_loaded_adapter_predicts_the_same(name: str, tmp_path: Path):
    assembled, card = trained(name)
    before = predict_volume(assembled.network, volume(), card.samples, batch=2).labels
    save_adapter(tmp_path, card, travelling_state(assembled.network))
    network, read = load_adapter(tmp_path)
    assert read == card
    assert len(np.unique(before)) > 1
    np.testing.assert_array_equal(predict_volume(network, volume(), read.samples, batch=2).labels, before)
    with torch.inference_mode():
        images = torch.rand(2, 3, 64, 64)
        assert torch.equal(network(images), assembled.network(images))


@pytest.mark.parametrize("name", STRATEGIES)
def test_adapters_are_saved_in_the_format_of_peft_where_possible(name: str, tmp_path: Path):
    assembled, card = trained(name)
    save_adapter(tmp_path, card, travelling_state(assembled.network))
    files = {path.name for path in tmp_path.iterdir()}
    peft, plain = {"adapter_config.json", "adapter_model.safetensors"}, {"weights.safetensors"}
    assert files == {"flapsam.json"} | {
        "flap": peft,
        "lora": peft,
        "lora-decoder": peft | plain,
    }.get(name, plain)


def test_an_adapter_with_frozen_parts_loads_back(tmp_path: Path):
    lora = Lora(rank=4, layers=["encoder-last"], projections=["k", "out"])
    assembled, card = trained("flap", lora=lora, frozen=["upscaling"])
    save_adapter(tmp_path, card, travelling_state(assembled.network))
    assert "output" not in (tmp_path / "adapter_config.json").read_text().replace("out_proj", "")
    network, read = load_adapter(tmp_path)
    assert read == card
    with torch.inference_mode():
        images = torch.rand(2, 3, 64, 64)
        assert torch.equal(network(images), assembled.network(images))


@pytest.mark.parametrize("layers", [["encoder", "decoder"], ["encoder-first", "decoder"]])
@pytest.mark.parametrize("name", ["flap", "lora"])
def test_plain_peft_loads_an_adapter(name: str, layers: list, tmp_path: Path):
    from peft import PeftModel

    assembled, card = trained(name, lora=Lora(rank=4, layers=layers, projections=["q", "out"]))
    save_adapter(tmp_path, card, travelling_state(assembled.network))
    base = build(assembled.network.sizes, image_size=64, classes=2, seed=99)
    bare = assemble(
        Backbone(name="sam-tiny-1", weights="random"),
        image_size=64,
        classes=2,
        strategy_name="full",
        lora=Lora(rank=4),
        seed=3,
    ).network
    base.load_state_dict(bare.state_dict())
    model = PeftModel.from_pretrained(base, str(tmp_path))
    with torch.inference_mode():
        images = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(model(images), assembled.network(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_only_travelling_parameters_get_a_gradient(name: str):
    network = trained(name)[0].network
    network(torch.rand(1, 3, 64, 64)).sum().backward()
    chosen = strategy(name)
    for parameter, value in network.named_parameters():
        if value.grad is not None:
            assert chosen.selects(parameter.replace(".base_layer", "").replace(".default", ""))


def test_an_adapter_for_another_backbone_is_refused(tmp_path: Path):
    saved(tmp_path, seed=4)
    with pytest.raises(FlapsamError, match="belongs to another backbone"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("weights", ['"random"', "null"])
def test_the_first_format_still_loads(weights: str, tmp_path: Path):
    """An adapter in the first format of flapsam 0.1.0, with the logits of that version. Null meant random weights then."""
    folder = copytree(WRITTEN / "adapter-format-1", tmp_path / "adapter")
    text = (folder / "flapsam.json").read_text()
    assert '"weights": "random"' in text
    (folder / "flapsam.json").write_text(text.replace('"weights": "random"', f'"weights": {weights}'))
    network, card = load_adapter(folder)
    assert (card.format, card.backbone.masks, card.lora) == (CARD_FORMAT, "new", Lora(rank=1))
    assert card.licence == "unknown"
    assert card.classes == ["kidney", "tumour"]
    image = (torch.arange(32 * 32.0).view(1, 1, 32, 32) % 37) / 37
    with torch.inference_mode():
        logits = network.eval()(image)
    expected = torch.tensor([-0.031202401965856552, 0.020732246339321136, -0.0005519278347492218])
    torch.testing.assert_close(logits[0, :, 5, 7], expected, atol=1e-5, rtol=0)
    assert logits.abs().mean().item() == pytest.approx(0.02993904985487461, abs=1e-5)


def test_the_second_to_sixth_format_still_load(tmp_path: Path):
    """What was called sam-tiny in them is called sam-tiny-1 now."""
    path = saved(tmp_path) / "flapsam.json"
    written = json.loads(path.read_text())
    assert written.pop("privacy") is None
    path.write_text(json.dumps({**written, "format": 6}))
    assert load_adapter(tmp_path)[1].privacy is None
    assert written.pop("personal") == []
    path.write_text(json.dumps({**written, "format": 5}))
    card = load_adapter(tmp_path)[1]
    assert (card.format, card.backbone.name, card.personal) == (CARD_FORMAT, "sam-tiny-1", [])
    written["backbone"]["name"] = "sam-tiny"
    path.write_text(json.dumps({**written, "format": 4}))
    assert load_adapter(tmp_path)[1].backbone.name == "sam-tiny-1"
    del written["lora"], written["frozen"]
    third = {**written, "format": 3, "lora_rank": 4, "licence": "MIT"}
    path.write_text(json.dumps(third))
    card = load_adapter(tmp_path)[1]
    assert (card.format, card.lora, card.frozen, card.licence) == (CARD_FORMAT, Lora(rank=4), [], "MIT")
    del third["backbone"]["masks"]
    path.write_text(json.dumps({**third, "format": 2}))
    card = load_adapter(tmp_path)[1]
    assert (card.format, card.backbone.masks, card.licence) == (CARD_FORMAT, "new", "MIT")


def test_a_newer_format_is_refused(tmp_path: Path):
    card = saved(tmp_path) / "flapsam.json"
    card.write_text(card.read_text().replace(f'"format": {CARD_FORMAT}', f'"format": {CARD_FORMAT + 1}'))
    with pytest.raises(FlapsamError, match=f"format {CARD_FORMAT + 1} is newer"):
        load_adapter(tmp_path)


def test_damaged_adapters_are_refused(tmp_path: Path):
    assembled, card = trained("lora-decoder")
    tensors = travelling_state(assembled.network)
    save_adapter(tmp_path, card, tensors)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(FlapsamError, match=r"adapter_model\.safetensors: cannot be read"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FlapsamError, match="do not fit its description"):
        load_adapter(tmp_path)
    (tmp_path / "flapsam.json").unlink()
    with pytest.raises(FlapsamError, match="not an adapter"):
        load_adapter(tmp_path)


def test_travelling_tensors_must_match_the_network():
    network = trained("lora")[0].network
    with pytest.raises(ValueError, match="1 tensors differ"):
        load_trained(network, {**travelling_state(network), "extra": torch.zeros(1)})


def test_saved_tensors_are_the_travelling_ones(tmp_path: Path):
    assembled, card = trained("flap")
    tensors = travelling_state(assembled.network)
    save_adapter(tmp_path, card, tensors)
    read = read_tensors(tmp_path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
