"""Federated, parameter-efficient fine-tuning of the Segment Anything Model for medical volumes.

Everything that the documentation teaches can be imported from here. A name loads what it needs when it is first used, so
``import flapsam`` itself is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flapsam.base.errors import FlapsamError
from flapsam.base.version import __version__

if TYPE_CHECKING:
    from flapsam.adapters.evaluation import evaluate
    from flapsam.adapters.export import export
    from flapsam.adapters.model import Model, load
    from flapsam.adapters.prediction import Predictions, predict
    from flapsam.experiments.simulation import Results, simulate
    from flapsam.federation.aggregation import AGGREGATORS, Aggregator, Reply
    from flapsam.federation.aggregation.aggregator import mean_product
    from flapsam.federation.client import Client
    from flapsam.federation.compression import CODECS, VALUES
    from flapsam.federation.compression.codec import Codec
    from flapsam.federation.compression.values import Values
    from flapsam.federation.rounds import Answer, deliver, rounds
    from flapsam.federation.server import Server
    from flapsam.learning.inference import Prediction, PredictionOptions
    from flapsam.learning.metrics import CaseScores, Summary, score_case, summarise
    from flapsam.learning.training import learning_rate, segmentation_loss
    from flapsam.report.page import write_report
    from flapsam.run.config import RunConfig
    from flapsam.run.ledger import Cohort, Ledger, read_ledger
    from flapsam.run.observer import Observer
    from flapsam.run.presets import PRESETS
    from flapsam.run.reading import read_config
    from flapsam.sam.strategies import STRATEGIES, Strategy
    from flapsam.sites import DATASETS, Case, CaseList, Dataset, Site, read_sites
    from flapsam.volumes import FORMATS, Volume, read_image, read_label, write_labels
    from flapsam.volumes.formats import Format

_MODULES = {
    "AGGREGATORS": "federation.aggregation",
    "Aggregator": "federation.aggregation",
    "Answer": "federation.rounds",
    "CODECS": "federation.compression",
    "Case": "sites",
    "CaseList": "sites",
    "CaseScores": "learning.metrics",
    "Client": "federation.client",
    "Codec": "federation.compression.codec",
    "Cohort": "run.ledger",
    "DATASETS": "sites",
    "Dataset": "sites",
    "FORMATS": "volumes",
    "Format": "volumes.formats",
    "Ledger": "run.ledger",
    "Model": "adapters.model",
    "Observer": "run.observer",
    "PRESETS": "run.presets",
    "Prediction": "learning.inference",
    "PredictionOptions": "learning.inference",
    "Predictions": "adapters.prediction",
    "Reply": "federation.aggregation",
    "Results": "experiments.simulation",
    "RunConfig": "run.config",
    "STRATEGIES": "sam.strategies",
    "Server": "federation.server",
    "Site": "sites",
    "Strategy": "sam.strategies",
    "Summary": "learning.metrics",
    "VALUES": "federation.compression",
    "Values": "federation.compression.values",
    "Volume": "volumes",
    "deliver": "federation.rounds",
    "evaluate": "adapters.evaluation",
    "export": "adapters.export",
    "learning_rate": "learning.training",
    "load": "adapters.model",
    "mean_product": "federation.aggregation.aggregator",
    "predict": "adapters.prediction",
    "read_config": "run.reading",
    "read_image": "volumes",
    "read_label": "volumes",
    "read_ledger": "run.ledger",
    "read_sites": "sites",
    "rounds": "federation.rounds",
    "score_case": "learning.metrics",
    "segmentation_loss": "learning.training",
    "simulate": "experiments.simulation",
    "summarise": "learning.metrics",
    "write_labels": "volumes",
    "write_report": "report.page",
}
"""Name → the module that has it."""

__all__ = [
    "AGGREGATORS",
    "CODECS",
    "DATASETS",
    "FORMATS",
    "PRESETS",
    "STRATEGIES",
    "VALUES",
    "Aggregator",
    "Answer",
    "Case",
    "CaseList",
    "CaseScores",
    "Client",
    "Codec",
    "Cohort",
    "Dataset",
    "FlapsamError",
    "Format",
    "Ledger",
    "Model",
    "Observer",
    "Prediction",
    "PredictionOptions",
    "Predictions",
    "Reply",
    "Results",
    "RunConfig",
    "Server",
    "Site",
    "Strategy",
    "Summary",
    "Values",
    "Volume",
    "__version__",
    "deliver",
    "evaluate",
    "export",
    "learning_rate",
    "load",
    "mean_product",
    "predict",
    "read_config",
    "read_image",
    "read_label",
    "read_ledger",
    "read_sites",
    "rounds",
    "score_case",
    "segmentation_loss",
    "simulate",
    "summarise",
    "write_labels",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """A name of the public face, loaded when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'flapsam' has no attribute '{name}'")
    value = getattr(import_module(f"flapsam.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
