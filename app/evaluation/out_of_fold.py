"""Out-of-fold answers in the place of a version's own, where it learned from the samples.

A version that learned from all of a small dataset leaves nothing to measure it on. Networks that
learned by the same recipe from four fifths of it have answered the last fifth each, and what they
answered is honest evidence of what the recipe is worth.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.seen import DIGEST_BYTES, Seen
from training.answers import FILE, Answers


class OutOfFold:
    """The answers of one run's folds, by sample.

    Args:
        answers: those to samples that the base had seen are passed over.
        labels: of the version that they stand for; answers with others are none.
    """

    def __init__(self, answers: Answers | None, labels: tuple[str, ...]) -> None:
        self._rows: dict[bytes, int] = {}
        self._row_of: dict[int, int] = {}
        if answers is None or answers.classes != labels:
            return
        self._logits = answers.logits
        short = answers.digests[:, :DIGEST_BYTES].numpy()
        for row in torch.nonzero(~answers.seen).flatten().tolist():
            self._rows[short[row].tobytes()] = row

    @classmethod
    def of_run(cls, run: Path | None, labels: tuple[str, ...]) -> "OutOfFold":
        """What the folder of a run holds; nothing where it holds none."""
        is_there = run is not None and (run / FILE).is_file()
        return cls(Answers.load(run) if run and is_there else None, labels)

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def num_used(self) -> int:
        """Samples that were met and have such an answer."""
        return len(self._row_of)

    def without(self, seen: Seen) -> Seen:
        """`seen`, less the samples that have an answer here."""
        if not self._rows:
            return seen
        known = torch.frombuffer(bytearray(b"".join(self._rows)), dtype=torch.uint8)
        known = known.view(-1, DIGEST_BYTES)
        return seen.without(known)

    def meet(self, indices: Tensor, digests: Tensor | None) -> None:
        """Note which samples these are, int64 `[n]` with uint8 `[n, 16]`."""
        if digests is None or not self._rows:
            return
        for index, digest in zip(indices.tolist(), digests.numpy(), strict=True):
            if (row := self._rows.get(digest.tobytes())) is not None:
                self._row_of[index] = row

    def covers(self, indices: Tensor) -> bool:
        """Whether all of these samples have an answer, so that nobody need be asked."""
        return all(index in self._row_of for index in indices.tolist())

    def put_into(self, logits: Tensor | None, indices: Tensor) -> Tensor:
        """The answers to these samples, `[n, classes]`: from here where there is one.

        Args:
            logits: the version's own; None where all are here.
            indices: int64 `[n]`.
        """
        rows = [self._row_of.get(index, -1) for index in indices.tolist()]
        if logits is None:
            return self._logits[rows]
        places = [place for place, row in enumerate(rows) if row >= 0]
        if not places:
            return logits
        replaced = logits.clone()
        replaced[places] = self._logits[[rows[place] for place in places]].to(logits.dtype)
        return replaced
