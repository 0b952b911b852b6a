"""Cross-validation: every training sample is held out once, by a network that learns from the rest.

Either its answers are the evidence, or its curve says after which epoch to stop.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from training.answering import answers_to
from training.datasets import Dataset
from training.features import separate_head
from training.fit import FitResult
from training.learner import Learner
from training.methods import LINEAR_PROBE
from training.progress import Progress, mapped
from training.source import TRAIN, VALIDATION, Part
from training.split import fold_of_each
from training.state import Epoch

FOLDS: Final = "folds"
"""Where in a run's folder the folds lie."""


@dataclass(frozen=True)
class Folds:
    """The folds of one run.

    Attributes:
        learner: makes a network of each.
        dataset: its training part is dealt out.
        features: of the same samples, where a head comes first.
        folder: of the run.
    """

    learner: Learner
    dataset: Dataset
    features: Dataset | None
    folder: Path

    def logits(self) -> Generator[Progress, None, Tensor | None]:
        """The last epoch's answers to every training sample, each by the fold that held it out.

        Returns:
            float32 `[N, classes]`; None if the run was told to stop before all was answered.
        """
        found = torch.empty(len(self.dataset.train), len(self.dataset.classes))
        for fold, kept, held in self._dealt():
            if self.learner.stop():
                return None
            found[held] = yield from mapped(self._answered(fold, kept, held), self._sign(fold))
        return found

    def best_epoch(self) -> Generator[Progress, None, int]:
        """The epoch after which all folds together answered best what they had not learned from.

        Returns:
            Counted from 1; 0 if the run was told to stop before all was answered.
        """
        curves: list[tuple[int, Sequence[Epoch]]] = []
        for fold, kept, held in self._dealt():
            if self.learner.stop():
                return 0
            fitted = yield from mapped(self._fitted(fold, kept, held)[1], self._sign(fold))
            curves.append((len(held), fitted.history))
        return best_of(curves)

    def _dealt(self) -> Generator[tuple[int, Tensor, Tensor], None, None]:
        """Fold, indices that are learned, indices that are held out."""
        folds = folds_of(self.dataset.train, self._num, self.learner.settings.split_seed)
        for fold in range(self._num):
            yield (
                fold,
                torch.nonzero(folds != fold).flatten(),
                torch.nonzero(folds == fold).flatten(),
            )

    def _answered(self, fold: int, kept: Tensor, held: Tensor) -> Generator[Progress, None, Tensor]:
        network, loop = self._fitted(fold, kept, None)
        yield from loop
        answering = replace(self.dataset, parts={TRAIN: self.dataset.train.select(held)})
        if self.features and self.learner.request.method == LINEAR_PROBE:
            network = separate_head(network)[1]
            answering = replace(self.features, parts={TRAIN: self.features.train.select(held)})
        return (yield from answers_to(answering, TRAIN, network))

    def _fitted(
        self, fold: int, kept: Tensor, held: Tensor | None
    ) -> tuple[nn.Module, Generator[Progress, None, FitResult]]:
        network, folder = self.learner.network(), self.folder / FOLDS / str(fold)
        features = _parted(self.features, kept, held) if self.features else None
        dataset = _parted(self.dataset, kept, held)
        return network, self.learner.learn(network, dataset, features, folder)

    def _sign(self, fold: int) -> Callable[[Progress], Progress]:
        """Whatever a fold says is a sign of life of the cross-validation."""

        def changed(progress: Progress) -> Progress:
            loss = progress.loss if progress.phase == "train" else None
            return Progress("cross-validate", fold, self._num, loss=loss)

        return changed

    @property
    def _num(self) -> int:
        return int(self.learner.settings.folds)


def folds_of(part: Part, num_folds: int, seed: int) -> Tensor:
    """Which fold holds each sample out, int64 `[N]`; the same picture twice is held out once."""
    folds, first = fold_of_each(part.targets, num_folds, seed), dict[bytes, int]()
    pairs = zip(part.digests, folds.tolist(), strict=True) if part.digests else ()
    same = [first.setdefault(digest, fold) for digest, fold in pairs]
    return torch.tensor(same, dtype=torch.int64) if same else folds


def best_of(curves: Sequence[tuple[int, Sequence[Epoch]]]) -> int:
    """The best epoch by accuracy, then by loss, over samples of all curves; 0 where there is none.

    Args:
        curves: samples held out, and what they gave after each epoch.
    """
    total = sum(num for num, _ in curves)

    def merit(number: int) -> tuple[float, float]:
        merits = [(num, history[number].merit) for num, history in curves]
        accuracy, loss = (sum(num * merit[at] for num, merit in merits) / total for at in (0, 1))
        return round(accuracy, 12), loss

    num_epochs = min((len(history) for _, history in curves), default=0)
    return 1 + max(range(num_epochs), key=merit, default=-1)


def _parted(dataset: Dataset, kept: Tensor, held: Tensor | None) -> Dataset:
    """Some of the training samples, and others to watch by."""
    parts = {TRAIN: dataset.train.select(kept)}
    if held is not None:
        parts[VALIDATION] = dataset.train.select(held)
    return replace(dataset, parts=parts)
