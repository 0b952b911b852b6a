"""The phases of one run: features, folds, learning from all, answers."""

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from models.device import choose_device
from models.seen import DIGEST_BYTES, Seen
from training.answering import answers_to
from training.answers import Answers, digest_rows
from training.datasets import Dataset
from training.features import features_of, separate_head
from training.fit import FitResult
from training.folds import Folds
from training.learner import Learner
from training.methods import CROSS_VALIDATION, FROM_SCRATCH, LINEAR_PROBE
from training.progress import Progress
from training.source import TRAIN, Part


@dataclass
class Phases:
    """One run, phase by phase.

    Attributes:
        learner: makes networks from samples.
        dataset: opened.
        folder: of the run.
        out_of_fold: answers to the training part by networks that did not learn from them.
        last_epoch: where learning from all ends, if folds chose an epoch.
    """

    learner: Learner
    dataset: Dataset
    folder: Path
    out_of_fold: Answers | None = None
    last_epoch: int = 0
    network: nn.Module = field(init=False)
    features: Dataset | None = field(init=False, default=None)

    def prepare(self) -> Generator[Progress, None, None]:
        """The features of everything, where a head is to be learned on them."""
        request = self.learner.request
        self.network = self.learner.network()
        if request.method != FROM_SCRATCH:
            device = choose_device(request.compute.device)
            cache = self.learner.home / "cache" / "features"
            bound = request.compute.cache_mb << 20
            self.features = yield from features_of(self.network, self.dataset, device, cache, bound)

    def cross_validate(self) -> Generator[Progress, None, None]:
        """Let folds say how good the result is; or where it ends, if others say how good it is."""
        if self.learner.settings.validation != CROSS_VALIDATION:
            return
        folds = Folds(self.learner, self.dataset, self.features, self.folder)
        if self.dataset.measured_on != TRAIN and self.learner.request.method == LINEAR_PROBE:
            self.last_epoch = yield from folds.best_epoch()
            return
        logits = yield from folds.logits()
        if logits is not None:
            self.out_of_fold = self._as_answers(self.dataset.train, logits)

    def learn(self) -> Generator[Progress, None, FitResult]:
        """Let `network` learn from all of the training part."""
        fitted = yield from self.learner.learn(
            self.network, self.dataset, self.features, self.folder, self.last_epoch
        )
        self.network.to("cpu").eval()
        return fitted

    def answers(self) -> Generator[Progress, None, Answers]:
        """To the part that figures come from, or those of the folds."""
        if self.out_of_fold is not None:
            return self.out_of_fold
        name, dataset, network = self.dataset.measured_on, self.dataset, self.network
        if self.features and self.learner.request.method == LINEAR_PROBE:
            # The head on its features answers as the whole network does, for less.
            dataset, network = self.features, separate_head(network)[1]
        logits = yield from answers_to(dataset, name, network)
        return self._as_answers(self.dataset.parts[name], logits)

    def _as_answers(self, part: Part, logits: Tensor) -> Answers:
        found = part.digests or tuple(part.samples.read(i)[1] for i in range(len(part)))
        digests, learner = digest_rows(found), self.learner
        base = Seen() if learner.request.method == FROM_SCRATCH else learner.backbone.seen
        short = digests[:, :DIGEST_BYTES].contiguous()
        known = base.was_trained_on(short) | base.was_selected_on(short)
        return Answers(self.dataset.classes, digests, part.targets, logits, known)
