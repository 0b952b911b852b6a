"""How a live version computes: the quickest form that answers as it did when it was published.

At load the eager forms are timed against each other and checked on the golden inputs. Compiled
functions may join later, one batch size at a time (`app/engine/compiling.py`), each only if it is
quicker than the form it stands for and answers alike.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from app.engine.device_error import is_out_of_memory
from models.checkpoint import Golden
from models.forms import Form, Precision, other_forms, plain_form
from models.preprocessing import Preprocessing

Wanted: TypeAlias = Literal["auto", "fp32", "bf16", "fp16", "int8"]

# Largest change of a golden output, relative to the largest logit. The golden outputs of a version
# in int8 are its own: on the same kind of processor nothing changes, on others a few roundings.
TOLERANCE: Final[dict[Precision, float]] = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1, "int8": 0.1}
# Quicker than this, a network has nothing to gain that an answer over HTTP would show.
WORTHWHILE_S: Final = 0.001
# Another form must save this share to be worth another rounding.
LEAST_GAIN: Final = 0.03
# Where so many samples of known class were held out when a version was published, this share of
# them must have got the class that fp32 gives.
ENOUGH_SAMPLES: Final = 200
LEAST_AGREEMENT: Final[dict[Precision, float]] = {"bf16": 0.995}
GOLDEN_ROWS: Final = 8
TIMED_ROWS: Final = {"cpu": (1, 4), "cuda": (1, 8, 32)}
# A GPU takes about as long for one row as for many: how it does with these decides.
JUDGED_ROWS: Final = {"cpu": 1, "cuda": 32}
# Slower than this at one row, larger batches are not timed: loading must not take minutes.
SLOW_S: Final = 0.1
REPETITIONS: Final = 2


@dataclass(frozen=True, slots=True)
class Trial:
    """How one form did.

    Attributes:
        form: its name.
        ms: rows in the batch -> milliseconds for it, the best of a few.
        change: largest change of a golden output, relative to the largest; None without any.
        verdict: `chosen`, or why not, in words.
    """

    form: str
    ms: dict[int, float]
    change: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A form by what distinguishes it, and how it and the others did."""

    precision: Precision
    arranged: bool
    trials: list[Trial]


@dataclass(eq=False)
class Execution:
    """What computes for one live version; calling it gives float32 logits.

    Attributes:
        form: the eager form that was chosen.
        trials: how it and the others did.
        compiled: batch size -> a quicker function of the same form.
    """

    form: Form
    trials: list[Trial] = field(default_factory=list)
    compiled: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def __call__(self, batch: Tensor) -> Tensor:
        """float32 `[n, *input_shape]` on the network's device to float32 `[n, classes]`."""
        compiled = self.compiled.get(len(batch))
        if compiled is None:
            return self.form(batch)
        return self.form.finish(compiled(self.form.begin(batch)))

    @property
    def is_worthwhile(self) -> bool:
        """Whether it computes long enough for a compiler to have something to gain."""
        return any(trial.ms for trial in self.trials)

    @property
    def choice(self) -> Choice:
        """What to choose again."""
        return Choice(self.form.precision, self.form.arranged, self.trials)


