"""The configuration of a run: pydantic models that are read from YAML.

The fields' own defaults are the paper's values (arXiv 2407.21739). A run's ``preset`` replaces some of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from flapsam.base.errors import too_new
from flapsam.base.names import Name, Named, as_name, folded
from flapsam.run.presets import PRESETS, SECURE, with_preset

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
ClassValues = int | list[int]
Tolerance = Annotated[float, Field(ge=0, le=1000)]
VariantName = Annotated[str, AfterValidator(lambda name: as_name(name) if name else name)]
"""Name of a variant in a bench. The run without changes has none."""
Mode = Literal["federated", "local", "ensemble", "centralised"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
Projection = Literal["q", "k", "v", "out"]
Layers = Literal["encoder", "encoder-first", "encoder-last", "decoder"]
OutputPart = Literal["mask-tokens", "upscaling", "hypernetworks"]

RANDOM: Literal["random"] = "random"
"""Value of ``backbone.weights`` that asks for random weights instead of a checkpoint."""
Checkpoint = Path | Literal["random"]
"""Source of a backbone's weights."""

RESERVED_LABELS = ("background", "ignore")
"""Names in ``labels`` that are not classes: values that count as background, and values that loss and scores leave out.
Case, spaces, hyphens and underscores make no difference, as in ``Background`` or ``__ignore__``."""
MEAN = "mean"
"""Name of the mean over the classes beside the classes' own scores, so that no class can have it."""
DEFAULT_TOLERANCE = 2.0
"""Tolerance of the surface Dice in mm for a class that has no other."""
Absent = Literal["none", "one"]
"""Dice of a class that is in neither the truth nor the prediction of a case."""


LEAST_SECURE = 3
"""Least number of sites in a sum of secure aggregation. Of two sites, each knows the other's change from the sum."""
MOST_PRIVATE_STEPS = 1_000_000
"""Largest number of steps of a private run. More would take long to account for."""
CONFIG_FORMAT = 1
"""Format of a run's configuration. A new field with a default keeps it. A change in a field's meaning raises it.

Configurations that users write have no number. So when ``sam-tiny`` became another network's name, the format of run folders
was raised instead."""


class StrictModel(BaseModel):
    """A part of the configuration. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(StrictModel):
    """The volumes, the sites that hold them, and the meaning of their labels."""

    path: Path
    """Folder that holds the data."""
    layout: str = "auto"
    """Data set or folder layout, as ``flapsam data list`` names it. ``auto`` recognises it from the folder."""
    table: Path | None = None
    """CSV file that assigns cases to sites. It has the columns ``case`` and ``site``, and optionally ``split`` and
    ``subject``. Only the cases that it lists are used."""
    simulated_sites: Positive | None = None
    """Number of simulated sites among which the subjects are divided at random, for data that come from one place."""
    labels: Named[ClassValues]
    """Class name → value or values in the label maps. The order sets the class index, from 1."""
    site_labels: Named[Named[ClassValues | None]] = {}
    """Site → class name → values that differ from ``labels`` at that site. A class set to null is not annotated there."""
    sites: list[Name] | None = None
    """Sites that take part; all of them if not given."""
    unseen: list[Name] = []
    """Sites that never train. The model that the other sites train is tested on their test cases."""
    test_fraction: Fraction = 0.2
    """Share of each site's subjects that are held out for testing, if the data have no split of their own."""
    validation_fraction: Fraction = 0.15
    """Share of each site's training subjects that are held out for validation, if the split has no ``val``. At least one
    subject is held out, and none if the share is 0."""
    training_cases: Positive | None = None
    """Number of subjects at each site whose cases train the model; all if not given or if a site has fewer. They are drawn
    at random with the run's seed, and a smaller number keeps a subset of what a larger one keeps. Validation and test cases
    do not change. For simulations only."""

    @property
    def classes(self) -> list[str]:
        """Names in ``labels`` that stand for classes, in the order of their index from 1.

        A reserved name is no class, and neither is a name whose only value is 0, which is the background.
        """
        return [name for name, values in self.labels.items() if not reserved(name) and set(as_values(values)) != {0}]

    @model_validator(mode="after")
    def _check_labels(self) -> "Data":
        if not self.classes:
            raise ValueError("labels: name at least one class, such as {kidney: 1}; 0 is the background")
        if MEAN in self.classes:
            raise ValueError(f"labels: {MEAN} is the name of the mean over the classes; give the class another name")
        _check_distinct("labels", self.labels)
        _check_background("labels", self.labels)
        for site, labels in self.site_labels.items():
            unknown = sorted(name for name in set(labels) - set(self.labels) if not reserved(name))
            if unknown:
                raise ValueError(f"site_labels.{site}: {', '.join(unknown)} is not among labels ({', '.join(self.classes)})")
            _check_distinct(f"site_labels.{site}", self.labels | labels)
            for name in self.classes:
                if 0 in as_values(labels.get(name)):
                    raise ValueError(
                        f"site_labels.{site}: {name} has the value 0, which is the background; give it other values"
                    )
        return self


