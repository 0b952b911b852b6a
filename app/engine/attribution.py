"""Why this answer? Attributions by Captum, in pieces no longer than a batch.

Captum runs on a thread of its own; each forward, and each forward with its backward, is a piece
that waits for its turn on the device. The network is the eager twin of the one that serves.
"""

import asyncio
import math
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from app.engine.device_pieces import Abandoned, DevicePieces
from app.engine.predictor import Predictor
from app.engine.twin import last_spatial_layer, twin_of
from app.errors import BadInput, Draining, Overloaded

Method: TypeAlias = Literal["saliency", "integrated_gradients", "grad_cam", "occlusion"]
Baseline: TypeAlias = Literal["black", "white", "mean"]

# Rows that go through a forward and a backward together; these keep every activation.
GRADIENT_ROWS: Final = 4
# On a processor more rows at once are slower, because activations leave its caches.
FORWARD_ROWS: Final = 8
# The most that attributions may sum to something else than they should, relative to that.
COMPLETE: Final = 0.01
MAX_WINDOWS: Final = 4096


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about one input.

    Attributes:
        target: the class, an index into the labels.
        steps: of integrated gradients, to begin with.
        max_steps: to which they are doubled at most.
        window: side of what is occluded at once, in pixels (or numbers of a vector); None takes
            an eighth of the shorter side.
        stride: from one window to the next; None takes half a window.
        baseline: what stands for nothing: black, white, or the mean that normalising removes.
            Inputs that are no pictures know only zeros.
    """

    method: Method
    target: int
    steps: int = 32
    max_steps: int = 1024
    window: int | None = None
    stride: int | None = None
    baseline: Baseline = "black"


@dataclass(frozen=True, slots=True)
class Completeness:
    """Integrated gradients should sum to what the output gained since the baseline.

    Attributes:
        attributed: the sum of all attributions.
        gained: output for the input less output for the baseline.
        error: their distance, relative to `gained`.
    """

    attributed: float
    gained: float
    error: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Attributions of one input.

    Attributes:
        attributions: float32 `[*input_shape]` on the CPU: how much each number of the input
            speaks for the class; in units of its logit (saliency: of its logit per unit).
        output: the class's logit.
        steps: of integrated gradients, as many as were needed; else None.
        completeness: of integrated gradients; else None.
    """

    attributions: Tensor
    output: float
    steps: int | None = None
    completeness: Completeness | None = None


