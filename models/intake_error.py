"""Why a checkpoint from a stranger is refused, by name.

IntakeRefused
  ManifestRefused    the manifest cannot be read, or says what is not possible
  NetworkRefused     its network is none that strangers may name, or refuses its options
  WeightsTooLarge    more bytes than its network can have
  HeaderInvalid      the header of a safetensors file breaks the format
  KeysMismatch       tensors are missing, or there are more than the network has
  ShapeMismatch      a tensor has another shape than the network's
  DtypeRefused       a tensor has a type that the network's cannot be made from
  OffsetsInvalid     tensors overlap, leave a hole, or do not fill the file
  MetadataRefused    the metadata of a safetensors file is too large or has a key of its own
  DigestMismatch     a file is not what its sha256 says
  NotFinite          a weight is not a finite number
  CanaryFailed       the network does not answer as the checkpoint says
  FilesUnexpected    a file that a checkpoint has is missing, or there is another one
"""


class IntakeRefused(Exception):
    """A checkpoint from a stranger cannot be taken."""


class ManifestRefused(IntakeRefused):
    """The manifest cannot be read, or says what is not possible."""


class NetworkRefused(IntakeRefused):
    """The network is none that strangers may name, or refuses its options."""


class WeightsTooLarge(IntakeRefused):
    """More bytes than the network can have."""


class HeaderInvalid(IntakeRefused):
    """The header of a safetensors file breaks the format."""


class KeysMismatch(IntakeRefused):
    """Tensors are missing, or there are more than the network has."""


class ShapeMismatch(IntakeRefused):
    """A tensor has another shape than the network's."""


class DtypeRefused(IntakeRefused):
    """A tensor has a type that the network's cannot be made from."""


class OffsetsInvalid(IntakeRefused):
    """Tensors overlap, leave a hole, or do not fill the file."""


class MetadataRefused(IntakeRefused):
    """The metadata of a safetensors file is too large or has a key of its own."""


class DigestMismatch(IntakeRefused):
    """A file is not what its sha256 says."""


class NotFinite(IntakeRefused):
    """A weight is not a finite number."""


class CanaryFailed(IntakeRefused):
    """The network does not answer as the checkpoint says."""


class FilesUnexpected(IntakeRefused):
    """A file that a checkpoint has is missing, or there is another one."""