class Samples(StrictModel):
    """How a volume becomes 2-D samples in [0, 1]. Training and inference use the same values, which the adapter stores."""

    size: Positive | None = None
    """Side of the network's square input in pixels; the backbone's default if not given."""
    axis: Literal["auto", "sagittal", "coronal", "axial"] = "auto"
    """Orientation of the slices: ``sagittal``, ``coronal``, ``axial``, or ``auto``, which cuts perpendicular to the axis
    with the largest spacing. Of several equal ones, the last counts."""
    clip: tuple[float, float] | None = None
    """Range that intensities are clipped to before scaling, such as [-80, 300] Hounsfield units for CT."""
    site_clip: Named[tuple[float, float]] = {}
    """Site → range that replaces ``clip`` at that site."""
    clip_percentile: Annotated[float, Field(gt=0, le=100)] | None = None
    """Percentile of a volume's intensities above which they are clipped, such as 99 for MRI with bright spots."""
    scaling: Literal["window", "volume"] = "window"
    """Voxels whose minimum and maximum become 0 and 1: a slice and its two neighbours on either side (``window``), or the
    whole volume (``volume``)."""
    channels: Literal["replicate", "adjacent"] = "replicate"
    """Content of the three input channels: the slice three times (``replicate``), or the slice with the ones below and
    above it in channels 0 and 2 (``adjacent``). With two or three modalities, each fills one channel instead, and the
    second of two fills two."""
    modalities: Annotated[int, Field(ge=1, le=3)] = 1
    """Number of modalities of every case. It is read from the data when a run starts."""
    resize: Literal["stretch", "pad"] = "stretch"
    """How a slice becomes a square: ``stretch`` stretches it, ``pad`` scales its longer side and pads the shorter one."""

    @field_validator("clip", "site_clip")
    @classmethod
    def _rising(cls, value: Any) -> Any:
        for low, high in value.values() if isinstance(value, dict) else [value] if value else []:
            # Not a comparison the other way round, which would accept what is no number.
            if not low < high:
                raise ValueError("give the lower bound first, then the higher")
        return value


class Backbone(StrictModel):
    """The Segment Anything Model that is fine-tuned."""

    name: str = "sam-tiny"
    """Name of the backbone, as ``flapsam backbone list`` shows it. ``sam-tiny`` ships with flapsam."""
    weights: Checkpoint | None = None
    """Checkpoint of that architecture (Meta's, or a folder or file of transformers), or ``random``. If not given, the
    backbone's own weights are used, which ship with flapsam or were downloaded."""
    pixels: Literal["paper", "sam", "own"] = "paper"
    """Input normalisation: the paper's (``paper``, mean 0 and standard deviation 1), SAM's (``sam``), or that of the
    backbone's makers (``own``)."""
    masks: Literal["new", "warm"] = "new"
    """How mask tokens and hypernetworks start: at random (``new``), or, if either of them trains, all from the
    checkpoint's first mask (``warm``)."""


