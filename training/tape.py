"""Operations noted down while they are done, and done again without what led to them.

Between the kernels of a small network's step lie its modules, the graph that autograd builds and
its way back through it. None of that changes from step to step, so a step that was noted is a list
of calls, and doing it again calls the same kernels in the same order: the bits are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SEEN_BY_PYTHON: Final = frozenset(
    {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
)
"""Tags of operations whose outcome Python may see and decide by."""


class Unrepeatable(RuntimeError):
    """What was noted may be something else with other inputs; the sentence says why."""


@dataclass(frozen=True)
class _Call:
    """One operation: its arguments and results as Python would write them."""

    func: Any
    arguments: str
    used: frozenset[str]
    results: tuple[str, ...]
    is_tuple: bool


class Tape(TorchDispatchMode):
    """Notes every operation inside its block.

    Args:
        inputs: what other tensors will stand for later. All others that come from outside, such
            as weights, are taken where they lie, and changed there if an operation does that.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[_Call] = []
        self._values: dict[str, Any] = {}  # by name: tensors from outside, and plain arguments
        self._names: dict[int, str] = {}
        self._held: list[Tensor] = []  # so that no `id` is given away twice
        self._fault = ""
        self._inputs = [self._note(tensor, "input") for tensor in inputs]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: or torch imports its compiler, which takes seconds, at the first operation."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do it, and note it."""
        del types
        found = func(*args, **(kwargs or {}))
        if _SEEN_BY_PYTHON & set(func.tags):
            self._fault = f"{func} shows Python a number"
        elif not (func.is_view and self._is_known_view(func, args[0], found)):
            self._append(func, args, kwargs or {}, found)
        return found

    def repeated(self, outputs: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """What does it all again: from tensors in place of the inputs to new `outputs`.

        Raises:
            Unrepeatable: Python saw a number, or an output was not computed.
        """
        if not all(id(tensor) in self._names for tensor in outputs):
            self._fault = "an answer was not computed from the inputs"
        if self._fault:
            raise Unrepeatable(self._fault)
        wanted = [self._names[id(tensor)] for tensor in outputs]
        functions = {f"call_{number}": call.func._op for number, call in enumerate(self._calls)}
        namespace = {**self._values, **functions}
        # As Python text: walking through a list of calls would take longer than making them.
        exec("\n".join(self._lines(wanted)), namespace)
        # Without the bookkeeping that only autograd needs.
        repeat: Callable[..., tuple[Tensor, ...]] = torch.inference_mode()(namespace["repeat"])
        return repeat

    def agrees_with(self, other: "Tape") -> bool:
        """Whether the other one notes the same calls, on the same memory from outside."""
        if self._calls != other._calls or self._values.keys() != other._values.keys():
            return False
        return all(_alike(value, other._values[name]) for name, value in self._values.items())

    def _lines(self, wanted: Sequence[str]) -> list[str]:
        """From the last call to the first: a result is let go once nothing later needs it."""
        needed, lines = set(wanted), [f" return ({', '.join(wanted)},)"]
        for number, call in reversed(list(enumerate(self._calls))):
            if call.func.is_view and not needed.intersection(call.results):
                continue
            done = sorted(call.used - needed - self._values.keys())
            lines += [f" del {', '.join(done)}"] if done else []
            results = ", ".join(name if name in needed else "_" for name in call.results)
            comma = "," if call.is_tuple and results else ""
            left = f"{results}{comma} = " if results else ""
            lines.append(f" {left}call_{number}({call.arguments})")
            needed |= call.used
        return [f"def repeat({', '.join(self._inputs)}):", *reversed(lines)]

    def _is_known_view(self, func: Any, viewed: Tensor, found: Any) -> bool:
        """Whether a view need not be noted: of what lies outside, or that there is already."""
        name = self._names.get(id(viewed))
        if name is None or name in self._values:
            return True
        if func is torch.ops.aten.detach.default:
            self._names[id(found)] = name
            self._held.append(found)
            return True
        return False

    def _append(self, func: Any, args: Any, kwargs: Mapping[str, Any], found: Any) -> None:
        used: set[str] = set()
        given = [self._text(value, used) for value in args]
        given += [f"{name}={self._text(value, used)}" for name, value in kwargs.items()]
        is_tuple = isinstance(found, (tuple, list))
        each = found if is_tuple else [found]
        # An operation in place gives its argument back, which keeps its name.
        news = [isinstance(one, Tensor) and id(one) not in self._names for one in each]
        results = [
            self._note(one, "found") if is_new else "_"
            for one, is_new in zip(each, news, strict=True)
        ]
        self._calls.append(_Call(func, ", ".join(given), frozenset(used), tuple(results), is_tuple))

    def _text(self, value: Any, used: set[str]) -> str:
        """`value` in Python, with a name for what has no text; the names are added to `used`."""
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._text(one, used) for one in value)}]"
        if not isinstance(value, Tensor):
            name = f"value_{len(self._values)}"
            self._values[name] = value
        elif id(value) in self._names:
            name = self._names[id(value)]
        else:
            name = self._note(value, "outside")
            self._values[name] = value.detach()
        used.add(name)
        return name

    def _note(self, tensor: Tensor, kind: str) -> str:
        name = f"{kind}_{len(self._held)}"
        self._held.append(tensor)
        self._names[id(tensor)] = name
        return name


def _alike(one: Any, other: Any) -> bool:
    """Whether two tensors are the same place in memory, or two plain arguments equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _place(one) == _place(other)
    return type(one) is type(other) and bool(one == other)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
