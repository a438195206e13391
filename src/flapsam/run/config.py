"""The one description of a run: pydantic models read from YAML.

The fields' own defaults are the paper's values (arXiv 2407.21739); a run's ``preset`` puts others in their place.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flapsam.base.errors import too_new
from flapsam.run.presets import PRESETS, with_preset

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
ClassValues = int | list[int]
Mode = Literal["federated", "local", "centralised"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
Projection = Literal["q", "k", "v", "out"]
Layers = Literal["encoder", "encoder-first", "encoder-last", "decoder"]
OutputPart = Literal["mask-tokens", "upscaling", "hypernetworks"]

RANDOM: Literal["random"] = "random"
"""In the place of a checkpoint: random weights."""
Checkpoint = Path | Literal["random"]
"""Where a backbone's weights come from."""

RESERVED_LABELS = ("background", "ignore")
"""Names in ``labels`` that are no class: values joined to the background, and values left out of loss and scores."""


CONFIG_FORMAT = 1
"""Of a run's description. A field that is added with a default leaves it; a field that changes its meaning raises it."""


class StrictModel(BaseModel):
    """A part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(StrictModel):
    """Which volumes, at which sites, with which labels."""

    path: Path
    """The data's folder."""
    layout: str = "auto"
    """A data set or layout as ``flapsam data list`` names it; ``auto`` takes the one that the folder looks like."""
    table: Path | None = None
    """A CSV with columns ``case,site`` and, if wanted, ``split`` and ``subject``: who holds which cases."""
    simulated_sites: Positive | None = None
    """Where the data come from one place: deal its subjects out to so many made-up sites."""
    labels: dict[str, ClassValues]
    """Class name → value or values in the label files. Order gives the class index, from 1."""
    site_labels: dict[str, dict[str, ClassValues | None]] = {}
    """Where one site's values differ. A class set to null is not annotated there."""
    sites: list[str] | None = None
    """Only these sites; all by default."""
    unseen: list[str] = []
    """Sites that never train: the others' model is tested on their test cases."""
    test_fraction: Fraction = 0.2
    """Share of each site's subjects held back for the test where the data has no split of its own."""
    validation_fraction: Fraction = 0.15
    """Share of each site's training subjects held out for validation, at least one, where the split has no ``val``."""

    @property
    def classes(self) -> list[str]:
        """Class names, without background, in the order of their index from 1."""
        return [name for name in self.labels if name not in RESERVED_LABELS]

    @model_validator(mode="after")
    def _check_labels(self) -> "Data":
        if not self.classes:
            raise ValueError("labels: name at least one class, such as {kidney: 1}")
        _check_distinct("labels", self.labels)
        for site, labels in self.site_labels.items():
            unknown = sorted(set(labels) - set(self.labels) - set(RESERVED_LABELS))
            if unknown:
                raise ValueError(f"site_labels.{site}: {', '.join(unknown)} is not among labels ({', '.join(self.classes)})")
            _check_distinct(f"site_labels.{site}", self.labels | labels)
        return self


class Samples(StrictModel):
    """How a volume becomes 2-D samples in [0, 1]. The same in training and inference, and stored with the adapter."""

    size: Positive | None = None
    """Side of the network's square input in pixels; the backbone's own default if not given."""
    axis: Literal["auto", "sagittal", "coronal", "axial"] = "auto"
    """Slices are perpendicular to this axis; ``auto`` takes the largest spacing, and of equal ones the last."""
    clip: tuple[float, float] | None = None
    """Intensities are first cut to this range, such as [-80, 300] Hounsfield units for CT."""
    site_clip: dict[str, tuple[float, float]] = {}
    """Where one site's range differs."""
    clip_percentile: Annotated[float, Field(gt=0, le=100)] | None = None
    """Intensities above this percentile of the volume are cut to it, such as 99 for MRI with bright spots."""
    scaling: Literal["window", "volume"] = "window"
    """Minimum and maximum are taken over a slice and its two neighbours either side, or over the volume."""
    channels: Literal["replicate", "adjacent"] = "replicate"
    """The slice three times, or the slices below and above it in channels 0 and 2; two or three modalities take a channel
    each instead, and of two the second takes two."""
    modalities: Annotated[int, Field(ge=1, le=3)] = 1
    """Of every case; read from the data where a run begins."""
    resize: Literal["stretch", "pad"] = "stretch"
    """How a slice becomes a square: stretched, or padded after scaling its longer side."""

    @field_validator("clip", "site_clip")
    @classmethod
    def _rising(cls, value: Any) -> Any:
        for low, high in value.values() if isinstance(value, dict) else [value] if value else []:
            if low >= high:
                raise ValueError("give the lower bound first, then the higher")
        return value