class Lora(StrictModel):
    """Low-rank adapters. The scale is 1 (alpha = rank)."""

    rank: Positive = 32
    """Rank of every adapter."""
    projections: Annotated[list[Projection], Field(min_length=1)] = ["q", "v"]
    """Projections that have an adapter in every attention layer: query (``q``), key (``k``), value (``v``) or output
    (``out``)."""
    layers: Annotated[list[Layers], Field(min_length=1)] = ["encoder", "decoder"]
    """Parts of the network that have adapters: the whole image encoder (``encoder``), the first or the last half of its
    blocks (``encoder-first``, ``encoder-last``), or the mask decoder (``decoder``)."""


class Training(StrictModel):
    """The local training of a client, which is one site, or all sites' pooled data in mode ``centralised``."""

    epochs: Positive = 1
    """Number of local epochs per round."""
    window: Annotated[int, Field(ge=1, le=31)] = 5
    """Number of adjacent slices in one training sample. It must be odd."""
    batch_size: Positive = 3
    """Number of windows per batch."""
    micro_batch: Positive | Literal["auto"] | None = None
    """Number of windows that pass through the network at once; the whole batch if not given. The gradients of a batch's
    parts are summed, weighted by the parts' sizes. ``auto`` measures how many windows fit into memory."""
    checkpointing: bool = False
    """Whether the encoder uses gradient checkpointing, which saves memory and computes its forward pass twice."""
    empty_slices: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the slices without any class that an epoch uses, drawn again for every epoch. Slices with a class are
    always used."""
    augment: Literal["paper", "gentle", "none"] = "paper"
    """Augmentation: the paper's strong one (``paper``), small changes that suit short runs (``gentle``), or ``none``.
    True and false stand for ``paper`` and ``none``."""
    learning_rate: Annotated[float, Field(gt=0)] = 8e-4
    """Learning rate of AdamW after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates β₁ and β₂ of AdamW's moments."""
    warmup_steps: Positive = 250
    """Number of a client's first steps, over which the learning rate rises from 0."""
    schedule_epochs: Positive | None = 200
    """Number of epochs after warm-up at which the learning rate would reach 0. null stands for the end of the run."""
    schedule_power: Annotated[float, Field(ge=0)] = 7
    """Power of the polynomial by which the learning rate decays; 1 is a straight line."""
    cross_entropy: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the cross-entropy term in the loss."""
    dice: Annotated[float, Field(ge=0)] = 0.8
    """Weight of the Dice term in the loss."""
    foreground_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of every foreground class in the cross-entropy. The background has weight 1."""
    moments: Literal["keep", "reset"] = "keep"
    """Whether a client keeps Adam's moments between rounds or resets them."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's μ (Li et al. 2020, arXiv 1812.06127). The loss gains the term μ/2 · ‖θ − θ₀‖², where θ₀ is what the
    server sent."""

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
    """The rounds of the federation."""

    count: Annotated[int, Field(ge=0)] = 100
    """Maximum number of rounds of a run. 0 is for ``flapsam federation evaluate`` alone, which trains nothing."""
    steps: Positive | None = None
    """Number of training steps of every site in a round, in place of ``training.epochs``. A site's next round continues
    the epoch where the last one stopped. In mode ``centralised``, a round has as many steps as all sites take together."""
    last_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of epochs for which each site goes on training on its own cases after the last round. Each site then has an
    adapter of its own: the model before or after these epochs, whichever has the higher Dice on its validation cases."""
    weights: Literal["slices", "cases", "uniform"] | Named[Annotated[float, Field(ge=0)]] = "slices"
    """Weight of a client in the mean: its share of the training ``slices`` or ``cases``, the same for every client
    (``uniform``), or a number for each site."""
    validate_every: Positive = 1
    """Number of rounds from one validation to the next. The last round is always validated."""
    patience: Positive | None = None
    """Number of validations to wait for progress; no limit if not given. A site has settled once its best Dice of this many
    most recent validations exceeds its best Dice before them by no more than ``settled``. The run stops once more than
    half of the sites that report their Dice have settled."""
    settled: Annotated[float, Field(ge=0)] = 0.002
    """Largest rise in Dice that ``patience`` still counts as no progress."""
    max_change: Annotated[float, Field(ge=1)] | None = 10.0
    """How many times as large as the others' change a site's change may be. The size is the Euclidean norm of what a round
    changed in the site's tensors, and the others' is the lower median over the sites that answered. A larger change is left
    out of the round. null switches this check off."""
    max_weight: Annotated[float, Field(ge=1)] | None = 10.0
    """Between hospitals, how many times the lower median of the sites' slices or cases a site can count for, whatever it
    claims to have. From three sites on, it never counts for more than all others together either. Both bounds apply to
    ``weights: slices`` and ``weights: cases``. null switches them off."""
    keep: Annotated[int, Field(ge=0, le=100)] = 3
    """Number of rounds that ``--from-round`` can repeat. For each, the server keeps the global tensors from before it, and
    each site keeps its optimizer's moments."""
    min_sites: Positive = 2
    """Between hospitals, the number of sites that must answer before a round is closed. The mean of a single site's
    tensors would reveal them to all."""
    require: Literal["all"] | Positive | Annotated[list[Name], Field(min_length=1)] = "all"
    """Between hospitals, the sites without which no round is closed: ``all`` sites of the run, a list of names, or a number,
    whichever sites they are. The run waits for sites that are named, however long they take. An answer that is left out of
    a round for its size has arrived, too."""
    deadline: Annotated[float, Field(gt=0)] = 3600
    """Between hospitals, the number of seconds that a round waits for the answers of sites that are not named in
    ``require``. A site that needed longer before has three times its longest fit, but no more than three times this
    number."""

    @property
    def named(self) -> list[str]:
        """The sites that are required by name. Between hospitals, the coordinator puts all names in the place of ``all``."""
        return list(dict.fromkeys(self.require)) if isinstance(self.require, list) else []

    @property
    def enough(self) -> int:
        """Number of sites that must answer before a round is closed, whichever they are."""
        return max(self.min_sites, self.require if isinstance(self.require, int) else 1)


