"""What keys may do, by name. Without a class in it: every command's help reads it at start."""

from collections.abc import Mapping
from typing import Final, Literal, get_args

Scope = Literal[
    "predict",
    "evaluate",
    "data:write",
    "finetune",
    "models:write",
    "models:activate",
    "metrics",
    "admin",
]
ALL_SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
MEANINGS: Final[Mapping[Scope, str]] = {
    "predict": "ask models, explain their answers, and list what there is",
    "evaluate": "measure models on datasets",
    "data:write": "upload, change and delete datasets",
    "finetune": "start and steer fine-tuning jobs",
    "models:write": "upload, delete, load and unload versions",
    "models:activate": "move aliases: what production answers with",
    "metrics": "read /metrics",
    "admin": "what touches the whole service",
}
