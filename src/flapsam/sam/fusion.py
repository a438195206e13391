"""The network for prediction only: adapters merged into their layers, and the encoder computed in fewer products."""

from flapsam.sam.lora import merge_adapters
from flapsam.sam.network import Sam
from flapsam.sam.slice_adapters import connect


def fuse(network: Sam) -> Sam:
    """Merge the adapters and fuse the encoder, in place. The network can only predict afterwards."""
    merge_adapters(network).vision_encoder.fuse()
    connect(network.vision_encoder)
    network.fused = True
    return network.eval()
