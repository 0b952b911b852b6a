"""What rank 0 gives to the other ranks of a run, as a folder: tensors, and the rest as JSON.

    <folder>/task.json                what to build, from which samples, with which settings
    <folder>/*.safetensors            samples in memory, weights, momenta; mapped, not copied

Nothing is pickled, as nowhere else here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import networks
from models.manifest import NetworkSpec
from models.preprocessing import Preprocessing
from training.config import FitConfig
from training.datasets import Dataset
from training.picture_files import PictureFiles
from training.samples import InMemory, Samples
from training.source import TRAIN, Part
from training.stepper import Exchange, Stepper, TrainMode
from training.transfer import train_but_norms

TRAIN_MODES: Final[Mapping[str, TrainMode]] = {
    "all": nn.Module.train,
    "all but norms": train_but_norms,
}
TASK: Final = "task.json"


class Unshareable(Exception):
    """The samples or the network cannot be given to another process."""


@dataclass(frozen=True)
class Task:
    """What a rank needs to learn.

    Attributes:
        spec: how to build the network.
        config: settings; `threads` are those of this rank.
        train_mode: one of `TRAIN_MODES`.
        scales: factors of learning rates, by parameter; 1 for those that are not named.
        step: steps that were done before.
        dataset: with its training part alone.
        weights: of the network, with its buffers.
        optimizer: its momenta.
    """

    spec: NetworkSpec
    config: FitConfig
    train_mode: str
    scales: Mapping[str, float]
    step: int
    dataset: Dataset
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]

    def write(self, folder: Path) -> None:
        """Put it into `folder`.

        Raises:
            Unshareable: the samples are neither in memory nor files of pictures.
        """
        folder.mkdir()
        samples, part = self.dataset.train.samples, self.dataset.train
        document = {
            "spec": self.spec.model_dump(mode="json"),
            "config": self.config.model_dump(mode="json", include=set(FitConfig.model_fields)),
            "train_mode": self.train_mode,
            "scales": dict(self.scales),
            "step": self.step,
            "classes": list(self.dataset.classes),
            "preprocessing": self.dataset.preprocessing.model_dump(mode="json"),
            "num_workers": self.dataset.num_workers,
            "files": _files(samples),
        }
        held = {"data": samples.data} if isinstance(samples, InMemory) else {}
        held = {name: one.contiguous() for name, one in {**held, "targets": part.targets}.items()}
        save_file(held, folder / "samples.safetensors")
        _save(folder, "weights", self.weights)
        _save(folder, "optimizer", self.optimizer)
        (folder / TASK).write_text(json.dumps(document))

    @classmethod
    def read(cls, folder: Path) -> "Task":
        """What `write` wrote."""
        document: dict[str, Any] = json.loads((folder / TASK).read_text())
        preprocessing = Preprocessing.model_validate(document["preprocessing"])
        held = load_file(folder / "samples.safetensors")
        samples: Samples
        if document["files"] is None:
            samples = InMemory(held["data"])
        else:
            root, *named = document["files"]
            paths, names, digests = (tuple(texts) for texts in named)
            samples = PictureFiles(Path(root), paths, preprocessing, names, digests)
        dataset = Dataset(
            name="of rank 0",
            classes=tuple(document["classes"]),
            preprocessing=preprocessing,
            parts={TRAIN: Part(samples, held["targets"])},
            fingerprint="",
            num_workers=document["num_workers"],
        )
        return cls(
            NetworkSpec.model_validate(document["spec"]),
            FitConfig.of(**document["config"]),
            document["train_mode"],
            document["scales"],
            document["step"],
            dataset,
            load_file(folder / "weights.safetensors"),
            load_file(folder / "optimizer.safetensors"),
        )

    def stepper(self, config: FitConfig, exchange: Exchange) -> Stepper:
        """What carries it out as `config` says, from where rank 0 is; the average is its alone."""
        network = networks.build(self.spec.name, self.spec.options)
        network.load_state_dict(dict(self.weights))
        stepper = Stepper(
            network,
            self.dataset,
            config.model_copy(update={"ema_decay": 0.0}),
            TRAIN_MODES[self.train_mode],
            lambda name: self.scales.get(name, 1.0),
            exchange,
        )
        stepper.state.optimizer.load_state(self.optimizer, self.step)
        stepper.state.step = self.step
        return stepper


def name_of_mode(mode: TrainMode) -> str:
    """Its name among `TRAIN_MODES`.

    Raises:
        Unshareable: it is none of them.
    """
    for name, known in TRAIN_MODES.items():
        if mode is known:
            return name
    raise Unshareable("a training mode of your own cannot be shared among processes")


def _files(samples: Samples) -> list[Any] | None:
    """The fields of files of pictures; None of samples that lie in memory."""
    if isinstance(samples, InMemory):
        return None
    if isinstance(samples, PictureFiles):
        root = str(samples.root.resolve())
        return [root, samples.paths, samples.names, samples.digests]
    raise Unshareable(
        "samples that fit the memory budget, or files of pictures, can be shared among processes, "
        "and these are neither: raise --memory-budget-mb, or take one process"
    )


def _save(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    plain = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    save_file(plain, folder / f"{name}.safetensors")
