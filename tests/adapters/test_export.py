"""Merging an adapter into its backbone, and exporting it to other software."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.sam.modeling_sam import SamModel

from flapsam.adapters.store import save_adapter
from flapsam.sam import STRATEGIES, Sam, build, load_checkpoint, merge_adapters, read_checkpoint, travelling_state
from flapsam.sam.families import to_own_names
from flapsam.sam.naming import to_transformers
from tests.helpers.adapters import saved, trained
from tests.helpers.command import flapsam
from tests.helpers.golden import golden_network

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def logits(network: Sam) -> Tensor:
    with torch.inference_mode():
        return network.eval()(IMAGES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_merging_hardly_changes_the_logits(name: str):
    network = trained(name)[0].network
    before = logits(network)
    merged = merge_adapters(network)
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=0)
    # Adapters in which slices meet are no part of another layer.
    left = {tensor for tensor in merged.state_dict() if ".slices." not in tensor}
    assert left == build(merged.sizes, image_size=64, classes=2).state_dict().keys()


def test_transformers_reads_the_merged_network(tmp_path: Path, capfd):
    network = trained("flap")[0].network
    outcome = flapsam(capfd, "export", saved(tmp_path / "adapter"), "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    files = [Path(path).name for path in json.loads(outcome.out)["written"]]
    assert files == ["config.json", "model.safetensors"]
    model, loading = SamModel.from_pretrained(tmp_path / "out", output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    # Only the layers that have another size in flapsam are missing.
    missing = {name.split(".")[1] for name in loading["missing_keys"]}
    assert missing == {"output_hypernetworks_mlps", "upscale_conv1", "upscale_conv2", "upscale_layer_norm"}
    assert all(name.startswith("flapsam.") for name in loading["unexpected_keys"])
    assert not loading["mismatched_keys"]
    ours = merge_adapters(network)
    with torch.inference_mode():
        torch.testing.assert_close(model.get_image_embeddings(IMAGES), ours.embed(IMAGES), atol=1e-5, rtol=0)
    # SAM's decoder uses another value than the default of transformers.
    assert model.mask_decoder.transformer.config.layer_norm_eps == 1e-5
    theirs, mine = model.mask_decoder.transformer.state_dict(), ours.mask_decoder.transformer.state_dict()
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)


def test_tensors_survive_renaming_for_transformers_and_back():
    """The golden network has SAM's own widths, so transformers has names for its first two upscaling steps."""
    state = golden_network().state_dict()
    theirs = to_transformers(state)
    assert {"mask_decoder.upscale_conv1.weight", "mask_decoder.upscale_conv2.bias"} <= theirs.keys()
    assert "vision_encoder.layers.0.attn.qkv.weight" in theirs
    restored = to_own_names(theirs)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_flapsam_reads_the_merged_network(tmp_path: Path, capfd):
    network = trained("flap")[0].network
    expected = logits(network)
    assert flapsam(capfd, "export", saved(tmp_path / "adapter"), "-o", tmp_path / "out").code == 0
    reloaded = build(network.sizes, image_size=64, classes=2, seed=8)
    report = load_checkpoint(reloaded, read_checkpoint(tmp_path / "out"), "exported", keep_masks=True)
    assert not report.new
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=0)


@pytest.mark.no_cover
@pytest.mark.usefixtures("small_families")
def test_onnx_computes_the_same_logits(tmp_path: Path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    """With the strategy whose slices meet, for which a batch is a run of slices."""
    assembled, card = trained("flap-volume", backbone="small-tiny-vit")
    save_adapter(tmp_path / "adapter", card, travelling_state(assembled.network))
    outcome = flapsam(capfd, "export", tmp_path / "adapter", "-o", tmp_path / "out")
    assert outcome.code == 2 and "use the format onnx" in outcome.err
    outcome = flapsam(capfd, "export", tmp_path / "adapter", "-o", tmp_path / "out", "--format", "onnx", "--json")
    assert outcome.code == 0, outcome.err
    assert [Path(path).name for path in json.loads(outcome.out)["written"]] == ["flapsam.json", "model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (actual,) = session.run(None, {"images": IMAGES[:batch].numpy()})
        with torch.inference_mode():
            expected = assembled.network.eval()(IMAGES[:batch])
        torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-3, rtol=0)


def test_unknown_formats_and_missing_packages_are_reported(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    adapter = saved(tmp_path / "adapter")
    outcome = flapsam(capfd, "export", adapter, "-o", tmp_path / "out", "--format", "tflite")
    assert outcome.code == 2
    assert "Invalid value for '--format'" in outcome.err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    outcome = flapsam(capfd, "export", adapter, "-o", tmp_path / "out", "--format", "onnx")
    assert outcome.code == 2
    assert "pip install flapsam[onnx]" in outcome.err
    assert not list((tmp_path / "out").iterdir())
