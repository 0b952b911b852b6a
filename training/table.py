"""CSV files: one column holds the label, the others numbers, or one column a picture's path."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from training.faults import DatasetFaults
from training.picture_files import PictureFiles
from training.samples import InMemory, Samples
from training.source import TRAIN, Part, Source, class_names, targets_of

MAX_FAULTS = 10_000
"""Of each kind; a table of words has one in every cell."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class _Table:
    columns: list[str]
    rows: list[tuple[int, list[str]]]  # with the line that each ends on
    label: int


def read_csv(
    path: Path, label_column: str = "", *, only_numbers: bool = False, max_rows: int | None = None
) -> Source:
    """The rows of `path`.

    Args:
        path: UTF-8 text, separated by commas; with or without a line of column names.
        label_column: the column that holds the label, by name or by position from 1; the last
            one if empty.
        only_numbers: whether no cell may be looked for as a file.
        max_rows: with the one of names; more are refused before they take memory.

    Raises:
        DatasetFaults: ragged rows, cells that are no numbers, missing labels or files, all of
            them with their lines.
    """
    table = _table(path, label_column, only_numbers, max_rows)
    faults = list(islice(_all_row_faults(table), MAX_FAULTS))
    good = [cells for _, cells in table.rows if len(cells) == len(table.columns)]
    if not good:
        faults.append(f"{path.name}: there are no rows")
    others = [index for index in range(len(table.columns)) if index != table.label]
    one_column = len(others) == 1 and bool(good) and not only_numbers
    are_paths = one_column and not _is_number(good[0][others[0]])
    found = _path_faults(path, table, others) if are_paths else _number_faults(table, others)
    faults += islice(found, MAX_FAULTS)
    if faults:
        raise DatasetFaults(str(path), sorted(set(faults), key=_line))
    labels = [cells[table.label].strip() for cells in good]
    classes = class_names(labels)
    samples = _samples(path, [[cells[index] for index in others] for cells in good], are_paths)
    return Source(path.stem, classes, {TRAIN: Part(samples, targets_of(labels, classes))})


def _all_row_faults(table: _Table) -> Iterator[str]:
    for row in table.rows:
        yield from _row_faults(table, *row)


def _table(path: Path, label_column: str, only_numbers: bool, max_rows: int | None) -> _Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            found = ((reader.line_num, row) for row in reader if row)
            rows = list(islice(found, None if max_rows is None else max_rows + 1))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetFaults(str(path), [f"{path.name}: not a CSV file in UTF-8: {error}"]) from None
    if not rows:
        raise DatasetFaults(str(path), [f"{path.name}: there are no rows"])
    if max_rows is not None and len(rows) > max_rows:
        raise DatasetFaults(str(path), [f"{path.name}: more than {max_rows} rows"])
    first = rows[0][1]
    root = None if only_numbers else path.parent.resolve()
    has_header = label_column in first or (len(rows) > 1 and _names_columns(root, first))
    columns = [cell.strip() for cell in first] if has_header else _numbered(len(first))
    if len(columns) < 2:
        raise DatasetFaults(str(path), [f"{path.name}: a label and another column are needed"])
    label = _label_position(path, columns, label_column)
    return _Table(columns, rows[1:] if has_header else rows, label)


def _names_columns(root: Path | None, cells: Sequence[str]) -> bool:
    """Whether a first line can only be names: no number in it, and no path of a file in `root`."""
    return not any(_is_number(cell) or (root and _is_file(root, cell)) for cell in cells)


def _is_file(root: Path, cell: str) -> bool:
    """Whether `cell` leads to a file below `root`."""
    try:
        file = (root / cell.strip()).resolve()
        return file.is_relative_to(root) and file.is_file()
    except (OSError, ValueError):  # no path at all: too long, or with a NUL in it
        return False


def _numbered(count: int) -> list[str]:
    return [str(position) for position in range(1, count + 1)]


def _label_position(path: Path, columns: Sequence[str], wanted: str) -> int:
    if not wanted:
        return len(columns) - 1
    if wanted in columns:
        return list(columns).index(wanted)
    fault = f"{path.name}: no column {wanted!r}; there are {', '.join(columns)}"
    raise DatasetFaults(str(path), [fault])


def _row_faults(table: _Table, line: int, cells: list[str]) -> list[str]:
    wanted = len(table.columns)
    if len(cells) != wanted:
        return [f"line {line}: {len(cells)} cells where {wanted} are wanted"]
    if not cells[table.label].strip():
        return [f"line {line}: the label in column {table.columns[table.label]} is empty"]
    return []


def _number_faults(table: _Table, others: Sequence[int]) -> Iterator[str]:
    return (
        f"line {line}, column {table.columns[index][:40]}: "
        f"{cells[index][:40]!r} is not a finite number"
        for line, cells in table.rows
        if len(cells) == len(table.columns)
        for index in others
        if not _is_number(cells[index])
    )


def _path_faults(path: Path, table: _Table, others: Sequence[int]) -> Iterator[str]:
    root = path.parent.resolve()
    for line, cells in table.rows:
        if len(cells) == len(table.columns) and not _is_file(root, cells[others[0]]):
            yield f"line {line}: no file {cells[others[0]][:200]!r} beside the CSV"


def _samples(path: Path, rows: list[list[str]], are_paths: bool) -> Samples:
    if are_paths:
        return PictureFiles(path.parent, tuple(row[0].strip() for row in rows))
    return InMemory(torch.from_numpy(np.array(rows, dtype=np.float32)))


def _is_number(cell: str) -> bool:
    try:
        return "_" not in cell and abs(float(cell)) <= _LARGEST
    except ValueError:
        return False


def _line(fault: str) -> tuple[int, str]:
    number = fault.removeprefix("line ").split(":")[0].split(",")[0]
    return (int(number) if number.isdigit() else 0, fault)
