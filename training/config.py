"""What can be set when training and fine-tuning: one field a setting, one sentence a field.

The command line, the HTTP API and Python share these classes. Imports no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Auto = Literal["auto"]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

NumProcesses = Annotated[
    int,
    Field(
        ge=1,
        le=64,
        description="Processes that share each step, as torchrun starts them: one a GPU, or so "
        "many on a processor, among which its threads are divided.",
    ),
]
SHORT_OPTIONS = {"learning_rate": "--lr"}
"""Fields whose option on the command line is not simply their own name."""


class ConfigError(ValueError):
    """Settings are unknown or out of range; the sentences name each by its option."""


class Config(BaseModel):
    """Settings that cannot change once they are checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Check `values` and build the settings.

        Raises:
            ConfigError: all that is wrong, at once, each setting by its option's name.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            details = error.errors(include_url=False)
            raise ConfigError("; ".join(_sentences(details, cls.called))) from None

    @classmethod
    def called(cls, field: str) -> str:
        """What whoever sets it calls a field."""
        return option_name(field)


class DataConfig(Config):
    """Which samples, and how they are split and held."""

    dataset: str = Field(
        default="digits",
        min_length=1,
        description="digits, mnist, fashion-mnist, cifar10, or the path of a folder, CSV or NPZ.",
    )
    data_root: str = Field(
        default="data", description="The folder where downloaded datasets lie or are put."
    )
    label_column: str = Field(
        default="", description="The CSV column that holds the label; the last one when empty."
    )
    picture_size: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0,
        description="Pixels a side that pictures are brought to; 0 keeps a common size up to 64.",
    )
    validation_fraction: Fraction = Field(
        default=0.1,
        description="The share of the training samples held out to choose the best weights.",
    )
    test_fraction: Fraction = Field(
        default=0.1,
        description="The share held out for the final figure where the dataset has no test part.",
    )
    split_seed: Count = Field(
        default=0, description="Decides which samples are held out, apart from the run's seed."
    )
    memory_budget_mb: Count = Field(
        default=2048,
        description="Datasets up to this many MiB stay in memory as bytes; larger ones stream.",
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        default=None, description="Processes that decode pictures; one a processor when not given."
    )


