"""Parameter groups, SGD and AdamW, and schedules as pure functions of the step.

The two optimizers call torch's fused kernels directly: one call a step for a whole group. The
classes of `torch.optim` call the same kernels, but building the first of them imports the
compiler, which takes longer than many a run here; the tests hold both to the same numbers.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.config import FitConfig

BETAS = (0.9, 0.999)
EPSILON = 1e-8
ONE_CYCLE_START = 25.0
ONE_CYCLE_END = 1e4
ONE_CYCLE_WARMUP = 0.3


@dataclass(frozen=True)
class Group:
    """Parameters that are changed alike.

    Attributes:
        names: their names in the network, which name their state in a snapshot too.
        parameters: the same in the same order.
        weight_decay: 0 for norms and biases.
        learning_rate_scale: times the schedule's learning rate; below 1 for lower layers.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    learning_rate_scale: float = 1.0


def parameter_groups(
    network: nn.Module,
    weight_decay: float,
    scale_of: Callable[[str], float] | None = None,
) -> list[Group]:
    """The network's trainable parameters by weight decay and learning rate.

    Args:
        network: parameters that want no gradient are left out.
        weight_decay: for weights; norms and biases, which have at most one dimension, have none.
        scale_of: a parameter's name to the factor of its learning rate; 1 for all without it.
    """
    members: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            scale = scale_of(name) if scale_of else 1.0
            members.setdefault((decay, scale), []).append((name, parameter))
    return [
        Group(tuple(name for name, _ in pairs), tuple(p for _, p in pairs), decay, scale)
        for (decay, scale), pairs in members.items()
    ]


class Optimizer:
    """What SGD and AdamW share: gradients by group, and state as named tensors."""

    slots: tuple[str, ...]

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = list(groups)
        self.steps = 0
        self._state: dict[str, dict[str, Tensor]] = {
            slot: {
                name: torch.zeros_like(parameter, memory_format=torch.preserve_format)
                for group in self.groups
                for name, parameter in zip(group.names, group.parameters, strict=True)
            }
            for slot in self.slots
        }

    def step(self, learning_rate: float | Tensor) -> None:
        """Change every parameter that has a gradient; `learning_rate` is before scaling.

        As a tensor on the parameters' device it may change between replays of a recorded step.
        """
        self.steps += 1
        with torch.no_grad():
            self._count()
            for group in self.groups:
                self._step_group(group, learning_rate * group.learning_rate_scale)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything but the parameters, by `slot:parameter`; the tensors are not copies."""
        return {
            f"{slot}:{name}": tensor
            for slot, tensors in self._state.items()
            for name, tensor in tensors.items()
        }

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take over what `state` gave, after `steps` steps."""
        self.steps = steps
        for key, tensor in self.state().items():
            tensor.copy_(state[key])

    def _count(self) -> None:
        """Keep what counts steps on the device up to date, where anything does."""

    def _step_group(self, group: Group, learning_rate: float | Tensor) -> None:
        raise NotImplementedError

    def _active(self, group: Group) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """Parameters with a gradient, their gradients, and each slot's tensors for them."""
        pairs = [
            (name, parameter, parameter.grad)
            for name, parameter in zip(group.names, group.parameters, strict=True)
            if parameter.grad is not None
        ]
        slots = [[self._state[slot][name] for name, _, _ in pairs] for slot in self.slots]
        return [p for _, p, _ in pairs], [grad for _, _, grad in pairs], slots


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov's form of it."""

    def __init__(self, groups: Iterable[Group], momentum: float, nesterov: bool = False) -> None:
        self.momentum, self.nesterov = momentum, nesterov and momentum > 0
        self.slots = ("momentum",) if momentum else ()
        super().__init__(groups)

    def _step_group(self, group: Group, learning_rate: float | Tensor) -> None:
        parameters, gradients, slots = self._active(group)
        if not parameters:
            return
        torch._fused_sgd_(
            parameters,
            gradients,
            slots[0] if slots else [],
            weight_decay=group.weight_decay,
            momentum=self.momentum,
            lr=learning_rate,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            # The buffers begin as zeros, and 0 * momentum + gradient is the first step's rule.
            is_first_step=False,
        )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    slots = ("mean", "square")

    def __init__(self, groups: Iterable[Group]) -> None:
        super().__init__(groups)
        first = next((group.parameters[0] for group in self.groups if group.parameters), None)
        # The kernel wants one counter a parameter; all of ours are the run's own.
        self._counter = torch.zeros((), device=None if first is None else first.device)

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """The counter too."""
        super().load_state(state, steps)
        self._counter.fill_(float(steps))

    def _count(self) -> None:
        self._counter.add_(1.0)

    def _step_group(self, group: Group, learning_rate: float | Tensor) -> None:
        parameters, gradients, (means, squares) = self._active(group)
        if not parameters:
            return
        torch._fused_adamw_(
            parameters,
            gradients,
            means,
            squares,
            [],
            [self._counter] * len(parameters),
            lr=learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=group.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )


def optimizer_for(config: FitConfig, groups: Iterable[Group]) -> Optimizer:
    """The optimizer that `config` names."""
    if config.optimizer == "sgd":
        return SGD(groups, config.momentum, config.nesterov)
    return AdamW(groups)


def learning_rate_at(config: FitConfig, step: int, num_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `num_steps`, before a group's scale.

    Every schedule may begin with a linear warm-up. After it, `constant` stays, `cosine` falls to
    zero as half a cosine (Loshchilov and Hutter, 2017), and `one-cycle` (Smith and Topin, 2018)
    rises from a 25th of the peak and falls to a ten-thousandth of where it began; its warm-up is
    part of the cycle, 30 % unless set.
    """
    peak = config.learning_rate
    if config.schedule == "one-cycle":
        share = config.warmup or ONE_CYCLE_WARMUP
        return _one_cycle(peak, step, num_steps, share)
    num_warmup = round(config.warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if config.schedule == "constant":
        return peak
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (1 + math.cos(math.pi * done)) / 2


def _one_cycle(peak: float, step: int, num_steps: int, warmup: float) -> float:
    start, top = peak / ONE_CYCLE_START, max(1.0, warmup * num_steps - 1)
    if step < top:
        return _between(start, peak, step / top)
    done = (step - top) / max(1.0, num_steps - 1 - top)
    return _between(peak, start / ONE_CYCLE_END, min(1.0, done))


def _between(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2
