"""The two models of the scenarios asked with tensors: what is sent leaves nothing to decode."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks import payload
from benchmarks.networks import PERCEPTRON, RESNET, publish_perceptrons, publish_resnet
from benchmarks.payload import Payload
from models.store import ModelStore


@dataclass(frozen=True, slots=True)
class TensorScenario:
    """A model and a row for it.

    Attributes:
        model: its name in the store.
        shape: of a row.
        publish: into a store.
        busy: connections that keep its server busy.
    """

    model: str
    shape: tuple[int, ...]
    publish: Callable[[ModelStore], None]
    busy: int

    def row(self) -> np.ndarray:
        """float32 `[1, *shape]`."""
        return np.random.default_rng(0).random((1, *self.shape)).astype(np.float32)

    def sent(self) -> Payload:
        """The row as a binary tensor of the Open Inference Protocol."""
        return payload.v2_binary(self.model, self.row())


def _publish_perceptron(store: ModelStore) -> None:
    publish_perceptrons(store, [PERCEPTRON])


SCENARIOS: Final[Mapping[str, TensorScenario]] = {
    "P": TensorScenario(PERCEPTRON, (784,), _publish_perceptron, 32),
    "R": TensorScenario(RESNET, (3, 224, 224), publish_resnet, 16),
}