@dataclass(frozen=True, slots=True)
class Reference:
    """What every form must answer, and rows to time it with.

    Attributes:
        inputs: float32 `[n, *input_shape]` on the device: golden inputs, or zeros without any.
        outputs: float32 `[n, classes]` on the CPU; None without golden inputs.
        agreement: what publishing found, see `training.agreement`; empty where it did not look.
        sent: the same inputs before they were finished, on the CPU; None without golden inputs.
    """

    inputs: Tensor
    outputs: Tensor | None
    sent: Tensor | None = None
    agreement: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        golden: Golden | None,
        preprocessing: Preprocessing,
        device: torch.device,
        agreement: Mapping[str, Any] | None = None,
    ) -> "Reference":
        """The first golden rows, or one of zeros."""
        if golden is None:
            return cls(torch.zeros((1, *preprocessing.input_shape), device=device), None)
        sent = golden.inputs[:GOLDEN_ROWS]
        inputs = preprocessing.finish(sent).to(device)
        return cls(inputs, golden.outputs[:GOLDEN_ROWS], sent, agreement or {})

    @property
    def sent_bytes(self) -> Tensor | None:
        """What was sent, where it was pixels."""
        return self.sent if self.sent is not None and self.sent.dtype is torch.uint8 else None

    def rows(self, num_rows: int) -> Tensor:
        """`num_rows` of the inputs, again from the first where they are fewer."""
        return repeated(self.inputs, num_rows)

    def fault(
        self, answer: Callable[[Tensor], Tensor], precision: Precision
    ) -> tuple[float | None, str]:
        """The largest change of an output, and what is wrong with it; empty where nothing is."""
        if self.outputs is None:
            return None, "" if precision == "fp32" else "there are no golden inputs to check it on"
        return self.judged(answer(self.inputs).cpu(), precision)

    def judged(self, found: Tensor, precision: Precision) -> tuple[float | None, str]:
        """The same of what was `found` for the inputs; on the CPU."""
        if self.outputs is None:
            return None, ""
        largest = self.outputs.abs().max().clamp_min(1e-6)
        change = float((found - self.outputs).abs().max() / largest)
        allowed = TOLERANCE[precision]
        if not change <= allowed:  # NaN is no change that can be tolerated
            return (
                change,
                f"changes golden outputs by {change:.2g} of the largest; {allowed:g} is allowed",
            )
        best = self.outputs.topk(2, dim=1).values if self.outputs.shape[1] > 1 else None
        if best is not None:
            clear = (best[:, 0] - best[:, 1]) >= 2 * allowed * largest
            if bool((found.argmax(1) != self.outputs.argmax(1))[clear].any()):
                return change, "gives a clear golden input another class"
        return change, self._disagreement(precision)

    def _disagreement(self, precision: Precision) -> str:
        """What is wrong on the samples that were held out; empty where nothing is known to be."""
        found, least = self.agreement.get(precision), LEAST_AGREEMENT.get(precision)
        if least is None or not isinstance(found, Mapping):
            return ""
        share, num_samples = found.get("share"), found.get("num_samples")
        if not isinstance(share, float | int) or not isinstance(num_samples, int):
            return ""
        if num_samples < ENOUGH_SAMPLES or share >= least:
            return ""
        return f"agrees with fp32 on {share:.2%} of {num_samples} samples; {least:.1%} are needed"


def repeated(rows: Tensor, num_rows: int) -> Tensor:
    """`num_rows` of `rows`, again from the first where they are fewer."""
    return torch.cat([rows] * math.ceil(num_rows / len(rows)))[:num_rows]


def choose_form(network: nn.Module, reference: Reference, wanted: Wanted) -> Execution:
    """The quickest eager form that answers as it should; takes up to a few seconds.

    Args:
        network: plain, checked, on its device.
        reference: what to answer.
        wanted: a precision by name is taken whatever its speed, if its answers are within bounds.
            A version in int8 is what it is under every one.
    """
    plain = plain_form(network)
    if plain.precision == "int8":
        return Execution(plain, [Trial(plain.name, {}, None, "chosen: what was published")])
    if wanted == "int8":
        why = "chosen: this version has no int8 form; pytorchlib quantize makes a version that has"
        return Execution(plain, [Trial(plain.name, {}, None, why)])
    with torch.inference_mode():
        if wanted in ("auto", "fp32") and _is_small(plain, reference):
            return Execution(plain, [Trial(plain.name, {}, None, "chosen: too small to gain")])
        forms = [plain, *other_forms(network, wanted)]
        faults = [reference.fault(form, form.precision) for form in forms]
        ms = _times(forms, reference)
    eligible = [
        index
        for index, (form, (_, fault)) in enumerate(zip(forms, faults, strict=True))
        if not fault and wanted in ("auto", form.precision)
    ]
    chosen = _quickest(eligible, ms) if eligible else 0
    trials = [
        Trial(form.name, times, fault[0], _verdict(index, chosen, fault[1], ms))
        for index, (form, times, fault) in enumerate(zip(forms, ms, faults, strict=True))
    ]
    return Execution(forms[chosen], trials)


