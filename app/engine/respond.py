"""From a batch to its answers: finish the inputs, forward, softmax, the best labels.

On a processor it runs as it is called. On a device that computes by itself all of it, normalisation
too, is one piece of work, which is recorded and replayed.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from app.engine.batch import Run
from app.engine.loading import LoadedVersion
from app.engine.pipeline import Accelerator, Pipeline
from app.engine.recording import Respond

# So many labels are picked with the batch, the best first; whoever wants more picks them himself.
NUM_BEST: Final = 5
# On a processor, among fewer than these it costs a batch more than it spares its requests.
MANY_LABELS: Final = 100


def run_of(loaded: LoadedVersion) -> Run:
    """On a processor: finished inputs, float32 `[n, *input_shape]`, to logits, probabilities, and
    the best of many labels.
    """
    answer = _answered(loaded)
    return _with_best(answer) if len(loaded.manifest.labels) >= MANY_LABELS else answer


def pipeline_of(loaded: LoadedVersion, accelerator: Accelerator) -> Pipeline:
    """On an accelerator: the same, and the best labels."""
    return Pipeline(_with_best(_answered(loaded)), accelerator)


def pixel_pipeline_of(loaded: LoadedVersion, accelerator: Accelerator) -> Pipeline:
    """On an accelerator: pictures as bytes, uint8 `[n, *raw_shape]`, which it finishes itself."""
    finish = loaded.manifest.preprocessing.finisher(accelerator.device)
    answer = _with_best(_answered(loaded))
    return Pipeline(lambda pixels: answer(finish(pixels)), accelerator)


def _answered(loaded: LoadedVersion) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """The manifest's temperature sharpens or softens probabilities, and leaves logits alone."""
    execution, temperature = loaded.execution, loaded.manifest.temperature or 1.0

    def answer(batch: Tensor) -> dict[str, Tensor]:
        logits = execution(batch)
        scaled = logits if temperature == 1.0 else logits / temperature
        return {"logits": logits, "probabilities": torch.softmax(scaled, 1)}

    return answer


def _with_best(answer: Respond) -> Respond:
    def respond(batch: Tensor) -> dict[str, Tensor]:
        outputs = dict(answer(batch))
        probabilities = outputs["probabilities"]
        best = probabilities.topk(min(NUM_BEST, probabilities.shape[1]), dim=1)
        return {**outputs, "best_values": best.values, "best_labels": best.indices}

    return respond
