"""A table of labels inside an archive: one column names the file, another the label."""

import csv
import io
from dataclasses import dataclass
from typing import Final

from training.dataset_names import PART_FOLDERS, TRAIN, label_fault
from training.faults import DatasetFaults

FILE_COLUMNS: Final = ("file", "filename", "file_name", "path", "image", "picture", "name")
LABEL_COLUMNS: Final = ("label", "class", "target", "category", "y")
PART_COLUMNS: Final = ("part", "split", "subset")
MAX_ROWS: Final = 1_000_000
MAX_FIELD_CHARACTERS: Final = 65_536


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One line."""

    line: int
    file: str
    label: str
    part: str


@dataclass(frozen=True, slots=True)
class LabelTable:
    """All lines."""

    rows: tuple[LabelRow, ...]


def read_label_table(data: bytes, name: str, label_column: str = "") -> LabelTable:
    """The table in `data`: UTF-8, with a line of column names.

    Raises:
        DatasetFaults: all that is wrong, with lines.
    """
    lines = _lines(data, name)
    columns = [cell.lower() for cell in lines[0][1]]
    file = _column(name, columns, FILE_COLUMNS, "")
    label = _column(name, columns, LABEL_COLUMNS, label_column.lower())
    part = next((columns.index(one) for one in PART_COLUMNS if one in columns), None)
    faults, rows = [], []
    for line, cells in lines[1:]:
        fault = _fault(cells, len(columns), file, label, part)
        if fault:
            faults.append(f"line {line}: {fault}")
            continue
        where = TRAIN if part is None else PART_FOLDERS[cells[part].lower()]
        rows.append(LabelRow(line, cells[file].removeprefix("./"), cells[label], where))
    if faults:
        raise DatasetFaults(name, faults)
    return LabelTable(tuple(rows))


def _lines(data: bytes, name: str) -> list[tuple[int, list[str]]]:
    """Every line that is not empty, with its number; the first holds the columns' names."""
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise DatasetFaults(name, [f"{name}: a NUL character is in it"])
        csv.field_size_limit(MAX_FIELD_CHARACTERS)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetFaults(name, [f"{name}: not a CSV file in UTF-8: {error}"]) from None
    if not 2 <= len(lines) <= MAX_ROWS:
        fault = f"{name}: a line of names and 1 to {MAX_ROWS} others are needed"
        raise DatasetFaults(name, [fault])
    return lines


def _fault(cells: list[str], width: int, file: int, label: int, part: int | None) -> str:
    if len(cells) != width:
        return f"{len(cells)} cells where {width} are wanted"
    if not cells[file] or not cells[label]:
        return "the file or the label is empty"
    if wrong := label_fault(cells[label]):
        return wrong
    if part is not None and cells[part].lower() not in PART_FOLDERS:
        return f"{cells[part][:40]!r} is none of train, validation, test"
    return ""


def _column(name: str, columns: list[str], known: tuple[str, ...], wanted: str) -> int:
    for one in (wanted,) if wanted else known:
        if one in columns:
            return columns.index(one)
    raise DatasetFaults(
        name,
        [f"{name}: no column {wanted or known[0]!r}; there are {', '.join(columns[:20])}"],
    )
