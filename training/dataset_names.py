"""What the parts, classes and files of a dataset are called. Imports no torch."""

import unicodedata
from collections.abc import Sequence
from typing import Any

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)
MAX_LABEL_CHARACTERS = 255
PART_FOLDERS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "test": TEST,
}
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
SKIPPED_SUFFIXES = frozenset({".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".svg", ".ico"})
"""Pictures of kinds that are not read here: left out with a word instead of refused."""
LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
"""Files and folders that systems leave behind, in lower case."""


def class_names(labels: Sequence[Any]) -> tuple[str, ...]:
    """The distinct labels in order: by value where all are whole numbers, else by their text."""
    texts = {str(label) for label in labels}
    if all(text.removeprefix("-").isdecimal() for text in texts):
        return tuple(sorted(texts, key=int))
    return tuple(sorted(texts))


def label_fault(label: str) -> str:
    """What is wrong with a label; empty where nothing is."""
    if not label or len(label) > MAX_LABEL_CHARACTERS:
        return f"a label has 1 to {MAX_LABEL_CHARACTERS} characters, not {len(label)}"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in label):
        return f"the label {ascii(label[:40])} holds control characters"
    return ""


def is_litter(name: str) -> bool:
    """Whether the path `name` leads to a hidden file, or to what a system left behind."""
    parts = name.lower().split("/")
    return any(part.startswith(".") or part in LITTER for part in parts)