class Compression(StrictModel):
    """How tensors are encoded in packets."""

    codec: str = "fp32"
    """How tensors are encoded. ``fp32`` sends the tensors themselves. Every other codec, such as ``int8`` or ``steps``,
    sends their difference from what the receiver has."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each tensor's numbers that a codec with ``topk`` in its name sends."""
    bits: Annotated[float, Field(gt=0, le=3)] = 1.5
    """Bits per number that the codec ``steps`` sends, on average."""
    feedback: bool = True
    """Whether a site adds what the codec lost in one packet to its next packet (error feedback)."""


class ServerOptions(StrictModel):
    """What the server does with the mean of the clients' tensors."""

    optimizer: str = "none"
    """Server optimizer. ``none`` takes the mean as it is. ``fedavgm``, ``fedadam`` and ``fedyogi`` treat the step from
    the old tensors to the mean as a gradient."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the server; 1 for ``fedavgm`` and 0.01 for the others if not given."""
    momentum: Fraction = 0.9
    """Share of the momentum that is kept from round to round (β₁)."""
    second_moment: Fraction = 0.99
    """Share of the second moment that is kept from round to round (β₂). ``fedavgm`` does not use it."""
    floor: Annotated[float, Field(gt=0)] = 1e-3
    """Constant that is added to the root of the second moment (τ). ``fedavgm`` does not use it."""


