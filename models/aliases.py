"""Labels on the versions of one model: each move is a line of a file that only grows.

The last whole line of an alias is its state; all of them are its history. Besides the version that
it holds, an alias may give a share of its requests to another one (canary), and a copy of them to
a third whose answers nobody gets (shadow). A line that says nothing of these has neither.
"""

from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from models.journal import append_line, parse_line, read_lines
from models.store_error import StoreDamaged


@dataclass(frozen=True, slots=True)
class Split:
    """What an alias sends to others than the version that it holds.

    Attributes:
        canary: the version that answers `share` of the requests; None for none.
        share: more than 0 and less than 1 where there is a canary, else 0.
        shadow: the version that gets a copy of the requests and whose answers are only compared.

    Raises:
        ValueError: a share without a canary, or one that is no share.
    """

    canary: int | None = None
    share: float = 0.0
    shadow: int | None = None

    def __post_init__(self) -> None:
        if self.canary is None and self.share:
            raise ValueError(f"a share of {self.share:g} needs a canary that gets it")
        if self.canary is not None and not 0 < self.share < 1:
            raise ValueError(
                f"the share of a canary is more than 0 and less than 1, not {self.share:g}"
            )

    def versions(self) -> set[int]:
        """Those that it names."""
        return {number for number in (self.canary, self.shadow) if number is not None}


WHOLE: Final = Split()
"""Everything goes to the version that the alias holds."""


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One line of a history; `to` is None where the alias was removed.

    Attributes:
        previous: what it held before.
        at: when, ISO 8601 in UTC.
        by: who moved it.
        why: one sentence.
        evidence: what a gate measured, as JSON.
        canary, share, shadow: see `Split`.
        rollback: whether it went back to what it held before.
    """

    alias: str
    to: int | None
    previous: int | None
    at: str
    by: str
    why: str
    evidence: dict[str, Any] = field(default_factory=dict)
    canary: int | None = None
    share: float = 0.0
    shadow: int | None = None
    rollback: bool = False

    @property
    def split(self) -> Split:
        """What goes elsewhere."""
        return Split(self.canary, self.share, self.shadow)

    def versions(self) -> set[int]:
        """Every version that the alias needs."""
        return self.split.versions() | ({self.to} if self.to is not None else set())


_NEEDED: Final = {"alias", "to", "previous", "at", "by", "why", "evidence"}


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
            yield self._move(parse_line(self.path, line))

    def last_move(self, alias: str) -> AliasMove | None:
        """None where it never moved."""
        return next((move for move in self.newest_first() if move.alias == alias), None)

    def holder(self, alias: str) -> int | None:
        """Number of the version that `alias` holds now."""
        move = self.last_move(alias)
        return move.to if move else None

    def holders(self) -> dict[str, int]:
        """Alias -> number of the version that it holds now."""
        return {alias: move.to for alias, move in self.states().items() if move.to is not None}

    def states(self) -> dict[str, AliasMove]:
        """Alias -> the move that it stands at, for each that holds a version."""
        state = {move.alias: move for move in reversed(list(self.newest_first()))}
        return {alias: move for alias, move in state.items() if move.to is not None}

    def held_before(self, alias: str) -> list[int]:
        """What `alias` held before what it holds now, the latest first, each of a stay once.

        A version that was rolled back from is not among them: rolling back twice goes two back.
        """
        moves = [move for move in reversed(list(self.newest_first())) if move.alias == alias]
        held: list[int] = []
        for move in moves:
            if move.rollback and move.to in held:
                del held[len(held) - held[::-1].index(move.to) :]
            elif move.to is not None and (not held or held[-1] != move.to):
                held.append(move.to)
        now = moves[-1].to if moves else None
        return [number for number in reversed(held) if number != now]

    def append(
        self,
        alias: str,
        to: int | None,
        *,
        by: str,
        why: str,
        evidence: dict[str, Any],
        split: Split = WHOLE,
        rollback: bool = False,
    ) -> AliasMove:
        """Let `alias` hold `to` from now on; the caller holds the model's lock.

        Raises:
            TypeError, ValueError: the evidence cannot be written as JSON; nothing is changed.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        said = asdict(split)
        move = AliasMove(
            alias, to, self.holder(alias), now, by, why, evidence, **said, rollback=rollback
        )
        append_line(self.path, asdict(move))
        return move

    def _move(self, values: dict[str, Any]) -> AliasMove:
        """The move that a line says; it may be older, or newer, than what this program writes."""
        missing = sorted(_NEEDED - values.keys())
        if missing:
            raise self._damaged(f"without {missing[0]!r}")
        known = [one for one in fields(AliasMove) if one.name in values or one.default is MISSING]
        move = AliasMove(**{one.name: values[one.name] for one in known})
        try:
            move.split.versions()
        except (TypeError, ValueError) as error:
            raise self._damaged(f"whose traffic makes no sense: {error}") from None
        return move

    def _damaged(self, fault: str) -> StoreDamaged:
        return StoreDamaged(f"{self.path.parent.name}/{self.path.name} has a line {fault}")
