"""What the model store refuses or fails at.

StoreError
  BadName            a model's or alias's name is not one
  UnknownModel       no model goes by this name
  UnknownVersion     the model has no such version or alias
  AliasMoved         the alias does not hold the version that the caller expected
  NothingToRollBack  the alias has held no other version that is still there
  VersionInUse       an alias needs the version that was to be deleted
  RunMismatch        a checkpoint is published as the work of a run that it does not name
  StoreBusy          another process has held the model's lock for too long
  StoreDamaged       a file of the store holds a line that was never written like that
  LocksUnsupported   the disk cannot lock files, so nothing may be changed on it
"""


class StoreError(Exception):
    """The store cannot do what was asked."""


class BadName(StoreError):
    """A model's or alias's name is not one."""


class UnknownModel(StoreError):
    """No model goes by this name."""


class UnknownVersion(StoreError):
    """The model has no such version or alias."""


class AliasMoved(StoreError):
    """The alias does not hold the version that the caller expected."""


class NothingToRollBack(StoreError):
    """The alias has held no other version that is still there."""


class VersionInUse(StoreError):
    """An alias needs the version that was to be deleted."""


class RunMismatch(StoreError):
    """A checkpoint is published as the work of a run that its lineage does not name."""


class StoreBusy(StoreError):
    """Another process has held the model's lock for too long."""


class StoreDamaged(StoreError):
    """A file of the store holds a line that was never written like that."""


class LocksUnsupported(StoreError):
    """The disk cannot lock files, so nothing may be changed on it."""
