"""The three ways to make a version from a base, and what can be set in each; imports no torch.

`auto` stands for a value that is found from the dataset and the base; what it became is written
into the result with the reason (`training/resolution.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field

from training.config import (
    Auto,
    Config,
    ConfigError,
    Count,
    FinetuneConfig,
    Fraction,
    NotNegative,
    NumProcesses,
    Positive,
)

Epochs = Annotated[int, Field(ge=1, le=100_000)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
LINEAR_PROBE: Final = "linear_probe"
FINE_TUNE: Final = "fine_tune"
FROM_SCRATCH: Final = "from_scratch"
CROSS_VALIDATION: Final = "cross_validation"
SPLIT: Final = "split"
GIVEN: Final = "given"
NOTHING_HELD: Final = "none"
ONE_IS_ENOUGH: Final = (
    "a linear probe learns one layer on features that are computed once, so more processes would "
    "not help: leave the number of processes at 1, or let all layers learn"
)


class Method(Config):
    """What all methods share."""

    @classmethod
    def called(cls, field: str) -> str:
        """Over HTTP a setting is called what it is called here."""
        return field

    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="The rule that turns gradients into steps."
    )
    momentum: Fraction = Field(default=0.9, description="Momentum of SGD.")
    nesterov: bool = Field(default=False, description="Whether SGD looks ahead.")
    weight_decay: NotNegative = Field(
        default=1e-2, description="Decoupled for AdamW; never on norms and biases."
    )
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        default="cosine", description="How the learning rate moves over the run."
    )
    warmup: Fraction = Field(
        default=0.0,
        description="The share of the steps in which the learning rate rises to its peak.",
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="The probability taken from the right class and spread over all."
    )
    class_weights: Literal["none", "balanced"] | Auto = Field(
        default="auto",
        description="balanced lets rare classes weigh as much as frequent ones; auto does so where "
        "one class has three times the samples of another.",
    )
    gradient_clip: NotNegative = Field(
        default=0.0, description="The largest norm of all gradients together; 0 is no limit."
    )
    ema_decay: Fraction = Field(
        default=0.0, description="Decay of the averaged weights that are kept; 0 averages nothing."
    )
    early_stopping: Count = Field(
        default=0,
        description="Epochs without a better validation before the run ends; 0 is never. Needs "
        "samples that choose the weights: a split, or a validation part that is given.",
    )
    validation: Literal["cross_validation", "split", "given", "none"] | Auto = Field(
        default="auto",
        description="What chooses the weights, and what the result is measured on. auto is "
        "cross-validation below 2,000 samples and a seeded stratified split from there on; a "
        "validation part of the dataset's own is measured, and chooses only as given, which auto "
        "takes where there is a test part beside it.",
    )
    folds: Annotated[int, Field(ge=2, le=20)] = Field(
        default=5, description="Parts of a cross-validation."
    )
    validation_fraction: Fraction = Field(
        default=0.1, description="The share that a split holds out to choose the best weights."
    )
    test_fraction: Fraction = Field(
        default=0.1, description="The share that a split holds out for the final figure."
    )
    split_seed: Count = Field(
        default=0, description="Decides folds and split, apart from the run's seed."
    )


class Kept(Method):
    """What the methods share that keep the base's weights."""

    head: Literal["keep", "new"] | Auto = Field(
        default="auto",
        description="Whether the last layer begins as the base has it; auto keeps it where the "
        "classes are the same in the same order.",
    )


class LinearProbe(Kept):
    """A new last layer, learned on features of the frozen base that are computed once and kept."""

    optimizer: Literal["adamw", "sgd"] = Field(
        default="sgd",
        description="The rule that turns gradients into steps; few samples are learned better by "
        "sgd, whose decay keeps the layer small.",
    )
    weight_decay: NotNegative | Auto = Field(  # type: ignore[assignment]
        default="auto", description="Decoupled for AdamW; never on biases. auto is less for more."
    )
    epochs: Epochs | Auto = Field(
        default="auto", description="Passes over the features; a hundred cost hardly more than one."
    )
    batch_size: BatchSize | Auto = Field(default="auto", description="Features in one step.")
    learning_rate: Positive | Auto = Field(default="auto", description="The peak of the schedule.")


class Augmented(Config):
    """What the methods share that see pictures in every epoch."""

    augment: Literal["none", "shift", "digits", "natural"] | Auto = Field(
        default="auto",
        description="Random changes of training pictures; only natural mirrors them. auto is "
        "digits for grey pictures, natural for colour and none for numbers.",
    )
    mixup: NotNegative = Field(
        default=0.0,
        le=10,
        description="Mixes each sample with another, by a share from Beta(mixup, mixup); 0 is off.",
    )
    cutmix: NotNegative = Field(
        default=0.0,
        le=10,
        description="Puts a rectangle of one picture into another, of an area from Beta(cutmix, "
        "cutmix); 0 is off. With mixup on as well, each step draws one of the two.",
    )


class FineTune(Augmented, Kept):
    """First a new last layer, then all layers, the lower ones by smaller steps."""

    head_epochs: Epochs | Auto = Field(
        default="auto", description="Passes of the last layer alone, over features."
    )
    head_batch_size: BatchSize | Auto = Field(
        default="auto", description="Features in one step of the last layer alone."
    )
    head_learning_rate: Positive | Auto = Field(
        default="auto", description="The peak of the schedule of the last layer alone."
    )
    head_optimizer: Literal["adamw", "sgd"] = Field(
        default="sgd", description="The rule by which the last layer alone learns."
    )
    head_weight_decay: NotNegative | Auto = Field(
        default="auto", description="Decay while the last layer learns alone."
    )
    epochs: Epochs | Auto = Field(
        default="auto", description="Passes over the pictures with all layers learning."
    )
    batch_size: BatchSize | Auto = Field(
        default="auto", description="Pictures in one step once all layers learn."
    )
    learning_rate: Positive | Auto = Field(
        default="auto", description="The last layer's peak once all layers learn."
    )
    layer_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=100.0,
        description="How many times smaller the learning rate of the lowest layers is.",
    )
    batch_norms: Literal["frozen", "learning"] = Field(
        default="frozen",
        description="frozen keeps the statistics of the base, which few pictures cannot improve.",
    )