class Privacy(StrictModel):
    """Differential privacy of every patient at every site (DP-SGD, Abadi et al. 2016, arXiv 1607.00133).

    In each training step, a site draws patients at random, scales the gradient of each down to a largest norm, and adds
    Gaussian noise to their sum. What leaves the site then says little about any one patient. All cases of a ``subject``
    count as one patient.
    """

    epsilon: Annotated[float, Field(gt=0, le=1000)] = 8
    """Upper bound on the ε of the run's training, for each patient of a site."""
    delta: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-5
    """Allowance δ, roughly the probability that a run reveals more than ε says. It should be well below 1 divided by the
    number of a site's patients."""
    clip: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.1
    """Largest Euclidean norm of a patient's gradient. A larger gradient is scaled down to it."""
    sampling: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Probability with which a patient takes part in a step."""
    windows: Positive = 4
    """Number of windows that a patient contributes to a step. They are drawn from all cases of the patient. A patient with
    fewer windows contributes some of them more than once."""
    repeats: Annotated[int, Field(ge=0, le=1000)] = 2
    """Number of rounds that a site may repeat, after a crash or with ``--from-round``. A repetition reveals as much as any
    round, so the noise is set for this many extra rounds."""


class Evaluation(StrictModel):
    """How label maps are scored, in a run's test, in ``flapsam evaluate`` and at hospitals."""

    tolerance: Tolerance | Named[Tolerance] = DEFAULT_TOLERANCE
    """Largest distance in mm between surfaces that the surface Dice counts as agreement, or class or region → distance.
    Those that are not named have 2 mm. A typical distance between two readers is a good choice."""
    regions: Named[Annotated[list[Name], Field(min_length=1)]] = {}
    """Region → classes whose union is scored beside the classes, such as ``kidney_and_tumour: [kidney, tumour]``."""
    lesions: list[Name] = []
    """Classes and regions that may have several separate parts in a case. They also get a lesion-wise F1
    score."""
    means: Named[Annotated[list[Name], Field(min_length=1)]] = {}
    """Name → classes and regions whose mean Dice in each case is shown under this name, such as ``FLamby:
    [kidney_and_tumour, tumour]``."""

    def tolerance_of(self, name: str) -> float:
        """The tolerance of a class or region in mm."""
        return self.tolerance.get(name, DEFAULT_TOLERANCE) if isinstance(self.tolerance, Mapping) else self.tolerance

    def check(self, classes: Sequence[str]) -> None:
        """Check that all names are those of classes or regions.

        Args:
            classes: names of the run's classes.

        Raises:
            ValueError: a name is unknown, or taken.
        """
        for field, names in {"regions": self.regions, "means": self.means}.items():
            others = {MEAN, *classes, *(self.regions if field == "means" else ())}
            if taken := [name for name in names if name in others]:
                raise ValueError(f"evaluation.{field}: {taken[0]} is taken by a class, a region or the mean; choose another")
        for name, parts in self.regions.items():
            if unknown := [part for part in parts if part not in classes]:
                raise ValueError(f"evaluation.regions.{name}: {unknown[0]} is not among the classes ({', '.join(classes)})")
        structures = [*classes, *self.regions]
        used = {
            "tolerance": self.tolerance if isinstance(self.tolerance, Mapping) else (),
            "lesions": self.lesions,
            **{f"means.{name}": parts for name, parts in self.means.items()},
        }
        for field, names in used.items():
            if unknown := [name for name in names if name not in structures]:
                known = ", ".join(structures)
                raise ValueError(f"evaluation.{field}: {unknown[0]} is not among the classes and regions ({known})")


class Grid(StrictModel):
    """Cells of ``flapsam bench``: every combination of these values. The run itself supplies what is not given."""

    strategies: list[str] | None = None
    """Strategies to compare; the run's own if not given."""
    modes: list[Mode] = ["federated"]
    """Modes to compare, as in a run's ``modes``."""
    aggregators: list[str] | None = None
    """Aggregators to compare, in mode ``federated`` only; the run's own if not given."""
    seeds: list[int] | None = None
    """Seeds, one repetition each; the run's own if not given. Differences are paired by seed, too."""
    leave_one_out: bool = False
    """Whether each site in turn is left out of training and tested on, in mode ``federated`` only."""
    variants: dict[VariantName, dict[str, Any]] = {"": {}}
    """Name of a variant → fields with other values, such as ``rank 4: {lora.rank: 4}``."""


