"""Merge an adapter into its backbone and export the network to other formats."""

import json
import warnings
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from flapsam.adapters.store import AdapterCard, load_adapter
from flapsam.adapters.trained import find_trained
from flapsam.base.errors import FlapsamError
from flapsam.base.files import check_writable, write_text, written_whole
from flapsam.run.config import Checkpoint
from flapsam.sam import Sam, merge_adapters

TOLERANCE = 1e-3
"""Largest difference allowed between the logits of onnxruntime and PyTorch."""


def export(
    trained: Path, output: Path, *, form: Literal["transformers", "onnx"], checkpoint: Checkpoint | None = None
) -> list[Path]:
    """Merge an adapter into its backbone and write the network.

    Args:
        trained: folder of an adapter or of a run.
        output: folder for ``config.json`` and ``model.safetensors`` (transformers), or ``model.onnx`` and ``flapsam.json``.
        form: the format. ``transformers`` uses the names of ``SamModel`` or ``Sam2Model`` where it has the tensors. Those
            that it lacks begin with ``flapsam.``, and flapsam reads the folder as a backbone's checkpoint. ``onnx`` maps
            images (batch, 3, size, size) in [0, 1] to logits (batch, classes + 1, size, size). Where slices meet, as in
            ``flap-volume``, the batch is a run of neighbouring slices.
        checkpoint: the backbone's checkpoint, if the adapter needs one.

    Returns:
        The files written.

    Raises:
        FlapsamError: the adapter is damaged or belongs to another backbone, transformers has no such backbone, the folder
            cannot be written, the packages for ONNX are missing, or the exported network computes different logits.
    """
    adapter = find_trained(trained)
    check_writable(output)
    network, card = load_adapter(adapter.folder, checkpoint or adapter.checkpoint)
    merge_adapters(network).eval()
    if form == "onnx":
        return _onnx(network, card, output)
    return _transformers(network, card, output)


def _transformers(network: Sam, card: AdapterCard, output: Path) -> list[Path]:
    if network.reach:
        raise FlapsamError(f"transformers has no model in which slices meet, as {card.strategy} needs; use the format onnx")
    tensors, description = network.sizes.to_transformers(network)
    model, config = output / "model.safetensors", output / "config.json"
    with written_whole(model) as temporary:
        metadata = {"format": "pt", "flapsam": card.model_dump_json()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
    write_text(config, json.dumps(description, indent=2, sort_keys=True) + "\n")
    return [config, model]


def _onnx(network: Sam, card: AdapterCard, output: Path) -> list[Path]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (PyTorch's exporter needs it)
    except ImportError as error:
        raise FlapsamError("packages for ONNX are missing; install them with `pip install flapsam[onnx]`") from error
    generator = torch.Generator().manual_seed(0)
    two, three = (torch.rand(batch, 3, network.image_size, network.image_size, generator=generator) for batch in (2, 3))
    model, description = output / "model.onnx", output / "flapsam.json"
    with written_whole(model) as temporary, warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # The exporter mistakes the strides of fused attention for its shape. Its own warnings do not help users.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (two,),
            str(temporary),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=1024)}},
            external_data=False,
            verbose=False,
            dynamo=True,
        )
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            expected = network(three)
        (logits,) = session.run(None, {"images": three.numpy()})
        difference = float((torch.from_numpy(logits) - expected).abs().max())
        if not difference <= TOLERANCE:
            raise FlapsamError(f"{model}: not written, because its logits differ from PyTorch's by {difference:.1e}")
    write_text(description, card.model_dump_json(indent=2) + "\n")
    return [description, model]