class Explainer:
    """Explains what live models answer.

    Args:
        max_running: explanations at one moment; further ones are refused.
    """

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._running = 0
        self._threads = ThreadPoolExecutor(max_running, thread_name_prefix="explain")
        self._twins: weakref.WeakKeyDictionary[Predictor, nn.Module] = weakref.WeakKeyDictionary()

    async def explain(
        self, predictor: Predictor, inputs: Tensor, question: Question, deadline: float
    ) -> Explanation:
        """Answer `question` about `inputs`.

        Args:
            inputs: float32 `[1, *input_shape]` on the CPU.
            deadline: of `time.monotonic`, in seconds.

        Raises:
            BadInput: the method does not fit the model, or an option the input.
            Overloaded: too many explanations run.
            As `Lane.call`: app.errors.DeadlineExceeded, QueueFull, DeviceLost, Draining.
        """
        if self._running >= self._max_running:
            raise Overloaded(
                f"{self._running} explanations are being computed; send this again later",
                retry_after_s=1.0,
            )
        pieces = DevicePieces(predictor.lane, deadline)
        self._running += 1
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, self._explain, predictor, inputs, question, pieces
        )
        work.add_done_callback(self._ended)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            pieces.abandon()
            raise
        except Abandoned:
            raise Draining("the service is stopping and takes no more work") from None

    def close(self) -> None:
        """Begin no more; what runs ends at its next piece, because its lane refuses it."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, work: "asyncio.Future[Explanation]") -> None:
        self._running -= 1
        if not work.cancelled():
            work.exception()  # told to whoever awaits it; nobody may any more

    def _explain(
        self, predictor: Predictor, inputs: Tensor, question: Question, pieces: DevicePieces
    ) -> Explanation:
        task = _Task(predictor, self._twin(predictor), inputs, question, pieces)
        with torch.inference_mode(False):
            return task.explain()

    def _twin(self, predictor: Predictor) -> nn.Module:
        twin = self._twins.get(predictor)
        if twin is None:
            twin = self._twins[predictor] = twin_of(predictor.loaded)
        return twin


class _Task:
    """One explanation. Everything is shaped like a picture, also where the network flattens it."""

    def __init__(
        self,
        predictor: Predictor,
        twin: nn.Module,
        inputs: Tensor,
        question: Question,
        pieces: DevicePieces,
    ) -> None:
        preprocessing = predictor.manifest.preprocessing
        self.input_shape = preprocessing.input_shape
        self.shape = preprocessing.raw_shape
        self.twin, self.question, self.pieces = twin, question, pieces
        self.name = predictor.name
        self.forward_rows = min(FORWARD_ROWS, predictor.lane.largest_batch)
        self.gradient_rows = min(GRADIENT_ROWS, self.forward_rows)
        device = predictor.loaded.device
        # A copy outside inference mode, because gradients are wanted with respect to it.
        self.inputs = torch.empty((1, *self.shape)).copy_(inputs.view(1, *self.shape)).to(device)
        self.baseline = _baseline(predictor, question.baseline, self.inputs)

    def explain(self) -> Explanation:
        methods: dict[Method, Callable[[], Explanation]] = {
            "saliency": self._saliency,
            "integrated_gradients": self._integrated_gradients,
            "grad_cam": self._grad_cam,
            "occlusion": self._occlusion,
        }
        return methods[self.question.method]()

    def _forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), *self.input_shape)
        if x.ndim == 4:  # convolutions are faster with the channels last
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.twin(x)
        return logits

    def _forward_piece(self, x: Tensor) -> Tensor:
        return self.pieces.run(lambda: self._without_gradients(x))

    def _without_gradients(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._forward(x)

    def _gradients_piece(self, *arguments: Any, **named: Any) -> Any:
        """Captum's own gradients, on the device thread."""
        from captum._utils.gradient import compute_gradients

        return self.pieces.run(lambda: compute_gradients(*arguments, **named))

    def _outputs(self) -> tuple[float, float]:
        """The class's logit for the input, and for the baseline."""
        both = self._forward_piece(torch.cat([self.inputs, self.baseline]))
        here, nowhere = both[:, self.question.target].tolist()
        return here, nowhere

    def _saliency(self) -> Explanation:
        from captum.attr import Saliency

        method = Saliency(self._forward)
        method.gradient_func = self._gradients_piece
        x = self.inputs.requires_grad_()
        found = method.attribute(x, target=self.question.target, abs=False)
        return self._explanation(found, self._outputs()[0])

    def _integrated_gradients(self) -> Explanation:
        from captum.attr import IntegratedGradients

        method = IntegratedGradients(self._forward)
        method.gradient_func = self._gradients_piece
        output, from_nothing = self._outputs()
        steps, gained = self.question.steps, output - from_nothing
        while True:
            began = time.monotonic()
            found = self._along_the_way(method, steps)
            attributed = float(found.double().sum())
            error = abs(attributed - gained) / max(abs(gained), 1e-6)
            twice_s = 2.5 * (time.monotonic() - began)
            in_time = time.monotonic() + twice_s < self.pieces.deadline
            if error <= COMPLETE or 2 * steps > self.question.max_steps or not in_time:
                complete = Completeness(attributed, gained, error)
                return self._explanation(found, output, steps, complete)
            steps *= 2

    def _along_the_way(self, method: Any, steps: int) -> Tensor:
        """Integrated gradients stretch by stretch, a piece each: they add up along the way."""
        num_stretches = math.ceil(steps / self.gradient_rows)
        way, total = self.inputs - self.baseline, torch.zeros_like(self.inputs)
        for index in range(num_stretches):
            total += method.attribute(
                self.baseline + way * ((index + 1) / num_stretches),
                self.baseline + way * (index / num_stretches),
                target=self.question.target,
                n_steps=min(steps, self.gradient_rows),
            )
        return total

    def _grad_cam(self) -> Explanation:
        from captum.attr import LayerAttribution

        coarse = self.pieces.run(self._coarse_map) if len(self.shape) == 3 else None
        if coarse is None:
            raise BadInput(
                f"grad_cam looks at the last convolution, and {self.name} has none; "
                "take integrated_gradients",
                param="method",
            )
        height, width = self.shape[1:]
        fine = LayerAttribution.interpolate(coarse, (height, width), "bilinear")
        return self._explanation(fine.expand(1, *self.shape), self._outputs()[0])

    def _coarse_map(self) -> Tensor | None:
        """What the last convolution sees, `[1, 1, h, w]`; None without one."""
        from captum.attr import LayerGradCam

        layer = last_spatial_layer(self.twin, self.inputs.view(1, *self.input_shape))
        if layer is None:
            return None
        method = LayerGradCam(self._forward, layer)
        x = self.inputs.requires_grad_()
        found: Tensor = method.attribute(x, target=self.question.target, relu_attributions=True)
        return found.detach()

    def _occlusion(self) -> Explanation:
        from captum.attr import Occlusion

        window, stride = self._window()
        found = Occlusion(self._forward_piece).attribute(
            self.inputs,
            window,
            stride,
            self.baseline,
            target=self.question.target,
            perturbations_per_eval=self.forward_rows,
        )
        return self._explanation(found, self._outputs()[0])

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the window and of its step; a window covers all channels of a picture."""
        sides = self.shape[1:] if len(self.shape) == 3 else self.shape
        side = self.question.window or max(1, min(sides) // 8 if len(sides) > 1 else 1)
        step = self.question.stride or max(1, side // 2)
        if side > min(sides):
            raise BadInput(f"a window of {side} does not fit {list(sides)}", param="window")
        if step > side:
            raise BadInput(
                f"a stride of {step} leaves gaps between windows of {side}", param="stride"
            )
        num_windows = math.prod(math.ceil((one - side) / step) + 1 for one in sides)
        if num_windows > MAX_WINDOWS:
            raise BadInput(
                f"{num_windows} windows are too many, {MAX_WINDOWS} is the limit; "
                "take a larger window or stride",
                param="stride",
            )
        channels = self.shape[: len(self.shape) - len(sides)]
        window = (*channels, *(side for _ in sides))
        return window, (*channels, *(step for _ in sides))

    def _explanation(
        self,
        found: Tensor,
        output: float,
        steps: int | None = None,
        completeness: Completeness | None = None,
    ) -> Explanation:
        attributions = found.detach().float().cpu().reshape(self.input_shape).contiguous()
        return Explanation(attributions, output, steps, completeness)


def _baseline(predictor: Predictor, kind: Baseline, like: Tensor) -> Tensor:
    """What stands for nothing, shaped as `like`."""
    preprocessing = predictor.manifest.preprocessing
    if kind == "mean" or not preprocessing.accepts_pictures:
        return torch.zeros_like(like)
    value = 0 if kind == "black" else 255
    pixels = torch.full((1, *preprocessing.raw_shape), value, dtype=torch.uint8)
    return preprocessing.finish(pixels).view(like.shape).to(like.device)
