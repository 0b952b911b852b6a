"""The two numbers that choose the best weights: loss and accuracy on the validation part."""

from collections.abc import Callable, Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from training.feed import Feed
from training.order import in_turn
from training.progress import Progress

VALIDATION_BATCH = 500


def validate(
    predict: Callable[[Tensor], Tensor], feed: Feed, num_samples: int
) -> Generator[Progress, None, tuple[float, float]]:
    """Predict every sample of `feed` once.

    Args:
        predict: takes samples as the feed has them and gives logits `[n, classes]`.
        feed: of the validation part.
        num_samples: in that part.

    Yields:
        After each batch, samples done in the phase `validate`.

    Returns:
        Mean cross-entropy, without label smoothing, and accuracy.
    """
    loss, num_right, done = 0.0, 0, 0
    for _, inputs, targets in feed(in_turn(num_samples, VALIDATION_BATCH)):
        with torch.inference_mode():
            logits = predict(inputs).float()
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            num_right += int((logits.argmax(1) == targets).sum())
        done += len(targets)
        yield Progress("validate", done, num_samples)
    return loss / num_samples, num_right / num_samples
