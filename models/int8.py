"""Layers that compute with eight bits: int8 weights, uint8 activations, sums in int32.

A value between two such layers travels as bytes, with the scale and the zero point that give them
their meaning. Every layer holds plain tensors under names of its own, so that it rests on disk as
any other layer does. On processors that multiply bytes (VNNI) oneDNN computes; everywhere else
plain torch gives the same answers up to rounding, slower.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.device import multiplies_bytes

Activation: TypeAlias = Literal["none", "relu", "relu6"]
Bounds: TypeAlias = tuple[float, float]

LARGEST_WEIGHT: Final = 127
LARGEST_BYTE: Final = 255
_POST_OPS: Final[dict[Activation, tuple[str, list[float]]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}


class Coding(NamedTuple):
    """What bytes mean: `(byte - zero_point) * scale`."""

    scale: float
    zero_point: int

    @classmethod
    def of(cls, bounds: Tensor) -> "Coding":
        """The one that holds `bounds`, float32 `[2]`, and zero exactly."""
        low, high = min(float(bounds[0]), 0.0), max(float(bounds[1]), 0.0)
        scale = max(high - low, 1e-8) / LARGEST_BYTE
        return cls(scale, min(max(round(-low / scale), 0), LARGEST_BYTE))


class Coded(NamedTuple):
    """Bytes, uint8 of any shape, and what they mean."""

    values: Tensor
    coding: Coding


Value: TypeAlias = Tensor | Coded


def coded(x: Value, coding: Coding) -> Coded:
    """Numbers as bytes; what lies outside the bounds becomes the nearest that does not."""
    if isinstance(x, Coded):
        return x
    steps = x.mul(1 / coding.scale).round_().add_(coding.zero_point).clamp_(0, LARGEST_BYTE)
    return Coded(steps.to(torch.uint8), coding)


def decoded(x: Value) -> Tensor:
    """Bytes as float32 numbers."""
    if isinstance(x, Coded):
        return (x.values.float() - x.coding.zero_point) * x.coding.scale
    return x


@dataclass(frozen=True, slots=True)
class Place:
    """How a layer sits in its network.

    Attributes:
        activation: what follows it and is computed with it.
        takes_bytes: whether what comes in was given by a layer of this kind.
        gives_bytes: whether all that take what it gives are layers of this kind.
    """

    activation: Activation = "none"
    takes_bytes: bool = False
    gives_bytes: bool = False


class Int8Layer(nn.Module):
    """What convolutions and linear layers share.

    In its state_dict: `weight` int8 as the float layer's, `weight_scale` and `bias` float32
    `[outputs]`, and, where numbers come in or bytes go out, `input_bounds` and `output_bounds`,
    float32 `[2]`: the smallest and the largest number that a byte can mean there.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, place: Place) -> None:
        super().__init__()
        self.place = place
        zeros = partial(torch.zeros, device=weight.device)
        self.register_buffer("weight", torch.zeros_like(weight, dtype=torch.int8))
        self.register_buffer("weight_scale", zeros(len(weight)))
        self.register_buffer("bias", zeros(len(weight)))
        if not place.takes_bytes:
            self.register_buffer("input_bounds", zeros(2))
        if place.gives_bytes:
            self.register_buffer("output_bounds", zeros(2))
        self._packed: Tensor | None = None

    def fill(self, layer: Mapping[str, Tensor], bounds: Mapping[str, Bounds]) -> None:
        """Take the numbers of the float layer; every output's weights have a scale of their own.

        Args:
            layer: its `weight`, and its `bias` where it has one, float32.
            bounds: of its `input` and its `output`.
        """
        weight = layer["weight"]
        rows = weight.flatten(1)
        scale = rows.abs().amax(1).clamp_min(1e-8) / LARGEST_WEIGHT
        steps = (rows / scale[:, None]).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        self.weight.copy_(steps.view_as(weight))
        self.weight_scale.copy_(scale)
        if "bias" in layer:
            self.bias.copy_(layer["bias"])
        for name, buffer in self.named_buffers():
            if name.endswith("_bounds"):
                buffer.copy_(torch.tensor(bounds[name.removesuffix("_bounds")]))

    def forward(self, x: Value, other: Value | None = None) -> Value:
        """Compute, add `other` where there is one, and then the activation."""
        given = x if isinstance(x, Coded) else coded(x, self._input)
        output, activation = self._output, self.place.activation
        if not multiplies_bytes(self.weight.device):
            sums = self._plain(decoded(given))
        elif other is None:
            values = self._fast(given, output, activation)
            return values if output is None else Coded(values, output)
        elif output is not None and isinstance(other, Coded) and self.sums_bytes:
            return Coded(self._fast(given, output, activation, other), output)
        else:
            sums = self._fast(given, None, "none")
        numbers = _activated(sums if other is None else sums + decoded(other), activation)
        return numbers if output is None else coded(numbers, output)

    sums_bytes = False

    @cached_property
    def _input(self) -> Coding:
        return Coding.of(self.get_buffer("input_bounds"))

    @cached_property
    def _output(self) -> Coding | None:
        return Coding.of(self.get_buffer("output_bounds")) if self.place.gives_bytes else None

    @cached_property
    def _zero_points(self) -> Tensor:
        return torch.zeros(len(self.weight), dtype=torch.int32)

    def _float_weight(self) -> Tensor:
        """As `weight` stands for it, float32."""
        scale = self.weight_scale.view(-1, *[1] * (self.weight.ndim - 1))
        return self.weight.float() * scale

    def _plain(self, x: Tensor) -> Tensor:
        """float32 to float32, before any activation."""
        raise NotImplementedError

    def _fast(
        self, x: Coded, output: Coding | None, activation: Activation, other: Coded | None = None
    ) -> Tensor:
        """By oneDNN: bytes, or float32 where `output` is None."""
        raise NotImplementedError


