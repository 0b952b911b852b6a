"""Settings per built-in dataset, found by experiment: `docs/log.md` tells of what failed."""

from collections.abc import Mapping
from typing import Any, Final

# Options that say what is done with the result, or where, and leave the recipe as it is.
_KEEPS_RECIPE: Final = frozenset(
    {"dataset", "data_root", "seed", "device", "split_seed", "memory_budget_mb", "num_workers"}
)
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "digits": {
        "network": "cnn",
        "threads": 1,
        "epochs": 30,
        "batch_size": 64,
        "learning_rate": 1e-2,
        "schedule": "one-cycle",
        "warmup": 0.3,
        "weight_decay": 1e-2,
        "label_smoothing": 0.05,
        "augment": "shift",
    },
    "mnist": {
        "network": "cnn",
        "epochs": 4,
        "batch_size": 128,
        "learning_rate": 1e-2,
        "schedule": "one-cycle",
        "warmup": 0.3,
        "weight_decay": 1e-2,
        "label_smoothing": 0.05,
        "augment": "digits",
    },
}


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over the recipe of its dataset, if it names nothing that the recipe decides."""
    recipe = RECIPES.get(str(given.get("dataset", "digits")).lower(), {})
    return {**recipe, **given} if given.keys() <= _KEEPS_RECIPE else dict(given)
