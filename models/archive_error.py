"""What is wrong with a zip file from a stranger, by name.

ArchiveError
  NotAnArchive       no zip file, or one whose directory cannot be followed
  ArchiveRefused     entries break the rules; `faults` holds all of them
    ArchiveTooLarge  of these, all are about size
  MemberDamaged      one member is not what the directory says of it, found while it is read
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_LISTED: Final = 100
MAX_SHOWN_NAME: Final = 120
_ABOUT_SIZE: Final = frozenset(
    {"bytes", "entries", "member_bytes", "total_bytes", "member_ratio", "total_ratio"}
)


class ArchiveError(Exception):
    """An archive, or a member of one, cannot be used."""


class NotAnArchive(ArchiveError):
    """No zip file, or one whose directory cannot be followed."""


@dataclass(frozen=True, slots=True)
class ArchiveFault:
    """One broken rule.

    Attributes:
        kind: for programs, such as `symlink` or `overlap`.
        name: of the member, as the archive has it; empty where the whole archive is at fault.
        sentence: for people.
    """

    kind: str
    name: str
    sentence: str

    def __str__(self) -> str:
        # Control and bidi characters in a name must not reach a terminal or a page.
        return (
            f"{ascii(self.name[:MAX_SHOWN_NAME])}: {self.sentence}" if self.name else self.sentence
        )


class ArchiveRefused(ArchiveError):
    """Entries break the rules.

    Attributes:
        faults: every broken rule.
    """

    def __init__(self, faults: Sequence[ArchiveFault]) -> None:
        self.faults = tuple(faults)
        shown = "; ".join(str(fault) for fault in self.faults[:MAX_LISTED])
        more = len(self.faults) - MAX_LISTED
        super().__init__(
            f"the archive is refused: {shown}{f'; and {more} more' if more > 0 else ''}"
        )


class ArchiveTooLarge(ArchiveRefused):
    """Larger than the limits, packed or unpacked; nothing else is wrong with it."""


class MemberDamaged(ArchiveError):
    """One member is not what the directory says of it.

    Attributes:
        name: of the member.
    """

    def __init__(self, name: str, sentence: str) -> None:
        self.name, self.sentence = name, sentence
        super().__init__(str(ArchiveFault("member", name, sentence)))


def refusal(faults: Sequence[ArchiveFault]) -> ArchiveRefused:
    """The exception that tells `faults`."""
    if all(fault.kind in _ABOUT_SIZE for fault in faults):
        return ArchiveTooLarge(faults)
    return ArchiveRefused(faults)
