"""A version's network as a graph that runs without its class: torch.export's, or ONNX.

What comes out takes preprocessed float32 `[n, *input_shape]` for any n and gives logits. It is
checked, from its bytes, against the network itself before anybody gets it.
"""

import importlib.util
import io
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.networks import INT8
from training.importing import noise

INPUT: Final = "input"
OUTPUT: Final = "logits"
BATCH_SIZES: Final = (1, 3)
TOLERANCE: Final = 1e-3
"""Largest change of a logit, relative to the largest."""
EXTRA: Final = ("onnx", "onnxruntime", "onnxscript")


class GraphRefused(Exception):
    """There is no graph of this network, or not one that answers as the network does."""


def pt2(checkpoint: Checkpoint) -> bytes:
    """A `.pt2` file's bytes, which `torch.export.load` reads.

    Raises:
        GraphRefused: the network cannot be exported, or the graph answers differently.
    """
    buffer = io.BytesIO()
    torch.export.save(_program(checkpoint), buffer)
    content = buffer.getvalue()
    graph = torch.export.load(io.BytesIO(content)).module()
    _check(checkpoint, graph)
    return content


def onnx(checkpoint: Checkpoint) -> bytes:
    """An `.onnx` file's bytes, with one input and one output.

    Raises:
        GraphRefused: as `pt2`, or the extra `export` is not installed.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise GraphRefused(
            f"ONNX needs {', '.join(missing)}; install the extra: pip install 'pytorchlib[export]'"
        )
    import onnxruntime

    program = torch.onnx.export(
        _program(checkpoint), input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def graph(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: inputs.numpy()})[0])

    _check(checkpoint, graph)
    return content


def _program(checkpoint: Checkpoint) -> torch.export.ExportedProgram:
    manifest = checkpoint.manifest
    if manifest.network.name.startswith(INT8):
        parent = manifest.lineage.parent or "the version that it was made from"
        raise GraphRefused(f"layers in int8 have no graph that others run; export {parent}")
    example = manifest.preprocessing.finish(noise(manifest.preprocessing, 2))
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            return torch.export.export(
                checkpoint.network, (example,), dynamic_shapes=({0: batch},), strict=False
            )
    except Exception as error:
        # Export refuses control flow that depends on numbers, with whatever exception it meets.
        reason = str(error).partition("\n")[0]
        raise GraphRefused(f"{manifest.network.name} has no graph: {reason}") from error


def _check(checkpoint: Checkpoint, graph: Callable[[Tensor], Any]) -> None:
    """Compare with the golden outputs, and in batches of other sizes with the network itself."""
    preprocessing, golden = checkpoint.manifest.preprocessing, checkpoint.golden
    with torch.inference_mode():
        if golden is not None:
            found = graph(preprocessing.finish(golden.inputs))
            _require_alike(found, golden.outputs, "its golden inputs")
        for num_rows in BATCH_SIZES:
            inputs = preprocessing.finish(noise(preprocessing, num_rows))
            wanted = checkpoint.network(inputs).float()
            _require_alike(graph(inputs), wanted, f"a batch of {num_rows}")


def _require_alike(found: Tensor, wanted: Tensor, of_what: str) -> None:
    if found.shape != wanted.shape:
        raise GraphRefused(
            f"the graph answers {of_what} with shape {list(found.shape)}, the network with "
            f"{list(wanted.shape)}; nothing was written"
        )
    change = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
    if not change <= TOLERANCE:  # NaN is no change that can be tolerated
        raise GraphRefused(
            f"the graph answers {of_what} differently than the network, by {change:.2g} of the "
            f"largest output, and {TOLERANCE:g} is allowed; nothing was written"
        )
