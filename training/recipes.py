"""Settings per built-in dataset, found by experiment: `docs/log.md` tells of what failed."""

from collections.abc import Mapping
from typing import Any, Final

# Options that say what is done with the result, or where, and leave the recipe as it is.
_KEEPS_RECIPE: Final = frozenset(
    {"dataset", "data_root", "seed", "device", "split_seed", "memory_budget_mb", "num_workers"}
    | {"threads", "num_processes", "report_every", "snapshot_seconds"}
)
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    # One thread: 64 pictures of 8 by 8 pixels are too little work to share, and on a busy machine
    # threads that wait for each other take ten times as long.
    "digits": {
        "network": "cnn",
        "epochs": 12,
        "batch_size": 64,
        "learning_rate": 1e-2,
        "weight_decay": 1e-2,
        "schedule": "one-cycle",
        "augment": "digits",
        "test_fraction": 0.2,
        "threads": 1,
    },
    "mnist": {
        "network": "cnn",
        "epochs": 3,
        "batch_size": 256,
        "learning_rate": 2e-2,
        "weight_decay": 1e-4,
        "schedule": "one-cycle",
        "validation_fraction": 0.05,
    },
}


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over the recipe of its dataset, if it names nothing that the recipe decides."""
    recipe = RECIPES.get(str(given.get("dataset", "digits")).lower(), {})
    return {**recipe, **given} if given.keys() <= _KEEPS_RECIPE else dict(given)
