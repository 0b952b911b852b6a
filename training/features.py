"""What a frozen backbone makes of every sample, computed once and kept.

The backbone answers in `eval()`, its batch norms too, so that a sample's features depend on nothing
but the sample: they are the same in every epoch and in any batch, and may be stored.
"""

import copy
import hashlib
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.heads import last_layer
from models.preprocessing import Preprocessing, TensorInput
from training.datasets import Dataset
from training.feed import feed_for
from training.layout import laid_out, layout_of
from training.order import in_turn
from training.progress import Progress
from training.samples import InMemory, Samples, digest_of
from training.snapshot import Snapshot, Snapshots
from training.source import Part

FEATURE_BATCH = 16
FEATURES = "features"


class HeadUnseparable(Exception):
    """The last layer of a network cannot be trained apart from the rest."""


def separate_head(network: nn.Module) -> tuple[str, nn.Sequential]:
    """The end of `network` that can learn on stored features.

    Returns:
        The path of its last layer with weights, whose input the features are; and that layer with
        the dropout before it and what follows it in its `nn.Sequential` (squeezenet pools behind
        its last convolution), sharing weights with `network`.
    """
    path = last_layer(network)
    owner_path, _, name = path.rpartition(".")
    owner = network.get_submodule(owner_path)
    siblings = list(owner.named_children()) if isinstance(owner, nn.Sequential) else []
    names = [sibling for sibling, _ in siblings]
    position = names.index(name) if name in names else 0
    before = [part for _, part in siblings[:position][-1:] if isinstance(part, nn.Dropout)]
    after = [part for _, part in siblings[position + 1 :]]
    head = nn.Sequential(*before, network.get_submodule(path), *after, nn.Flatten(1))
    return path, head


def features_of(
    network: nn.Module, dataset: Dataset, device: torch.device, cache: Path | None = None
) -> Generator[Progress, None, Dataset]:
    """`dataset` with its samples replaced by their features, float32, in memory.

    Args:
        network: with the head that `separate_head` found; put into `eval()`.
        dataset: any; the parts and targets stay.
        device: where the backbone computes.
        cache: a folder where features are kept under the names of everything that decides them.

    Yields:
        Samples done, in the phase `features`.

    Raises:
        HeadUnseparable: features and head together do not give the network's answers.
    """
    path, head = separate_head(network)
    network.to(device).to(memory_format=layout_of(network)).eval()
    store = Snapshots(cache / _key(network, path, dataset)) if cache else None
    kept = store.newest() if store else None
    if kept:
        return _with_features(dataset, kept.tensors[FEATURES])
    features = yield from _compute(network, path, head, dataset, device)
    if store:
        store.save(0, Snapshot({FEATURES: features}, {}))
    return _with_features(dataset, features)


def _compute(
    network: nn.Module, path: str, head: nn.Module, dataset: Dataset, device: torch.device
) -> Generator[Progress, None, dict[str, Tensor]]:
    num_samples, done = sum(len(part) for part in dataset.parts.values()), 0
    found: dict[str, list[Tensor]] = {name: [] for name in dataset.parts}
    for name, part in dataset.parts.items():
        feed = feed_for(part, device, dataset.num_workers)
        with closing(feed(in_turn(len(part), FEATURE_BATCH))) as batches:
            for _, inputs, targets in batches:
                features, logits = _through(network, path, dataset.preprocessing.finish(inputs))
                if not done:
                    _check(head, features, logits)
                found[name].append(features.cpu())
                done += len(targets)
                yield Progress("features", done, num_samples)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def _through(network: nn.Module, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches the layer at `path`, and what the network answers."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0].clone())

    hook = network.get_submodule(path).register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            logits = network(laid_out(x, layout_of(network)))
    finally:
        hook.remove()
    return caught[0], logits


def _check(head: nn.Module, features: Tensor, logits: Tensor) -> None:
    with torch.no_grad():
        alone = copy.deepcopy(head).eval()(features)
    if alone.shape != logits.shape or not torch.allclose(alone, logits, rtol=1e-3, atol=1e-4):
        raise HeadUnseparable(
            "the last layer of this network is followed by others, so a head alone cannot learn; "
            "train the network whole instead"
        )


def _with_features(dataset: Dataset, stored: Mapping[str, Tensor]) -> Dataset:
    shape = tuple(next(iter(stored.values())).shape[1:])
    parts = {name: Part(InMemory(stored[name]), dataset.parts[name].targets) for name in stored}
    return replace(
        dataset, parts=parts, preprocessing=Preprocessing(steps=(TensorInput(shape=shape),))
    )


def _key(network: nn.Module, path: str, dataset: Dataset) -> str:
    """Everything that decides the features: weights below the head, samples, preprocessing."""
    digest = hashlib.sha256(f"{dataset.fingerprint} {torch.__version__}".encode())
    digest.update(dataset.preprocessing.model_dump_json().encode())
    for name, tensor in sorted(network.state_dict().items()):
        if not name.startswith(path + "."):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for name, part in sorted(dataset.parts.items()):
        digest.update(f"{name} {part.targets.tolist()}".encode())
        digest.update(_identity(part.samples))
    return digest.hexdigest()


def _identity(samples: Samples) -> bytes:
    """Tells which samples of the dataset these are."""
    if isinstance(samples, InMemory):
        return digest_of(samples.data)
    return "\0".join(samples.name(index) for index in range(len(samples))).encode()