class Backbone(StrictModel):
    """The Segment Anything Model underneath."""

    name: str = "sam-tiny"
    """As ``flapsam backbone list`` names it; ``sam-tiny`` ships with flapsam."""
    weights: Checkpoint | None = None
    """A checkpoint of that architecture (Meta's, a folder or file of transformers), or ``random``; the backbone's own, which
    ship with flapsam or were downloaded, if not given."""
    pixels: Literal["paper", "sam", "own"] = "paper"
    """Input normalisation: the paper's (mean 0, standard deviation 1), SAM's, or that of the backbone's makers."""
    masks: Literal["new", "warm"] = "new"
    """How mask tokens and hypernetworks start: at random, or, if either trains, all from the checkpoint's first mask."""


class Lora(StrictModel):
    """Low-rank adapters. The scale is 1 (alpha = rank)."""

    rank: Positive = 32
    """Of every adapter."""
    projections: Annotated[list[Projection], Field(min_length=1)] = ["q", "v"]
    """Of every attention: query, key, value and output."""
    layers: Annotated[list[Layers], Field(min_length=1)] = ["encoder", "decoder"]
    """The whole image encoder, or the first or the last half of its blocks; the mask decoder."""


class Training(StrictModel):
    """One client's local fit."""

    epochs: Positive = 1
    """Local epochs a round."""
    window: Annotated[int, Field(ge=1, le=31)] = 5
    """Adjacent slices in one training sample; odd."""
    batch_size: Positive = 3
    """Windows a batch."""
    micro_batch: Positive | Literal["auto"] | None = None
    """Windows that go through the network at once; the gradients of a batch's parts are added up, each by its share. All if
    not given; ``auto`` measures how many fit into memory."""
    checkpointing: bool = False
    """Keep less between forward and backward in the encoder, and compute it twice."""
    empty_slices: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the slices without any class that an epoch shows, drawn anew in each; those with a class it shows all."""
    augment: Literal["paper", "gentle", "none"] = "paper"
    """The paper's strong augmentation, or small changes that suit short runs. True and false stand for paper and none."""
    learning_rate: Annotated[float, Field(gt=0)] = 8e-4
    """After warm-up; AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    warmup_steps: Positive = 250
    """Steps of a client in which the learning rate rises from 0."""
    schedule_epochs: Positive | None = 200
    """The learning rate would reach zero after warm-up and this many epochs; null: at the end of the run."""
    schedule_power: Annotated[float, Field(ge=0)] = 7
    """Of the polynomial by which the learning rate falls; 1 is a straight line."""
    cross_entropy: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the cross-entropy term."""
    dice: Annotated[float, Field(ge=0)] = 0.8
    """Weight of the Dice term."""
    foreground_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of every foreground class in the cross-entropy, where background has 1."""
    moments: Literal["keep", "reset"] = "keep"
    """Whether Adam's moments stay at the client between rounds."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's μ (Li et al. 2020, arXiv 1812.06127): the loss grows by μ/2 · ‖θ − θ₀‖², θ₀ being what the server sent."""

    @field_validator("augment", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {True: "paper", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("window")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that a window has a middle slice")
        return value


class Rounds(StrictModel):
    """The federation's rounds."""

    count: Positive = 100
    """Rounds of a run, at most."""
    weights: Literal["slices", "cases", "uniform"] | dict[str, Annotated[float, Field(ge=0)]] = "slices"
    """A client's weight in the mean: its share of training slices or cases, equal, or given by site."""
    validate_every: Positive = 1
    """Rounds from one validation to the next; the last round has one, too."""
    patience: Positive | None = None
    """Stop when the best Dice of so many validations is not above the best before them by more than ``settled``."""
    settled: Annotated[float, Field(ge=0)] = 0.002
    """Dice that ``patience`` counts as no progress."""
    min_sites: Positive = 2
    """Between hospitals: a round that fewer answer is not closed. The mean of one site's tensors would show them to all."""
    deadline: Annotated[float, Field(gt=0)] = 3600
    """Between hospitals: seconds that a round waits for its answers."""


