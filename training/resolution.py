"""What `auto` becomes, and why in words: a function of the dataset and the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.dataset_names import TEST, VALIDATION
from training.methods import (
    CROSS_VALIDATION,
    FINE_TUNE,
    GIVEN,
    LINEAR_PROBE,
    NOTHING_HELD,
    SPLIT,
    Method,
)

SMALL = 2000
"""Below so many samples a split would leave too few on either side to say anything."""
IMBALANCE = 3
DECAY_SAMPLES = 250
"""Below so many samples a last layer is held at its smallest; the more there are, the freer."""


@dataclass(frozen=True)
class Facts:
    """What choices depend on.

    Attributes:
        counts: training samples of each class.
        channels: of the pictures; 0 where the samples are numbers.
        given: the parts that the dataset brings besides what is learned from.
        same_classes: whether the base answers with these classes in this order.
    """

    counts: tuple[int, ...]
    channels: int
    given: frozenset[str]
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
        "class_weights": _class_weights(facts),
        "validation": _validation(method, settings, facts),
        **(_head(facts) if method != "from_scratch" else {}),
        **_passes(method, settings, facts),
        **_augment(facts),
    }
    return {
        name: choice for name, choice in offered.items() if getattr(settings, name, None) == "auto"
    }


def resolved(settings: Method, choices: Mapping[str, Choice]) -> Method:
    """The settings with every `auto` replaced."""
    return settings.model_copy(update={name: one.value for name, one in choices.items()})


def _class_weights(facts: Facts) -> Choice:
    least, most = min(facts.counts), max(facts.counts)
    if most >= IMBALANCE * least:
        return Choice("balanced", f"the largest class has {most} samples, the smallest {least}")
    return Choice("none", f"classes have between {least} and {most} samples")


def _validation(method: str, settings: Method, facts: Facts) -> Choice:
    """What chooses the weights never is what they are measured on."""
    num, folds = facts.num_samples, settings.folds
    if facts.given == {VALIDATION, TEST}:
        return Choice(GIVEN, "the validation part chooses the best weights, the test part measures")
    if num < 2 * folds:
        return Choice(NOTHING_HELD, f"{num} samples are too few to hold some of them out")
    if facts.given:
        return _beside_given(method, num, folds, *facts.given)
    if num >= SMALL:
        return Choice(SPLIT, f"{num} samples: enough to hold a share of each class out")
    return Choice(
        CROSS_VALIDATION,
        f"{num} samples, below {SMALL}: every one is answered by a network that did not learn "
        f"from it ({folds} folds), and the result learns from all",
    )


def _beside_given(method: str, num: int, folds: int, part: str) -> Choice:
    """The part that the dataset brings stays evidence; others choose."""
    if method == LINEAR_PROBE and num < SMALL:
        return Choice(
            CROSS_VALIDATION,
            f"{folds} folds of the {num} training samples choose the epoch, and the result learns "
            f"from all of them; the {part} part has chosen nothing, so it is evidence",
        )
    return Choice(
        SPLIT,
        f"a share of the {num} training samples chooses the best weights; the {part} part has "
        "chosen nothing, so it is evidence",
    )


def _head(facts: Facts) -> dict[str, Choice]:
    if facts.same_classes:
        return {"head": Choice("keep", "the base has these classes in this order")}
    return {"head": Choice("new", "the base has other classes")}


def _passes(method: str, settings: Any, facts: Facts) -> dict[str, Choice]:
    """Epochs, batch sizes and learning rates."""
    size_reason = f"{facts.num_samples} samples"
    if method == LINEAR_PROBE:
        return _on_features(settings.optimizer, facts.num_samples)
    if method == FINE_TUNE:
        alone = _on_features(settings.head_optimizer, facts.num_samples)
        return {
            **{f"head_{name}": choice for name, choice in alone.items()},
            "epochs": Choice(5, "a few passes, since the base knows most already"),
            "batch_size": Choice(16, "small steps and little memory"),
            "learning_rate": Choice(1e-4, "for batches of 16; lower layers learn more slowly"),
        }
    batch = 64 if facts.num_samples < 10_000 else 128
    return {
        "epochs": Choice(30 if facts.num_samples < 10_000 else 10, size_reason),
        "batch_size": Choice(batch, size_reason),
        "learning_rate": Choice(3e-3, f"AdamW with batches of {batch}"),
    }


def _on_features(optimizer: str, num_samples: int) -> dict[str, Choice]:
    """For a last layer that learns on features, which sgd sees at one scale."""
    size = 32 if num_samples < 10_000 else 256
    if optimizer == "sgd":
        rate = Choice(1e-3 * size / 32, f"sgd on scaled features with batches of {size}")
        decay = Choice(min(1.0, DECAY_SAMPLES / num_samples), f"{num_samples} samples")
    else:
        rate = Choice(2e-3 * (size / 32) ** 0.5, f"for batches of {size}")
        decay = Choice(1e-2, "AdamW")
    return {
        "epochs": Choice(100, "passes over features cost next to nothing"),
        "batch_size": Choice(size, f"{num_samples} samples"),
        "learning_rate": rate,
        "weight_decay": decay,
    }


def _augment(facts: Facts) -> dict[str, Choice]:
    if facts.channels == 0:
        return {"augment": Choice("none", "the samples are numbers, not pictures")}
    if facts.channels == 1:
        return {"augment": Choice("digits", "grey pictures: small shifts and turns, no mirroring")}
    return {"augment": Choice("natural", "colour pictures: mirrored, cut out, recoloured")}
