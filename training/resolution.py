"""What `auto` becomes, and why in words: a function of the dataset and the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.methods import FINE_TUNE, LINEAR_PROBE, Method

SMALL = 2000
"""Below so many samples a split would leave too few on either side to say anything."""
IMBALANCE = 3


@dataclass(frozen=True)
class Facts:
    """What choices depend on.

    Attributes:
        counts: training samples of each class.
        channels: of the pictures; 0 where the samples are numbers.
        has_validation: whether a part is there that chooses the best weights.
        same_classes: whether the base answers with these classes in this order.
    """

    counts: tuple[int, ...]
    channels: int
    has_validation: bool
    same_classes: bool

    @property
    def num_samples(self) -> int:
        """All that can be learned from."""
        return sum(self.counts)


@dataclass(frozen=True)
class Choice:
    """A value and why it is this one."""

    value: Any
    reason: str

    def to_json(self) -> dict[str, Any]:
        """As the result holds it."""
        return {"value": self.value, "reason": self.reason}


def resolve(method: str, settings: Method, facts: Facts) -> dict[str, Choice]:
    """Every setting that was `auto` and can be chosen, by name."""
    offered = {
        **_weights_and_validation(settings, facts),
        **(_head(facts) if method != "from_scratch" else {}),
        **_passes(method, facts),
        **_augment(facts),
    }
    return {
        name: choice for name, choice in offered.items() if getattr(settings, name, None) == "auto"
    }


def resolved(settings: Method, choices: Mapping[str, Choice]) -> Method:
    """The settings with every `auto` replaced."""
    return settings.model_copy(update={name: one.value for name, one in choices.items()})


def _weights_and_validation(settings: Method, facts: Facts) -> dict[str, Choice]:
    least, most = min(facts.counts), max(facts.counts)
    if most >= IMBALANCE * least:
        weights = Choice("balanced", f"the largest class has {most} samples, the smallest {least}")
    else:
        weights = Choice("none", f"classes have between {least} and {most} samples")
    num = facts.num_samples
    if facts.has_validation:
        how = Choice("none", "the dataset has a validation part, which chooses the best weights")
    elif num >= SMALL:
        how = Choice("split", f"{num} samples: enough to hold a share of each class out")
    elif num >= 2 * settings.folds:
        how = Choice(
            "cross_validation",
            f"{num} samples, below {SMALL}: every one is answered by a network that did not learn "
            f"from it ({settings.folds} folds), and the result learns from all",
        )
    else:
        how = Choice("none", f"{num} samples are too few to measure anything")
    return {"class_weights": weights, "validation": how}


def _head(facts: Facts) -> dict[str, Choice]:
    if facts.same_classes:
        return {"head": Choice("keep", "the base has these classes in this order")}
    return {"head": Choice("new", "the base has other classes")}


def _passes(method: str, facts: Facts) -> dict[str, Choice]:
    """Epochs, batch sizes and learning rates."""
    size = 32 if facts.num_samples < 10_000 else 256
    size_reason = f"{facts.num_samples} samples"
    on_features = {
        "epochs": Choice(100, "passes over features cost next to nothing"),
        "batch_size": Choice(size, size_reason),
        "learning_rate": Choice(2e-3 * (size / 32) ** 0.5, f"for batches of {size}"),
    }
    if method == LINEAR_PROBE:
        return on_features
    if method == FINE_TUNE:
        return {
            **{f"head_{name}": choice for name, choice in on_features.items()},
            "epochs": Choice(5, "a few passes, since the base knows most already"),
            "batch_size": Choice(16, "small steps and little memory"),
            "learning_rate": Choice(1e-3, "for batches of 16; lower layers learn more slowly"),
        }
    batch = 64 if facts.num_samples < 10_000 else 128
    return {
        "epochs": Choice(30 if facts.num_samples < 10_000 else 10, size_reason),
        "batch_size": Choice(batch, size_reason),
        "learning_rate": Choice(3e-3, f"AdamW with batches of {batch}"),
    }


def _augment(facts: Facts) -> dict[str, Choice]:
    if facts.channels == 0:
        return {"augment": Choice("none", "the samples are numbers, not pictures")}
    if facts.channels == 1:
        return {"augment": Choice("digits", "grey pictures: small shifts and turns, no mirroring")}
    return {"augment": Choice("natural", "colour pictures: mirrored, cut out, recoloured")}