class RunConfig(StrictModel):
    """A whole run, as ``run.yaml`` describes it."""

    format: Literal[1] = CONFIG_FORMAT
    """Format number of this configuration."""
    preset: str = "fast"
    """Set of values for the fields that are not given: ``paper``, ``fast``, or ``private`` for differential privacy."""
    seed: int = 0
    """Seed for every random choice."""
    data: Data
    samples: Samples = Samples()
    backbone: Backbone = Backbone()
    strategy: str = "flap"
    """What trains and travels: ``full``, ``attention``, ``decoder``, ``partial-decoder``, ``lora``, ``lora-decoder``,
    ``flap`` or ``flap-volume``."""
    lora: Lora = Lora()
    frozen: list[OutputPart] = []
    """Parts of the mask decoder's output that keep their initial weights and never travel, whatever the strategy trains:
    ``mask-tokens``, ``upscaling`` or ``hypernetworks``."""
    personal: list[str] = []
    """Patterns of the names of parameters that each site trains for itself and never sends, such as ``*.lora_B.weight``
    (FedSA-LoRA) or ``*norm*`` (as in FedBN). They train even if the strategy alone would not train them, but not if they are
    ``frozen``. Each site then has an adapter of its own."""
    training: Training = Training()
    rounds: Rounds = Rounds()
    aggregator: str = "flexlora"
    """How the server aggregates the sites' tensors, such as ``fedavg`` or ``flexlora``."""
    server: ServerOptions = ServerOptions()
    compression: Compression = Compression()
    privacy: Privacy | None = None
    """Differential privacy of every patient; none if not given. ``{}`` takes the defaults."""
    secure: bool = False
    """Whether the server learns only the weighted sum of the sites' changes in a round, and no site's own (secure
    aggregation, Bonawitz et al. 2017). It needs at least three sites, and an aggregator that is a mean: ``fedavg``,
    ``ffa-lora`` or ``rolora``."""
    site_ranks: Named[Positive] = {}
    """Site → rank of its adapters, for sites where it is smaller than ``lora.rank``."""
    modes: Annotated[list[Mode], Field(min_length=1)] = ["federated"]
    """Models to compare: one by all sites together (``federated``), one by each site alone (``local``), the mean of these
    sites' predictions, which trains nothing more (``ensemble``, after ``local``), or one on the pooled data
    (``centralised``)."""
    absent_class: Absent = "none"
    """Dice of a class that is in neither the truth nor the prediction of a case. With ``none`` it has no Dice, and means
    leave the case out for this class. With ``one`` it is 1."""
    evaluation: Evaluation = Evaluation()
    inference_batch: Positive | None = None
    """Number of slices per batch in validation and test; as many as fit into memory if not given."""
    device: str = "cpu"
    """Device to compute on: ``cpu``, ``cuda``, ``mps``, or ``auto``, which takes a GPU if there is one."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the network. ``bf16`` runs it under autocast, while parameters and packets stay fp32. ``tf32`` lets a GPU
    compute products of float32 with ten bits of mantissa, and is the same as ``fp32`` elsewhere."""
    threads: Positive | None = None
    """Number of CPU threads that a site trains with; all cores if not given. Results are bit-identical only for the same
    number of threads."""
    deterministic: bool = True
    """Whether to use only operations that return the same bits every time."""
    output: Path = Path("runs/run")
    """Folder of the run."""
    bench: list[Grid] = [Grid()]
    """Grids that ``flapsam bench`` compares. A cell that belongs to several grids is computed once."""
    notes: str = ""
    """Description of the run in your own words, which the report shows."""
    licence: str | None = None
    """Licence of the adapter, as an SPDX identifier; the backbone's if not given."""

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
        return with_preset(tree, name, SECURE if tree.get("secure") is True else {})

    @model_validator(mode="after")
    def _check_modes(self) -> "RunConfig":
        if "ensemble" in self.modes and "local" not in self.modes[: self.modes.index("ensemble")]:
            raise ValueError("modes: ensemble averages what the sites predict that train alone; put local before it")
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> "RunConfig":
        self.evaluation.check(self.data.classes)
        return self

    @model_validator(mode="after")
    def _check_secure(self) -> "RunConfig":
        """Check that nothing in a run with secure aggregation needs a single site's change."""
        if not self.secure:
            return self
        problem = ""
        if self.rounds.max_change is not None:
            problem = "cannot be used with rounds.max_change, because nobody sees a site's change; set it to null"
        elif self.rounds.min_sites < LEAST_SECURE:
            problem = f"needs at least {LEAST_SECURE} sites in every sum; set rounds.min_sites to {LEAST_SECURE} or more"
        elif self.rounds.weights in ("slices", "cases"):
            problem = (
                f"cannot be used with rounds.weights: {self.rounds.weights}, because sites cannot check others' counts; "
                "set it to uniform, or to a number for each site"
            )
        elif self.site_ranks:
            problem = "cannot be used with site_ranks; remove it"
        elif self.personal:
            problem = "cannot be used with personal, because a site's change would depend on what it has kept; remove it"
        elif self.training.moments != "reset":
            problem = "needs training.moments: reset, because a site's change would depend on what it has kept; set it"
        # With settings of their own, other sites could be made to change nothing, and hide nobody's change.
        elif self.samples.site_clip:
            problem = "cannot be used with samples.site_clip; use samples.clip or samples.clip_percentile"
        elif self.data.site_labels:
            problem = "cannot be used with data.site_labels; convert the label maps, so that labels suit all sites"
        elif any(reserved(name) and set(as_values(values)) != {0} for name, values in self.data.labels.items()):
            problem = "cannot be used with labels for background or ignore other than 0; remove them"
        if problem:
            raise ValueError(f"secure {problem}")
        return self

    @model_validator(mode="after")
    def _check_privacy(self) -> "RunConfig":
        """Check that nothing in a private run depends on the patients but their noisy gradients."""
        if self.privacy is None:
            return self
        rounds, problem = self.rounds, ""
        if rounds.steps is None:
            problem = "needs rounds.steps, because the length of an epoch tells how many slices a site has; set it"
        elif self.training.schedule_epochs is not None:
            problem = "needs training.schedule_epochs: null, because the length of an epoch tells how many slices a site has"
        elif rounds.weights in ("slices", "cases"):
            problem = (
                f"cannot be used with rounds.weights: {rounds.weights}, because counts of cases and slices do not leave a "
                "site; set it to uniform, or to a number for each site"
            )
        elif self.site_ranks:
            problem = "cannot be used with site_ranks, because noise would fill the ranks that a site leaves out; remove it"
        elif (total := rounds.steps * (rounds.count + self.privacy.repeats)) > MOST_PRIVATE_STEPS:
            problem = f"allows at most {MOST_PRIVATE_STEPS:,} steps, and this run may have {total:,}; lower rounds.count"
        elif rounds.patience is not None:
            problem = "cannot be used with rounds.patience, because no validation Dice leaves a site; remove it"
        if problem:
            raise ValueError(f"privacy {problem}")
        return self


def reserved(name: str) -> str:
    """The reserved name that a name in ``labels`` spells in its own way; empty if it is a class's name."""
    plain = "".join(letter for letter in folded(name) if letter.isalnum())
    return plain if plain in RESERVED_LABELS else ""


def _check_background(where: str, labels: Mapping[str, ClassValues | None]) -> None:
    """Check that 0 is the value of no class. A name whose only value is 0 is the background, unless that is elsewhere."""
    elsewhere = any(reserved(name) == "background" and 0 not in as_values(values) for name, values in labels.items())
    for name, values in labels.items():
        if 0 in as_values(values) and not reserved(name) and (elsewhere or set(as_values(values)) != {0}):
            raise ValueError(f"{where}: {name} has the value 0, which is the background; give it other values")


def _check_distinct(where: str, labels: dict[str, Any]) -> None:
    seen: dict[int, str] = {}
    for name, values in labels.items():
        for value in as_values(values):
            if value in seen:
                raise ValueError(f"{where}: value {value} stands for both {seen[value]} and {name}")
            seen[value] = name


def as_values(values: ClassValues | None) -> list[int]:
    """Label values as a list, which is empty for a class that is not annotated."""
    if values is None:
        return []
    return [values] if isinstance(values, int) else list(values)
