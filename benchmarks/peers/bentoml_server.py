"""BentoML as its documentation advises: a service with a batchable method.

`bentoml serve bentoml_server:Perceptron` or `bentoml_server:Pictures`
"""

from typing import Annotated

import bentoml
import numpy as np
import torch
from bentoml.validators import DType, Shape
from computation import Preprocessing, classify, perceptron, resnet
from PIL.Image import Image

OPTIONS = {
    "workers": 1,
    "traffic": {"timeout": 120},
    "logging": {"access": {"enabled": False}},
}
Rows = Annotated[np.ndarray, Shape((-1, 784)), DType("float32")]


@bentoml.service(**OPTIONS)
class Perceptron:
    """Takes `{"rows": [[...]]}`, answers `[[...]]`."""

    def __init__(self) -> None:
        self.network = perceptron()

    @bentoml.api(batchable=True, max_batch_size=32)
    @torch.inference_mode()
    def predict(self, rows: Rows) -> np.ndarray:
        """A batch of rows to logits."""
        return self.network(torch.from_numpy(rows)).numpy()


@bentoml.service(**OPTIONS)
class Pictures:
    """Takes a form with files `pictures`."""

    def __init__(self) -> None:
        self.network = resnet()
        self.preprocess = Preprocessing()

    @bentoml.api(batchable=True, max_batch_size=8)
    def predict(self, pictures: list[Image]) -> list[dict]:
        """A batch of decoded pictures to their best classes."""
        return classify(self.network, torch.stack([self.preprocess(one) for one in pictures]))