def chosen_before(network: nn.Module, reference: Reference, choice: Choice) -> Execution | None:
    """The form of an earlier choice; None where it no longer answers as it should."""
    plain = plain_form(network)
    if (choice.precision, choice.arranged) == (plain.precision, plain.arranged):
        return Execution(plain, choice.trials)
    for form in other_forms(network, choice.precision):
        with torch.inference_mode():
            _, fault = reference.fault(form, form.precision)
        if form.arranged is choice.arranged and not fault:
            return Execution(form, choice.trials)
    return None


def _is_small(plain: Form, reference: Reference) -> bool:
    """Whether there is nothing to gain for anybody to see."""
    rows = reference.rows(JUDGED_ROWS[reference.inputs.device.type])
    try:
        return _best_of(plain, rows, 3) < WORTHWHILE_S
    except RuntimeError as error:
        if is_out_of_memory(error):
            return False
        raise


def _verdict(index: int, chosen: int, fault: str, ms: Sequence[dict[int, float]]) -> str:
    if index == chosen:
        return "chosen"
    return fault or f"{_cost(ms[index], ms[chosen]):.2f} times as slow as the chosen one"


def _quickest(eligible: list[int], ms: Sequence[dict[int, float]]) -> int:
    """The first of them, unless another saves a share that is worth a rounding."""
    best = min(eligible, key=lambda index: _cost(ms[index], ms[eligible[0]]))
    saves = 1 - _cost(ms[best], ms[eligible[0]])
    return best if saves >= LEAST_GAIN else eligible[0]


def _cost(times: dict[int, float], others: dict[int, float]) -> float:
    """Geometric mean over the batch sizes of the time relative to the other's."""
    ratios = [times[size] / max(others[size], 1e-9) for size in times]
    return math.exp(sum(math.log(max(ratio, 1e-9)) for ratio in ratios) / len(ratios))


def _times(forms: Sequence[Form], reference: Reference) -> list[dict[int, float]]:
    """Batch size -> milliseconds, of each form; they take turns, so that noise meets all alike."""
    ms: list[dict[int, float]] = [{} for _ in forms]
    for size in TIMED_ROWS[reference.inputs.device.type]:
        rows = reference.rows(size)
        try:
            best = interleaved_best(forms, rows, REPETITIONS)
        except RuntimeError as error:
            if is_out_of_memory(error) and ms[0]:
                break  # smaller batches decide, and serve
            raise
        for one, seconds in zip(ms, best, strict=True):
            one[size] = round(seconds * 1000, 3)
        if best[0] > SLOW_S:
            break
    return ms


def interleaved_best(
    functions: Sequence[Callable[[Tensor], Tensor]], rows: Tensor, repetitions: int
) -> list[float]:
    """The shortest time of each in seconds; they take turns, and the first turn is not counted."""
    best = [math.inf for _ in functions]
    for repetition in range(repetitions + 1):
        for index, function in enumerate(functions):
            seconds = _best_of(function, rows, 1)
            if repetition:
                best[index] = min(best[index], seconds)
    return best


def _best_of(function: Callable[[Tensor], Tensor], rows: Tensor, repetitions: int) -> float:
    measure = _device_s if rows.is_cuda else _elapsed_s
    return min(measure(function, rows) for _ in range(repetitions))


def _elapsed_s(function: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    began = time.perf_counter()
    function(rows)
    return time.perf_counter() - began


def _device_s(function: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """By the device's own clock, between two events."""
    with torch.cuda.device(rows.device):
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        function(rows)
        ended.record()
        ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000
