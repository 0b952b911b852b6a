"""MLServer as its documentation advises: a custom runtime, with adaptive batching in its settings.

`mlserver start FOLDER`, where the folder's `model-settings.json` names one of these classes.
"""

import asyncio

import torch
from computation import Preprocessing, classify, perceptron, resnet
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class PerceptronRuntime(MLModel):
    """Takes and gives V2."""

    async def load(self) -> bool:
        """Once in each worker."""
        self.network = perceptron()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """A batch of rows to logits."""
        rows = NumpyCodec.decode_input(payload.inputs[0])
        with torch.inference_mode():
            logits = self.network(torch.from_numpy(rows)).numpy()
        output = NumpyCodec.encode_output("logits", logits)
        return InferenceResponse(model_name=self.name, outputs=[output])


class PictureRuntime(MLModel):
    """Takes pictures as V2 BYTES in base64, gives the best classes and their probabilities."""

    async def load(self) -> bool:
        """Once in each worker."""
        self.network = resnet()
        self.preprocess = Preprocessing()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """A batch of encoded pictures."""
        answers = await asyncio.to_thread(self._answer, payload)
        outputs = [
            NumpyCodec.encode_output(name, torch.tensor([one[name] for one in answers]).numpy())
            for name in ("classes", "probabilities")
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)

    def _answer(self, payload: InferenceRequest) -> list[dict[str, list]]:
        pictures = Base64Codec.decode_input(payload.inputs[0])
        return classify(self.network, torch.stack([self.preprocess(one) for one in pictures]))