class Compression(StrictModel):
    """How packets are written."""

    codec: str = "fp32"
    """``fp32`` sends the tensors, every other codec the difference to what the receiver has."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each tensor's numbers that a codec with ``topk`` sends."""
    bits: Annotated[float, Field(gt=0, le=3)] = 1.5
    """Of every number that codec ``steps`` sends, on average."""
    feedback: bool = True
    """Whether what a site's packet lost is added to its next one."""


class ServerOptions(StrictModel):
    """What the server does with the clients' mean."""

    optimizer: str = "none"
    """``none`` takes the mean; ``fedavgm``, ``fedadam`` and ``fedyogi`` treat the way to it as a gradient."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """1 for ``fedavgm`` and 0.01 for the others if not given."""
    momentum: Fraction = 0.9
    """Share of the way before that is kept."""
    second_moment: Fraction = 0.99
    """Share of the squared way before that is kept; not ``fedavgm``'s."""
    floor: Annotated[float, Field(gt=0)] = 1e-3
    """Added to the root of the second moment."""


class Grid(StrictModel):
    """Cells of ``flapsam bench``: every combination of these. What is not given comes from the run itself."""

    strategies: list[str] | None = None
    """What trains and travels."""
    modes: list[Mode] = ["federated"]
    """As a run's ``modes``."""
    aggregators: list[str] | None = None
    """How the sites' tensors are joined; only federated."""
    seeds: list[int] | None = None
    """Repetitions; differences are paired by seed, too."""
    leave_one_out: bool = False
    """Each site in turn never trains and is tested on; only federated."""
    variants: dict[str, dict[str, Any]] = {"": {}}
    """Name → fields with other values, such as ``rank 4: {lora.rank: 4}``."""


class RunConfig(StrictModel):
    """A whole run, as in ``RUN.yaml``."""

    format: Literal[1] = CONFIG_FORMAT
    """Of this description."""
    preset: str = "fast"
    """Where the fields that are not given come from: ``paper`` or ``fast``."""
    seed: int = 0
    """Every random choice follows from it."""
    data: Data
    samples: Samples = Samples()
    backbone: Backbone = Backbone()
    strategy: str = "flap"
    """What trains and travels: ``full``, ``attention``, ``decoder``, ``partial-decoder``, ``lora``, ``lora-decoder`` or
    ``flap``."""
    lora: Lora = Lora()
    frozen: list[OutputPart] = []
    """Parts of the mask decoder's output that stay as they start and never travel, whatever the strategy trains."""
    training: Training = Training()
    rounds: Rounds = Rounds()
    aggregator: str = "flexlora"
    """How the sites' tensors are joined."""
    server: ServerOptions = ServerOptions()
    compression: Compression = Compression()
    site_ranks: dict[str, Positive] = {}
    """Sites whose adapters have a smaller rank than ``lora.rank``."""
    modes: Annotated[list[Mode], Field(min_length=1)] = ["federated"]
    """What to train: one model by all sites together, one by each site alone, one on the pooled data."""
    inference_batch: Positive | None = None
    """Slices a batch at validation and test; as many as fit if not given."""
    device: str = "cpu"
    """``cpu``, ``cuda``, ``mps`` or ``auto``."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the network under autocast; parameters and packets stay fp32."""
    threads: Positive | None = None
    """Threads a fit; results are bit-identical only for equal numbers. All cores if not given."""
    deterministic: bool = True
    """Only operations that give the same bits each time."""
    output: Path = Path("runs/run")
    """The run's folder."""
    bench: list[Grid] = [Grid()]
    """What ``flapsam bench`` compares; a cell that stands in several grids is computed once."""
    notes: str = ""
    """What the run is about, in your own words; the report shows it."""
    licence: str | None = None
    """Of the adapter, as an SPDX identifier; the backbone's if not given."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        # Before anything else: a later version may also have fields that are unknown here.
        if problem := too_new(tree.get("format"), CONFIG_FORMAT):
            raise ValueError(problem)
        name = tree.get("preset", cls.model_fields["preset"].default)
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset: there is no '{name}'; choose {' or '.join(PRESETS)}")
        return with_preset(tree, name)


def _check_distinct(where: str, labels: dict[str, Any]) -> None:
    seen: dict[int, str] = {}
    for name, values in labels.items():
        for value in as_values(values):
            if value in seen:
                raise ValueError(f"{where}: value {value} stands for both {seen[value]} and {name}")
            seen[value] = name


def as_values(values: ClassValues | None) -> list[int]:
    """Label values as a list; none for a class that is not annotated."""
    if values is None:
        return []
    return [values] if isinstance(values, int) else list(values)