class Int8Conv2d(Int8Layer):
    """In the place of a `nn.Conv2d` with zero padding."""

    sums_bytes = True

    def __init__(self, conv: nn.Conv2d, place: Place) -> None:
        super().__init__(conv.weight, place)
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.groups = conv.groups

    def _geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def _plain(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._float_weight(), self.bias, *self._geometry())

    def _fast(
        self, x: Coded, output: Coding | None, activation: Activation, other: Coded | None = None
    ) -> Tensor:
        if self._packed is None:
            self._packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.weight_scale, *x.coding, *self._geometry()
            )
        scale, zero_point = output or (1.0, 0)
        dtype = torch.float32 if output is None else torch.uint8
        name, numbers = _POST_OPS[activation]
        before = x.values, *x.coding, self._packed, self.weight_scale, self._zero_points
        after = self.bias, *self._geometry(), scale, zero_point, dtype
        compute = torch.ops.onednn.qconv2d_pointwise
        if other is None:
            given: Tensor = compute(*before, *after, name, numbers, "")
            return given
        # oneDNN adds in place, and others may still need the summand.
        summand = other.values.clone()
        added: Tensor = compute.binary(
            *before, summand, *after, *other.coding, "sum", 1.0, name, numbers, ""
        )
        return added


class Int8Linear(Int8Layer):
    """In the place of a `nn.Linear`."""

    def __init__(self, linear: nn.Linear, place: Place) -> None:
        super().__init__(linear.weight, place)

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self._float_weight(), self.bias)

    def _fast(
        self, x: Coded, output: Coding | None, activation: Activation, other: Coded | None = None
    ) -> Tensor:
        assert other is None, "a linear layer adds no bytes"
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        scale, zero_point = output or (1.0, 0)
        dtype = torch.float32 if output is None else torch.uint8
        before = x.values, *x.coding, self._packed, self.weight_scale, self._zero_points
        answer: Tensor = torch.ops.onednn.qlinear_pointwise(
            *before, self.bias, scale, zero_point, dtype, *_POST_OPS[activation], ""
        )
        return answer


class Int8MaxPool2d(nn.Module):
    """In the place of a `nn.MaxPool2d`: of bytes, the largest stands for the largest number."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool
        sizes = (pool.kernel_size, pool.stride, pool.padding)
        self.window, self.stride, self.padding = (cast("int", one) for one in sizes)

    @staticmethod
    def can_stand_for(module: nn.Module) -> bool:
        """Whether it is a small square window, as nearly all are."""
        return (
            type(module) is nn.MaxPool2d
            and module.kernel_size in (2, 3)
            and isinstance(module.stride, int)
            and isinstance(module.padding, int)
            and module.dilation == 1
            and not module.return_indices
        )

    def forward(self, x: Value) -> Value:
        if not isinstance(x, Coded):
            numbers: Tensor = self.pool(x)
            return numbers
        height, width = (self._num_windows(side) for side in x.values.shape[2:])
        rows = self._largest(x.values, 2, height)
        return Coded(self._largest(rows, 3, width), x.coding)

    def _num_windows(self, side: int) -> int:
        room = side + 2 * self.padding - self.window
        number = room // self.stride + 1
        overlap = room % self.stride and number * self.stride < side + self.padding
        if self.pool.ceil_mode and overlap:
            return number + 1  # the last one reaches over the edge, and begins before it
        return number

    def _largest(self, x: Tensor, axis: int, number: int) -> Tensor:
        """Over windows along one axis; beyond the edge is the smallest byte."""
        last = (number - 1) * self.stride
        after = max(0, last + self.window - self.padding - x.shape[axis])
        x = F.pad(x, (0, 0, self.padding, after) if axis == 2 else (self.padding, after))
        index: list[slice] = [slice(None)] * 4
        largest: Tensor | None = None
        for first in range(self.window):
            index[axis] = slice(first, first + last + 1, self.stride)
            taken = x[tuple(index)]
            largest = taken if largest is None else torch.maximum(largest, taken)
        assert largest is not None
        return largest


def _activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return x
    return x.relu() if activation == "relu" else x.clamp(0.0, 6.0)
