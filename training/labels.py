"""Class names from a file, or what stands for them where there is none."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 1024 * 1024
MAX_LENGTH = 256
NUM_IMAGENET = 1000


class LabelsInvalid(Exception):
    """A file of labels cannot be read, or does not fit the network."""


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names in the order of a network's outputs.

    Args:
        path: one name a line; or, ending in `.json`, a list of names, an object from position to
            name, or one from name to position (`class_to_idx`).

    Raises:
        LabelsInvalid: unreadable, empty, or a name is missing, too long or there twice.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LabelsInvalid(f"{path} has more than {MAX_BYTES} bytes; labels are short")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LabelsInvalid(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LabelsInvalid(f"{path} is no text in UTF-8: {error.reason}") from None
    if path.suffix.lower() == ".json":
        labels = _from_json(text, path)
    else:
        labels = [line.strip() for line in text.strip().splitlines()]
    _check(labels, path)
    return tuple(labels)


def labels_for(path: Path | None, num_classes: int) -> tuple[str, ...]:
    """The labels in `path`; without one ImageNet's for 1000 classes, else the numbers from 0.

    Raises:
        LabelsInvalid: as `read_labels`, or there are not as many as classes.
    """
    if path is None and num_classes == NUM_IMAGENET:
        from models.backbones import imagenet_labels  # torchvision has them, and takes seconds

        return imagenet_labels()
    if path is None:
        return tuple(str(number) for number in range(num_classes))
    labels = read_labels(path)
    if len(labels) != num_classes:
        raise LabelsInvalid(
            f"{path} has {len(labels)} labels and the network has {num_classes} outputs"
        )
    return labels


def _from_json(text: str, path: Path) -> list[str]:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelsInvalid(f"{path} is not JSON: {error}") from None
    if isinstance(found, dict):
        found = _by_position(found, path)
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise LabelsInvalid(f"{path} must hold a list of texts, or an object with positions")
    return found


def _by_position(found: dict[str, Any], path: Path) -> list[Any]:
    """The names of an object from position to name or from name to position."""
    try:
        if all(isinstance(value, int) for value in found.values()):
            positions = {int(value): name for name, value in found.items()}
        else:
            positions = {int(position): name for position, name in found.items()}
    except ValueError:
        raise LabelsInvalid(f"{path} must map positions to names or names to positions") from None
    if sorted(positions) != list(range(len(found))):
        raise LabelsInvalid(f"{path} must have every position from 0 to {len(found) - 1} once")
    return [positions[position] for position in range(len(found))]


def _check(labels: list[str], path: Path) -> None:
    if not labels:
        raise LabelsInvalid(f"{path} holds no labels")
    first_at: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if not label or len(label) > MAX_LENGTH:
            raise LabelsInvalid(
                f"{path}: label {number} must have 1 to {MAX_LENGTH} characters, not {len(label)}"
            )
        if label in first_at:
            raise LabelsInvalid(
                f"{path}: label {number} is {label!r}, and so is label {first_at[label]}"
            )
        first_at[label] = number
