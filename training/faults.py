"""What can be wrong with a dataset: everything at once, with names."""

from collections.abc import Sequence

MAX_LISTED = 100


class DatasetError(Exception):
    """A dataset cannot be used."""


class DatasetUnavailable(DatasetError):
    """The dataset is not here and cannot be fetched."""


class DatasetFaults(DatasetError):
    """Samples, classes or files are wrong.

    Attributes:
        faults: one sentence each, beginning with the file, line or item at fault.
    """

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        shown = "\n".join(f"  {fault}" for fault in self.faults[:MAX_LISTED])
        more = len(self.faults) - MAX_LISTED
        tail = f"\n  and {more} more" if more > 0 else ""
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
        super().__init__(f"the dataset {source} has {count}:\n{shown}{tail}")
