"""The forms that one network can compute in: precision, layout of memory, folded batch norms."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from models.device import supports_bf16, supports_fp16
from models.int8 import Int8Conv2d, Int8Layer

log = logging.getLogger(__name__)

Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
DTYPES: Final[dict[Precision, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,  # what goes in and comes out; between its layers are bytes
}


@dataclass(frozen=True, slots=True)
class Form:
    """One way to compute a network; called with rows it answers their logits.

    Attributes:
        precision: of weights and activations.
        arranged: whether batch norms are folded into convolutions and channels lie last.
        network: in `eval()`, on its device.
    """

    precision: Precision
    arranged: bool
    network: nn.Module

    @property
    def name(self) -> str:
        """For people: `bf16, channels last`."""
        return f"{self.precision}, channels last" if self.arranged else self.precision

    def __call__(self, batch: Tensor) -> Tensor:
        """float32 `[n, *input_shape]` on the network's device to float32 `[n, classes]`."""
        if self.precision == "fp32" and not self.arranged:
            # As it is; to find nothing to convert costs a small network a fifth of its time.
            return self.network(batch)  # type: ignore[no-any-return]
        return self.finish(self.network(self.begin(batch)))

    def begin(self, batch: Tensor) -> Tensor:
        """The batch as this form's network takes it."""
        layout = torch.channels_last if self.arranged else torch.contiguous_format
        return batch.to(DTYPES[self.precision], memory_format=layout)

    def finish(self, logits: Tensor) -> Tensor:
        """What the network answers, as float32."""
        return logits.float()


def plain_form(network: nn.Module) -> Form:
    """The network as its class computes it: in fp32, or in int8 where it was published so."""
    if any(isinstance(module, Int8Layer) for module in network.modules()):
        has_pictures = any(isinstance(module, Int8Conv2d) for module in network.modules())
        return Form("int8", has_pictures, network)
    return Form("fp32", False, network)


def other_forms(network: nn.Module, wanted: Literal["auto"] | Precision) -> list[Form]:
    """What may be quicker than the plain form, each with weights of its own.

    Args:
        network: on its device; it is not changed.
        wanted: `auto` offers every precision that the device has in hardware.

    fp16 is offered only where bf16 is not: it is no quicker, and large activations overflow in it.
    """
    device = next(network.parameters(), torch.empty(0)).device
    arranged = _arranged(network)
    precisions: list[Precision] = ["fp32"] if wanted == "auto" else [wanted]
    if wanted == "auto" and supports_bf16(device):
        precisions.append("bf16")
    elif wanted == "auto" and supports_fp16(device):
        precisions.append("fp16")
    base = arranged if arranged is not None else network
    forms = []
    for precision in precisions:
        if precision == "fp32" and arranged is None:
            continue
        cast = base if precision == "fp32" else copy.deepcopy(base).to(DTYPES[precision])
        forms.append(Form(precision, arranged is not None, cast))
    return forms


def _arranged(network: nn.Module) -> nn.Module | None:
    """A copy with folded batch norms and the channels last; None where there is no convolution."""
    if not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return None
    return _folded(network).to(memory_format=torch.channels_last)


def _folded(network: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    fold: Callable[[nn.Module], nn.Module] = fuse
    try:
        return fold(network)
    except Exception as error:
        # Tracing refuses control flow that depends on numbers, with whatever exception it meets.
        log.debug("batch norms stay as they are: %s", error)
        return copy.deepcopy(network)
