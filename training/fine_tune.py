"""Fine-tuning whole: a base, a dataset and a method become a network with its evidence.

`fine_tune` is for Python and the command line; `work` is the same with plain JSON on either side,
for a process that does nothing else. Whatever happened before in the run's folder is gone on with:
features lie in the cache, each fold and each phase has snapshots of its own, and publishing one
run twice gives the same version.
"""

import copy
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import networks
from models.backbones import load_backbone
from models.device import choose_device
from models.manifest import NetworkSpec
from models.networks import is_built_in
from models.store import ModelStore
from training.answers import FILE, Answers, digest_rows
from training.backbone import Backbone, find_backbone
from training.config import DataConfig, FitConfig, TrainConfig
from training.datasets import Dataset, open_source, read_source, source_of_pairs
from training.faults import DatasetFaults
from training.features import features_of, separate_head
from training.feed import in_batches
from training.fit import FitResult, fit, never, team_of
from training.layout import laid_out, layout_of
from training.methods import FROM_SCRATCH, LINEAR_PROBE, FineTuneRequest, Method
from training.progress import Progress, mapped
from training.publish import publish
from training.randomness import seed_for, seeded
from training.ranks import Ranks, ranks_for
from training.resolution import Choice, Facts, resolve, resolved
from training.source import TEST, TRAIN, VALIDATION, Part, Source
from training.split import fold_of_each
from training.state import environment
from training.train import Trained, network_spec
from training.transfer import scale_by_depth, train_but_norms

HEAD, ALL_LAYERS, FOLDS = "head", "all-layers", "folds"
"""Where in a run's folder the snapshots of its phases lie."""
BEGUN = "begun.json"
RESULT = "result.json"
MEASURED_BATCH = 64
SMALL_HEAD = 200_000
"""Weights of a head."""
CROSS_VALIDATION, OUT_OF_FOLD = "cross_validation", "out-of-fold"


class RunMismatch(Exception):
    """The run's folder holds another run."""


@dataclass(frozen=True)
class FineTuned:
    """How a run ended.

    Attributes:
        trained: the network and what a checkpoint should say of it.
        choices: what every `auto` became, and why.
        answers: to samples that it, or its fold's network, did not learn from; None where there
            are none.
        validation: how the figures came about and how sure they are, in words.
        notes: what else a person should know.
    """

    trained: Trained
    choices: Mapping[str, Choice]
    answers: Answers | None
    validation: str
    notes: tuple[str, ...]


def work(
    options: Mapping[str, Any],
    *,
    home: Path,
    folder: Path,
    run: str,
    by: str = "local",
    stop: Callable[[], bool] = never,
) -> Generator[Progress, None, dict[str, Any]]:
    """`fine_tune`, and the publication of its result.

    Args:
        options: fields of `training.methods.FineTuneRequest`, as JSON has them.
        home: the home folder: `models`, `weights` and `cache` are its own.
        folder: of this run; the same one after an interruption.
        run: its id, which the lineage names.
        by: who, for the history of aliases.
        stop: asked all the time; once it says yes, the run ends soon with the best it has.

    Returns:
        JSON: `version` (None where no name was given), `method`, `base`, `parent`, `metrics`,
        `report`, `measured_on`, `validation`, `resolved`, `hyperparameters`, `history`, `answers`
        (a file of the folder), `dataset`, `environment`, `notes`, `seconds`. Also in the folder,
        as `result.json`.

    Raises:
        What `fine_tune` raises; training.config.ConfigError; models.store_error.StoreError.
    """
    request = FineTuneRequest.of(**options)
    done = yield from fine_tune(request, home, folder, stop=stop)
    version = None
    if request.name is not None:
        yield Progress("publish", 0, 1)
        store = ModelStore(home / "models")
        version = str(publish(done.trained, store, request.name, run=run, by=by))
    text = json.dumps({"version": version, **summary(done)}, indent=1)
    (folder / RESULT).write_text(text + "\n")
    result: dict[str, Any] = json.loads(text)
    return result