class FromScratch(Augmented, Method):
    """Fresh weights for the network of the base."""

    epochs: Epochs | Auto = Field(default="auto", description="Passes over the samples.")
    batch_size: BatchSize | Auto = Field(default="auto", description="Samples in one step.")
    learning_rate: Positive | Auto = Field(default="auto", description="The peak of the schedule.")


METHODS: Final[Mapping[str, type[Method]]] = {
    LINEAR_PROBE: LinearProbe,
    FINE_TUNE: FineTune,
    FROM_SCRATCH: FromScratch,
}


class Compute(Config):
    """Where and how a run computes: the operator's part, which changes no recipe."""

    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0,
        description="Processor threads; 0 is those of the process, or one where steps are short.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto is bf16 on GPUs that have it and fp32 elsewhere."
    )
    determinism: Literal["exact", "fast"] | Auto = Field(
        default="auto",
        description="exact gives the same bits however often a run was interrupted; auto is exact "
        "on a processor and fast on a GPU.",
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        default=None, description="Processes that decode pictures; one a processor when not given."
    )
    memory_budget_mb: Count = Field(
        default=2048,
        description="Datasets up to this many MiB stay in memory as bytes; larger ones stream.",
    )
    num_processes: NumProcesses = 1
    cache_mb: Count = Field(
        default=4096, description="Features are kept on disk up to this many MiB, for all runs."
    )
    report_every: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Steps between two reports of the loss."
    )
    snapshot_seconds: NotNegative = Field(
        default=60.0, description="Seconds between two snapshots to resume from."
    )


class FineTuneRequest(Config):
    """One run: what from, by what, how."""

    base: str = Field(
        min_length=1,
        max_length=256,
        description="A version (`digits`, `digits@production`, `digits:3`) or a network of "
        "torchvision with weights that are here (`torchvision/mobilenet_v2`); for fresh weights "
        "any network by name.",
    )
    dataset: str = Field(
        min_length=1, description="A dataset by name, or the path of a folder, CSV or NPZ."
    )
    validation_dataset: str | None = Field(
        default=None, description="Another dataset, which the result is measured on."
    )
    method: Literal["linear_probe", "fine_tune", "from_scratch"] = Field(
        default="linear_probe", description="How the weights are made."
    )
    hyperparameters: dict[str, Any] = Field(
        default_factory=dict, description="Of the method, by name."
    )
    name: str | None = Field(
        default=None, description="The model that the result is published under; none publishes it."
    )
    seed: Count = Field(
        default=0, description="Everything random in the run follows from this number."
    )
    weights: str | None = Field(
        default=None,
        description="A file of weights for the base, or the word torchvision; for the command line "
        "only, never from a request.",
    )
    label_column: str = Field(
        default="", description="The CSV column that holds the label; the last one when empty."
    )
    data_root: str = Field(
        default="data", description="The folder where downloaded datasets lie or are put."
    )
    picture_size: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0,
        description="Pixels a side for fresh weights of a network by name; 0 keeps a common size.",
    )
    compute: Compute = Field(default_factory=Compute, description="Where and how it computes.")

    @classmethod
    def called(cls, field: str) -> str:
        """Over HTTP a setting is called what it is called here."""
        return field

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Check `values`, those of the method too, and build the request.

        Raises:
            ConfigError: all that is wrong with either, each setting by its name.
        """
        request = super().of(**values)
        _ = request.settings
        if request.method == LINEAR_PROBE and request.compute.num_processes > 1:
            raise ConfigError(ONE_IS_ENOUGH)
        return request

    @property
    def settings(self) -> Method:
        """The hyperparameters, checked, with defaults for what was not given.

        Raises:
            ConfigError: all that is wrong, each by its name.
        """
        return METHODS[self.method].of(**self.hyperparameters)


def request_of(
    config: FinetuneConfig, *, weights: str | None = None, validation: str = "auto"
) -> FineTuneRequest:
    """What the options of the command line ask for: the head alone, or all layers after it."""
    method = FINE_TUNE if config.unfreeze_epochs else LINEAR_PROBE
    given = {name: value for name, value in config.model_dump().items() if value != "auto"}
    options = {name: name for name in METHODS[method].model_fields}
    if method == FINE_TUNE:
        phase = ("epochs", "batch_size", "learning_rate")
        options |= {f"head_{name}": name for name in (*phase, "optimizer", "weight_decay")}
        options |= {name: f"unfreeze_{name}" for name in phase}
        options["layer_factor"] = "unfreeze_factor"
    settings = {name: given[option] for name, option in options.items() if option in given}
    shared = ("dataset", "seed", "label_column", "data_root")
    return FineTuneRequest.of(
        base=config.backbone,
        method=method,
        weights=weights,
        hyperparameters={**settings, "validation": validation},
        compute={name: given[name] for name in Compute.model_fields if name in given},
        **{name: given[name] for name in shared},
    )


def schemas() -> dict[str, dict[str, Any]]:
    """Method -> JSON Schema of its hyperparameters, with descriptions, bounds and defaults."""
    return {name: method.model_json_schema() for name, method in METHODS.items()}