class FitConfig(Config):
    """How weights are changed."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=10, description="Passes over the training samples."
    )
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = Field(
        default=128, description="Samples in one step."
    )
    optimizer: Literal["sgd", "adamw"] = Field(
        default="adamw", description="The rule that turns gradients into steps."
    )
    learning_rate: Positive = Field(default=1e-3, description="The peak of the schedule.")
    momentum: Fraction = Field(default=0.9, description="Momentum of SGD.")
    nesterov: bool = Field(default=False, description="Whether SGD looks ahead.")
    weight_decay: NotNegative = Field(
        default=0.0, description="Decoupled for AdamW; never on norms and biases."
    )
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        default="constant", description="How the learning rate moves over the run."
    )
    warmup: Fraction = Field(
        default=0.0,
        description="The share of the steps in which the learning rate rises to its peak.",
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="The probability taken from the right class and spread over all."
    )
    gradient_clip: NotNegative = Field(
        default=0.0, description="The largest norm of all gradients together; 0 is no limit."
    )
    ema_decay: Fraction = Field(
        default=0.0, description="Decay of the averaged weights that are kept; 0 averages nothing."
    )
    early_stopping: Count = Field(
        default=0, description="Epochs without a better validation before the run ends; 0 is never."
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none",
        description="balanced lets rare classes weigh as much as frequent ones.",
    )
    augment: Literal["none", "shift", "digits", "natural"] = Field(
        default="none",
        description="Random changes of training pictures; only natural mirrors them.",
    )
    mixup: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.0,
        description="Mixes each sample with another, by a share from Beta(mixup, mixup); 0 is off.",
    )
    cutmix: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.0,
        description="Puts a rectangle of one picture into another, of an area from Beta(cutmix, "
        "cutmix); 0 is off.",
    )
    determinism: Literal["auto", "exact", "fast"] = Field(
        default="auto",
        description="exact refuses what could give other bits when resumed; auto is exact on a "
        "processor and fast on a GPU.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto is bf16 on GPUs that have it and fp32 elsewhere."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0,
        description="Processor threads; 0 leaves the process as it is. Small networks want one.",
    )
    seed: Count = Field(
        default=0, description="Everything random in the run follows from this number."
    )
    report_every: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Steps between two reports of the loss."
    )
    snapshot_seconds: NotNegative = Field(
        default=60.0, description="Seconds between two snapshots to resume from."
    )


class TrainConfig(DataConfig, FitConfig):
    """Training a network from fresh weights."""

    network: str = Field(
        default="auto",
        min_length=1,
        description="A network by name; auto is cnn for pictures and mlp for numbers.",
    )
    network_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Its options; what the dataset decides (shapes, classes) is filled in.",
    )
    num_processes: NumProcesses = 1


class FinetuneConfig(DataConfig, FitConfig):
    """A new head on a backbone: first the head alone, then, if wanted, all layers.

    The settings of `FitConfig` are the head's, except for `augment`; `unfreeze_` ones are for all
    layers.
    """

    backbone: str = Field(
        default="torchvision/mobilenet_v2",
        min_length=1,
        description="The network whose layers below the head are kept.",
    )
    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=100, description="Passes of the head over the features, which are computed once."
    )
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = Field(
        default=32, description="Samples in one step."
    )
    optimizer: Literal["auto", "adamw", "sgd"] = Field(  # type: ignore[assignment]
        default="auto",
        description="The rule that turns gradients into steps; auto is sgd for the head alone.",
    )
    learning_rate: Positive | Auto = Field(  # type: ignore[assignment]
        default="auto", description="The peak of the head's schedule."
    )
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        default="cosine", description="How the learning rate moves over the run."
    )
    weight_decay: NotNegative | Auto = Field(  # type: ignore[assignment]
        default="auto", description="Never on norms and biases; auto is less for more samples."
    )
    augment: Literal["none", "shift", "digits", "natural"] = Field(
        default="natural",
        description="Random changes of pictures once all layers learn; features are without.",
    )
    unfreeze_epochs: Count = Field(
        default=0, description="Passes with all layers learning, after the head; 0 keeps them."
    )
    unfreeze_batch_size: Annotated[int, Field(ge=1, le=65_536)] = Field(
        default=16, description="Samples in one step once all layers learn."
    )
    unfreeze_learning_rate: Positive | Auto = Field(
        default="auto", description="The head's peak once all layers learn."
    )
    unfreeze_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=100.0,
        description="How many times smaller the learning rate of the lowest layers is.",
    )
    num_processes: NumProcesses = 1


def option_name(field: str) -> str:
    """How the command line calls a field: `batch_size` is `--batch-size`."""
    return SHORT_OPTIONS.get(field, "--" + field.replace("_", "-"))


def _sentences(details: Sequence[Any], called: Callable[[str], str]) -> Iterator[str]:
    """One sentence a field; a field that may also be a word complains about that as well."""
    by_field: dict[str, list[Any]] = {}
    for detail in details:
        by_field.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
    for field, (first, *others) in by_field.items():
        words = [one["ctx"]["expected"] for one in others if "expected" in one.get("ctx", {})]
        yield _sentence(first, called(field) if field else "settings", words)


def _sentence(detail: Any, name: str, words: Sequence[str]) -> str:
    if detail["type"] == "extra_forbidden":
        return f"{name} is not a setting here"
    problem = detail["msg"][0].lower() + detail["msg"][1:]
    problem = " or ".join([problem.replace("input should", "it should"), *words])
    return f"{name}: {problem}; it is {detail['input']!r}"