def summary(done: FineTuned) -> dict[str, Any]:
    """What `work` answers, without the version."""
    trained = done.trained
    return {
        "method": trained.method,
        "base": trained.config.model_dump().get("base"),
        "parent": trained.parent,
        "metrics": trained.report.figures(),
        "report": trained.report.to_json(),
        "measured_on": trained.measured_on or trained.dataset.measured_on,
        "validation": done.validation,
        "resolved": {name: choice.to_json() for name, choice in done.choices.items()},
        "hyperparameters": trained.config.model_dump(mode="json").get("hyperparameters"),
        "history": [asdict(epoch) for epoch in trained.fitted.history],
        "best": asdict(trained.fitted.best),
        "answers": FILE if done.answers else None,
        "dataset": {
            "name": trained.dataset.name,
            "fingerprint": trained.dataset.fingerprint,
            "classes": list(trained.dataset.classes),
        },
        "environment": dict(trained.fitted.environment),
        "notes": list(done.notes),
        "seconds": trained.fitted.seconds,
    }


def fine_tune(
    request: FineTuneRequest,
    home: Path,
    folder: Path,
    *,
    stop: Callable[[], bool] = never,
    on_resolved: Callable[[Mapping[str, Choice]], None] = lambda _: None,
    backbone: Backbone | None = None,
    pairs: Any = None,
    ranks: Ranks | None = None,
) -> Generator[Progress, None, FineTuned]:
    """Make what `request` asks for.

    Args:
        request: base, dataset, method and settings.
        home: where the store and the cache are.
        folder: of this run.
        stop: see `work`.
        on_resolved: told what every `auto` became, before anything is learned.
        backbone: the base itself, instead of its name.
        pairs: the dataset from Python, instead of its name.
        ranks: processes that share the steps of all layers; started as `request.compute` says
            where there are none. Features and the last layer alone are this process's.

    Yields:
        Phases `read`, `features`, `cross-validate`, `train`, `validate`, `epoch`, `evaluate`.

    Raises:
        training.backbone.BaseUnknown, RunMismatch, and what opening, features and fitting raise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_processes = request.compute.num_processes
    with _as_begun(request, folder) as notes, ranks_for(num_processes, ranks) as shared:
        backbone = backbone or asked_backbone(request, home)
        source = asked_source(request, pairs)
        facts = facts_of(source, backbone)
        choices = resolve(request.method, request.settings, facts)
        on_resolved(choices)
        settings = resolved(request.settings, choices)
        dataset = yield from open_source(source, _data(request, settings), backbone.preprocessing)
        learning = _Learning(request, settings, backbone, dataset, home, stop, shared)
        run = _Run(learning, dataset, folder)
        yield from run.prepare()
        answers = yield from run.cross_validated() if _crosses(settings) else _nothing()
        trained = yield from run.learned()
        answers = answers or (yield from run.answers())
        trained = yield from run.measured(trained, answers)
    if answers:
        answers.save(folder)
    said = (*backbone.notes, *dataset.notes, *trained.fitted.notes, *learning.notes, *notes)
    return FineTuned(trained, choices, answers, _sentence(trained, settings, answers), said)


def facts_of(source: Source, backbone: Backbone) -> Facts:
    """What the choices depend on."""
    look = source.parts[TRAIN].samples.look()
    takes = backbone.preprocessing
    channels = look.shape[0] if look.pictures else 0
    if takes is not None:
        channels = takes.raw_shape[0] if takes.accepts_pictures else 0
    counts = source.parts[TRAIN].targets.bincount(minlength=len(source.classes))
    return Facts(
        tuple(counts.tolist()),
        channels,
        VALIDATION in source.parts,
        backbone.labels == source.classes,
    )


@dataclass
class _Learning:
    """How a network is made from samples: the same for each fold and for the whole."""

    request: FineTuneRequest
    settings: Any
    backbone: Backbone
    dataset: Dataset
    home: Path
    stop: Callable[[], bool]
    ranks: Ranks | None = None
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> NetworkSpec:
        """The network with as many outputs as the dataset has classes."""
        if not self.backbone.state and self.request.method == FROM_SCRATCH:
            config = TrainConfig.of(network=self.backbone.spec.name)
            return network_spec(config, self.dataset)
        if self._keeps_head:
            return self.backbone.spec
        return self.backbone.spec_for(len(self.dataset.classes))

    def network(self) -> nn.Module:
        """Before any step."""
        spec = self.spec
        with seeded(seed_for(self.request.seed, "weights")):
            network = networks.build(spec.name, spec.options)
        if self.request.method == FROM_SCRATCH:
            return network
        if self._keeps_head:
            network.load_state_dict(dict(self.backbone.state))
            self.notes = ("the last layer begins as the base has it",)
        else:
            load_backbone(network, self.backbone.state)
        return network

    def learn(
        self, network: nn.Module, dataset: Dataset, features: Dataset | None, folder: Path
    ) -> Generator[Progress, None, FitResult]:
        """Train `network`, of which the head comes first where there are features."""
        if features is None:
            loop = fit(
                network,
                dataset,
                self.config(),
                snapshots=folder / ALL_LAYERS,
                stop=self.stop,
                team=team_of(self.ranks, self.spec),
            )
            return (yield from loop)
        head = separate_head(network)[1]
        ended = self.request.method == LINEAR_PROBE
        prefix = "" if ended else "head_"
        first = yield from fit(
            head,
            features,
            self.config(prefix, augment="none", **_threads_for(head)),
            snapshots=folder / HEAD,
            stop=self.stop if ended else never,
        )
        if ended:
            return first
        return (yield from self._all_layers(network, dataset, first, folder))

    def _all_layers(
        self, network: nn.Module, dataset: Dataset, first: FitResult, folder: Path
    ) -> Generator[Progress, None, FitResult]:
        """Let all layers learn; if that made validation worse, go back to the head alone."""
        before = copy.deepcopy(network.state_dict())
        frozen = self.settings.batch_norms == "frozen"
        loop = fit(
            network,
            dataset,
            self.config(),
            snapshots=folder / ALL_LAYERS,
            train_mode=train_but_norms if frozen else nn.Module.train,
            scale_of=scale_by_depth(network, self.settings.layer_factor),
            stop=self.stop,
            team=team_of(self.ranks, self.spec),
        )
        second = yield from mapped(loop, _counted_from(first, self.settings.epochs))
        if dataset.validation and first.best.merit >= second.best.merit:
            network.load_state_dict(before)
            self.notes = (
                *self.notes,
                "the last layer alone did better, so all others are as before",
            )
            return first
        return replace(second, seconds=first.seconds + second.seconds)

    def config(self, prefix: str = "", **changes: Any) -> FitConfig:
        """Settings of one loop; those of the head have a prefix in `fine_tune`."""
        names = FitConfig.model_fields
        given = {n: v for n, v in self.settings.model_dump().items() if n in names}
        compute = self.request.compute.model_dump()
        given |= {name: value for name, value in compute.items() if name in names}
        for name in ("epochs", "batch_size", "learning_rate"):
            given[name] = getattr(self.settings, prefix + name)
        if prefix or self.request.method == LINEAR_PROBE:
            changes |= {"mixup": 0.0, "cutmix": 0.0}
        return FitConfig.of(**{**given, "seed": self.request.seed, **changes})

    @property
    def _keeps_head(self) -> bool:
        return getattr(self.settings, "head", "new") == "keep" and self.backbone.labels is not None


@dataclass
class _Run:
    """The phases of one run."""

    learning: _Learning
    dataset: Dataset
    folder: Path
    features: Dataset | None = None
    network: nn.Module | None = None

    def prepare(self) -> Generator[Progress, None, None]:
        """The features of everything, where a head is to be learned on them."""
        request = self.learning.request
        self.network = self.learning.network()
        if request.method != FROM_SCRATCH:
            device = choose_device(request.compute.device)
            cache = self.learning.home / "cache" / "features"
            bound = request.compute.cache_mb << 20
            self.features = yield from features_of(self.network, self.dataset, device, cache, bound)

    def cross_validated(self) -> Generator[Progress, None, Answers | None]:
        """Every training sample answered by a network that did not learn from it."""
        settings, part = self.learning.settings, self.dataset.train
        folds = fold_of_each(part.targets, settings.folds, settings.split_seed)
        logits = torch.empty(len(part), len(self.dataset.classes))
        for fold in range(settings.folds):
            if self.learning.stop():
                return None
            kept, held = (torch.nonzero(folds != fold), torch.nonzero(folds == fold))
            loop = self._fold(fold, kept.flatten(), held.flatten())
            logits[held.flatten()] = yield from mapped(loop, _of_fold(fold, settings.folds))
        return self._as_answers(part, logits)

    def learned(self) -> Generator[Progress, None, Trained]:
        """The network that learns from all of the training part; not measured yet."""
        learning, network = self.learning, self.network
        if network is None:
            raise RuntimeError("a run learns once it is prepared")
        fitted = yield from learning.learn(network, self.dataset, self.features, self.folder)
        request = learning.request
        hyperparameters = learning.settings.model_dump(mode="json")
        shown = {"dataset": self.dataset.name, "hyperparameters": hyperparameters, "weights": None}
        network.to("cpu").eval()
        return Trained(
            learning.spec,
            network,
            self.dataset,
            request.model_copy(update=shown),
            fitted,
            None,  # type: ignore[arg-type]
            request.method,
            learning.backbone.parent if request.method != FROM_SCRATCH else None,
        )

    def answers(self) -> Generator[Progress, None, Answers | None]:
        """To the part that figures come from, if it was not learned from."""
        name = self.dataset.measured_on
        if name == TRAIN:
            return None
        logits = yield from self._answered(self.network, self.dataset, name)
        return self._as_answers(self.dataset.parts[name], logits)

    def measured(
        self, trained: Trained, answers: Answers | None
    ) -> Generator[Progress, None, Trained]:
        """With the report, of the test part if there is one."""
        crossed = answers is not None and self.dataset.measured_on == TRAIN
        if answers is None:
            logits = yield from self._answered(self.network, self.dataset, TRAIN)
            answers = self._as_answers(self.dataset.train, logits)
        elif self.dataset.measured_on == TEST and len(answers.targets) != len(
            self.dataset.parts[TEST]
        ):
            logits = yield from self._answered(self.network, self.dataset, TEST)
            answers = self._as_answers(self.dataset.parts[TEST], logits)
        return replace(
            trained, report=answers.report(), measured_on=OUT_OF_FOLD if crossed else None
        )

    def _fold(self, fold: int, kept: Tensor, held: Tensor) -> Generator[Progress, None, Tensor]:
        network, folder = self.learning.network(), self.folder / FOLDS / str(fold)
        whole, features = self.dataset, self.features
        yield from self.learning.learn(
            network, _only(whole, kept), _only(features, kept) if features else None, folder
        )
        answering = replace(whole, parts={TRAIN: whole.train.select(held)})
        if features and self.learning.request.method == LINEAR_PROBE:
            network = separate_head(network)[1]
            answering = replace(features, parts={TRAIN: features.train.select(held)})
        return (yield from _logits(network, answering, TRAIN))

    def _answered(
        self, network: nn.Module | None, dataset: Dataset, name: str
    ) -> Generator[Progress, None, Tensor]:
        """Of the whole network; by its head where that gives the same for less."""
        if network is None:
            raise RuntimeError("a run answers once it has learned")
        if self.features and self.learning.request.method == LINEAR_PROBE:
            network, dataset = separate_head(network)[1], self.features
        return (yield from _logits(network, dataset, name))

    def _as_answers(self, part: Part, logits: Tensor) -> Answers:
        digests = part.digests or tuple(part.samples.read(i)[1] for i in range(len(part)))
        return Answers(self.dataset.classes, digest_rows(digests), part.targets, logits)


def asked_backbone(request: FineTuneRequest, home: Path) -> Backbone:
    """The base that the request names; for fresh weights it may be a network alone."""
    is_name = is_built_in(request.base) and not ModelStore(home / "models").names().count(
        request.base
    )
    if request.method == FROM_SCRATCH and is_name:
        return Backbone.of_name(request.base)
    return find_backbone(request.base, home, request.weights)


def asked_source(request: FineTuneRequest, pairs: Any = None) -> Source:
    """The dataset, with the other one as its validation part."""
    if pairs is not None:
        return source_of_pairs(pairs)
    config = DataConfig.of(
        dataset=request.dataset, data_root=request.data_root, label_column=request.label_column
    )
    source = read_source(config)
    if request.validation_dataset is None:
        return source
    other = read_source(config.model_copy(update={"dataset": request.validation_dataset}))
    part = next(other.parts[name] for name in (VALIDATION, TEST, TRAIN) if name in other.parts)
    unknown = [name for name in other.classes if name not in source.classes]
    if unknown:
        fault = f"classes {', '.join(unknown[:10])} are not in the training dataset"
        raise DatasetFaults(other.name, [fault])
    positions = torch.tensor([source.classes.index(name) for name in other.classes])
    held = Part(part.samples, positions[part.targets])
    return replace(source, parts={**source.parts, VALIDATION: held})


def _data(request: FineTuneRequest, settings: Method) -> DataConfig:
    """Nothing is held out but by a split."""
    splits = settings.validation == "split"
    return DataConfig.of(
        dataset=request.dataset,
        picture_size=request.picture_size,
        validation_fraction=settings.validation_fraction if splits else 0.0,
        test_fraction=settings.test_fraction if splits else 0.0,
        split_seed=settings.split_seed,
        memory_budget_mb=request.compute.memory_budget_mb,
        num_workers=request.compute.num_workers,
    )


@contextmanager
def _as_begun(request: FineTuneRequest, folder: Path) -> Iterator[list[str]]:
    """With the threads that the run began with; gives notes on what is different now.

    Raises:
        RunMismatch: the folder holds a run with other settings.
    """
    before, path, notes = torch.get_num_threads(), folder / BEGUN, []
    asked = request.model_dump(mode="json", exclude={"compute", "dataset", "validation_dataset"})
    begun = json.loads(path.read_text()) if path.exists() else None
    if begun and begun["request"] != asked:
        raise RunMismatch(
            "the folder holds a run with other settings; begin anew in another folder"
        )
    torch.set_num_threads(
        request.compute.threads or (int(begun["environment"]["threads"]) if begun else before)
    )
    try:
        now = environment()
        if begun is None:
            staging = path.with_suffix(".writing")
            staging.write_text(json.dumps({"request": asked, "environment": now}, indent=1))
            staging.replace(path)
        else:
            notes = [
                f"begun with {name} {then} and ended with {now.get(name)}: the bits may differ "
                "from those of a run that stayed where it was"
                for name, then in begun["environment"].items()
                if now.get(name) != then
            ]
        yield notes
    finally:
        torch.set_num_threads(before)


def _logits(network: nn.Module, dataset: Dataset, name: str) -> Generator[Progress, None, Tensor]:
    """Answers to one part, in its order: float32 `[N, classes]`, computed on the CPU."""
    part, layout, rows = dataset.parts[name], layout_of(network), []
    network.to("cpu").to(memory_format=layout).eval()
    done = 0
    for x, _ in in_batches(part, dataset.preprocessing.finish, MEASURED_BATCH, dataset.num_workers):
        with torch.inference_mode():
            rows.append(network(laid_out(x, layout)).float())
        done += len(x)
        yield Progress("evaluate", done, len(part))
    return torch.cat(rows).clone()


def _only(dataset: Dataset, indices: Tensor) -> Dataset:
    """Some of the training samples and nothing else."""
    return replace(dataset, parts={TRAIN: dataset.train.select(indices)})


def _threads_for(head: nn.Module) -> dict[str, int]:
    """One thread for a small head: sharing its steps costs more than it brings."""
    size = sum(parameter.numel() for parameter in head.parameters())
    return {"threads": 1} if size < SMALL_HEAD else {}


def _nothing() -> Generator[Progress, None, None]:
    yield from ()


def _crosses(settings: Method) -> bool:
    return settings.validation == CROSS_VALIDATION


def _of_fold(fold: int, num_folds: int) -> Callable[[Progress], Progress]:
    """Whatever a fold says is a sign of life of the cross-validation."""

    def changed(progress: Progress) -> Progress:
        loss = progress.loss if progress.phase == "train" else None
        return Progress("cross-validate", fold, num_folds, loss=loss)

    return changed


def _counted_from(first: FitResult, epochs: int) -> Callable[[Progress], Progress]:
    """Steps and epochs of a second loop as those of one run that began with the head."""
    steps, before = first.history[-1].step, len(first.history)

    def counted(progress: Progress) -> Progress:
        if progress.phase not in ("train", "epoch"):
            return progress
        return replace(
            progress,
            step=progress.step + steps,
            num_steps=progress.num_steps + steps,
            epoch=progress.epoch + before,
            num_epochs=epochs + before,
        )

    return counted


def _sentence(trained: Trained, settings: Any, answers: Answers | None) -> str:
    report, low, high = trained.report, *trained.report.accuracy_interval
    sure = f"between {low:.1%} and {high:.1%} with 95 % confidence"
    figure = f"{report.accuracy:.1%} of {report.num_samples} samples right, {sure}"
    if answers is None:
        return f"{figure}; but it learned from these very samples, so this says little"
    if trained.measured_on == OUT_OF_FOLD:
        return (
            f"{figure}: cross-validated in {settings.folds} stratified folds, each answered by a "
            "network that did not learn from it; the published one learned from all samples"
        )
    return (
        f"{figure}: measured on the {trained.dataset.measured_on} part, which it did not learn from"
    )
