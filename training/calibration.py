"""The int8 form of a trained network, from inputs that show how large its numbers get."""

from collections.abc import Collection, Generator, Iterable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from models.int8 import Bounds
from models.int8_network import NotQuantizable, folded, groups_of, int8_form, layers_of
from training.progress import Progress

FOLDING_TOLERANCE: Final = 1e-3
"""Largest change of an output, relative to the largest, that folding batch norms may bring."""


def calibrated(
    network: nn.Module, batches: Iterable[Tensor], num_samples: int
) -> Generator[Progress, None, nn.Module]:
    """The form of `network` with eight bits.

    Args:
        network: in `eval()`, on the CPU; it is not changed.
        batches: of its inputs, float32 `[n, *input_shape]`.
        num_samples: in all of them.

    Yields:
        After each batch, samples done in the phase `calibrate`.

    Raises:
        models.int8_network.NotQuantizable: it has no such form.
    """
    small = int8_form(network)
    graph = folded(network)
    groups = {group.path: group for group in groups_of(graph)}
    watch = _Watch(graph, {node for group in groups.values() for node in (group.input, group.last)})
    done = 0
    for inputs in batches:
        with torch.inference_mode():
            _check_folding(watch.run(inputs), network(inputs))
        done += len(inputs)
        yield Progress("calibrate", done, num_samples)
    for path, layer in layers_of(small):
        group, whole = groups[path], graph.get_submodule(path)
        bounds = {"input": watch.bounds[group.input], "output": watch.bounds[group.last]}
        layer.fill(whole.state_dict(), bounds)
    return small.requires_grad_(False)


class _Watch(fx.Interpreter):
    """Runs a graph, and keeps the smallest and the largest number that some nodes gave."""

    def __init__(self, graph: fx.GraphModule, nodes: Collection[fx.Node]) -> None:
        super().__init__(graph)
        self._nodes = nodes
        self.bounds: dict[fx.Node, Bounds] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._nodes:
            low, high = (float(one) for one in result.aminmax())
            before = self.bounds.get(n, (low, high))
            self.bounds[n] = min(low, before[0]), max(high, before[1])
        return result


def _check_folding(folded_outputs: Tensor, outputs: Tensor) -> None:
    largest = outputs.abs().max().clamp_min(1e-6)
    if not float((folded_outputs - outputs).abs().max() / largest) <= FOLDING_TOLERANCE:
        raise NotQuantizable("the traced network does not answer as the network itself does")
