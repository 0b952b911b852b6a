"""What a caller may do: the scope that a route asks for, and the name of the key that asked."""

from collections.abc import Mapping
from typing import Any, Final, Literal

from fastapi import Depends

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
LOCAL: Final = "local"


def requires(scope: Scope) -> Any:
    """A dependency for a FastAPI route: `dependencies=[requires("data:write")]`."""

    async def check() -> None:
        return None

    check.scope = scope  # type: ignore[attr-defined]
    return Depends(check)


def key_name(connection: Mapping[str, Any]) -> str:
    """Who asked, for a history: the name of their key, or `local` where there are no keys."""
    name: str = connection.get("state", {}).get("key", LOCAL)
    return name
