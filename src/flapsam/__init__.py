"""Federated, parameter-efficient fine-tuning of the Segment Anything Model for medical volumes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flapsam.model import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """``Model`` and ``load``, with all that they need, when they are first asked for."""
    if name in ("Model", "load"):
        from flapsam import model

        return getattr(model, name)
    raise AttributeError(f"module 'flapsam' has no attribute '{name}'")
