"""Labels on the versions of one model: each move is a line of a file that only grows.

The last whole line of an alias is its state; all of them are its history.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.journal import append_line, parse_line, read_lines
from models.store_error import StoreDamaged


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One line of a history; `to` is None where the alias was removed.

    Attributes:
        previous: what it held before.
        at: when, ISO 8601 in UTC.
        by: who moved it.
        why: one sentence.
        evidence: what a gate measured, as JSON.
    """

    alias: str
    to: int | None
    previous: int | None
    at: str
    by: str
    why: str
    evidence: dict[str, Any] = field(default_factory=dict)


class Aliases:
    """The aliases of one model; nothing is kept in memory.

    Args:
        path: the file of moves, which need not be there.

    Every method that reads raises `StoreDamaged` where a line cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def newest_first(self) -> Iterator[AliasMove]:
        """Every move; whoever asks what one alias holds has read enough at its first."""
        for line in reversed(read_lines(self.path)):
            values = parse_line(self.path, line)
            try:
                yield AliasMove(**{known.name: values[known.name] for known in fields(AliasMove)})
            except KeyError as error:
                raise StoreDamaged(
                    f"{self.path.parent.name}/{self.path.name} has a line without {error}"
                ) from None

    def last_move(self, alias: str) -> AliasMove | None:
        """None where it never moved."""
        return next((move for move in self.newest_first() if move.alias == alias), None)

    def holder(self, alias: str) -> int | None:
        """Number of the version that `alias` holds now."""
        move = self.last_move(alias)
        return move.to if move else None

    def holders(self) -> dict[str, int]:
        """Alias -> number of the version that it holds now."""
        state = {move.alias: move.to for move in reversed(list(self.newest_first()))}
        return {alias: number for alias, number in state.items() if number is not None}

    def append(
        self, alias: str, to: int | None, *, by: str, why: str, evidence: dict[str, Any]
    ) -> AliasMove:
        """Let `alias` hold `to` from now on; the caller holds the model's lock.

        Raises:
            TypeError, ValueError: the evidence cannot be written as JSON; nothing is changed.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        move = AliasMove(alias, to, self.holder(alias), now, by, why, evidence)
        append_line(self.path, asdict(move))
        return move
