"""What a frozen backbone makes of every sample, computed once and kept.

The backbone answers in `eval()`, its batch norms too, so that a sample's features depend on nothing
but the sample: they are the same in every epoch and in any batch, and may be stored.
"""

import copy
import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.heads import last_layer
from models.preprocessing import Preprocessing, TensorInput
from training.datasets import Dataset
from training.feature_cache import FeatureCache
from training.feed import feed_for
from training.layout import laid_out, layout_of
from training.order import Batch
from training.progress import Progress
from training.samples import InMemory
from training.source import Part

FEATURE_BATCH = 16
KEPT_AT_ONCE = 128
"""Samples whose features are written together: so many are computed again after a kill."""
CACHE_BYTES = 4096 << 20


class HeadUnseparable(Exception):
    """The last layer of a network cannot be trained apart from the rest."""


def separate_head(network: nn.Module) -> tuple[str, nn.Sequential]:
    """The end of `network` that can learn on stored features.

    Returns:
        The path of its last layer with weights, whose input the features are; and that layer with
        what follows it in its `nn.Sequential` (squeezenet pools behind its last convolution),
        sharing weights with `network`. Without a dropout before it: decay does its work, and to
        draw for each feature took half of a step's time.
    """
    path = last_layer(network)
    owner_path, _, name = path.rpartition(".")
    owner = network.get_submodule(owner_path)
    siblings = list(owner.named_children()) if isinstance(owner, nn.Sequential) else []
    names = [sibling for sibling, _ in siblings]
    position = names.index(name) if name in names else 0
    after = [part for _, part in siblings[position + 1 :]]
    head = nn.Sequential(network.get_submodule(path), *after, nn.Flatten(1))
    return path, head


def features_of(
    network: nn.Module,
    dataset: Dataset,
    device: torch.device,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Generator[Progress, None, Dataset]:
    """`dataset` with its samples replaced by their features, float32, in memory.

    Batches are filled up to one size, so that a sample's features are the same bits whatever
    else is computed with it, and whatever of them was there before.

    Args:
        network: with the head that `separate_head` found; put into `eval()`.
        dataset: any; the parts and targets stay.
        device: where the backbone computes.
        cache: a folder where features are kept, by sample, for all runs; what an interrupted run
            has computed is there too.
        cache_bytes: how large it may grow.

    Yields:
        Samples done, in the phase `features`.

    Raises:
        HeadUnseparable: features and head together do not give the network's answers.
    """
    path, head = separate_head(network)
    network.to(device).to(memory_format=layout_of(network)).eval()
    kept = FeatureCache(cache, _key(network, path, dataset, device), cache_bytes) if cache else None
    digests = {name: _digests(part) for name, part in dataset.parts.items()}
    wanted = frozenset(digest for part in digests.values() for digest in part)
    found = kept.read(wanted) if kept else {}
    num_samples, done = sum(map(len, digests.values())), 0
    for name, part in dataset.parts.items():
        missing = [i for i, digest in enumerate(digests[name]) if digest not in found]
        new: list[bytes] = []
        try:
            with closing(_computed(network, path, head, dataset, part, missing, device)) as batches:
                for indices, features in batches:
                    names = [digests[name][index] for index in indices]
                    found.update(zip(names, features, strict=True))
                    new += names
                    if len(new) >= KEPT_AT_ONCE:
                        _keep(kept, new, found)
                    done += len(names)
                    yield Progress("features", done, num_samples)
        finally:
            _keep(kept, new, found)
    stored = {name: torch.stack([found[one] for one in each]) for name, each in digests.items()}
    return _with_features(dataset, stored)


def _keep(cache: FeatureCache | None, new: list[bytes], found: Mapping[bytes, Tensor]) -> None:
    if cache and new:
        cache.add(new, torch.stack([found[digest] for digest in new]))
    new.clear()


def _computed(
    network: nn.Module,
    path: str,
    head: nn.Module,
    dataset: Dataset,
    part: Part,
    missing: Sequence[int],
    device: torch.device,
) -> Generator[tuple[list[int], Tensor], None, None]:
    """Features of the samples at `missing`, a batch at a time, on the CPU."""
    chosen = torch.tensor(missing, dtype=torch.int64)
    order = (Batch(step, 0, each) for step, each in enumerate(torch.split(chosen, FEATURE_BATCH)))
    if not missing:
        return
    feed = feed_for(part, device, dataset.num_workers)
    with closing(feed(order)) as batches:
        for batch, inputs, _ in batches:
            filled = torch.cat(
                [inputs, inputs[:1].expand(FEATURE_BATCH - len(inputs), *inputs.shape[1:])]
            )
            features, logits = _through(network, path, dataset.preprocessing.finish(filled))
            if batch.step == 0:
                _check(head, features, logits)
            yield batch.indices.tolist(), features[: len(inputs)].cpu()


def _digests(part: Part) -> tuple[bytes, ...]:
    """What tells each sample from every other: known if it was read, else read now."""
    return part.digests or tuple(part.samples.read(index)[1] for index in range(len(part)))


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
    parts = {
        name: replace(part, samples=InMemory(stored[name])) for name, part in dataset.parts.items()
    }
    return replace(
        dataset, parts=parts, preprocessing=Preprocessing(steps=(TensorInput(shape=shape),))
    )


def _key(network: nn.Module, path: str, dataset: Dataset, device: torch.device) -> str:
    """Everything that decides the bits of a sample's features, but the sample."""
    processor = torch.backends.cpu.get_cpu_capability()
    machine = f"{torch.__version__} {device.type} {processor} {torch.get_num_threads()}"
    digest = hashlib.sha256(machine.encode())
    digest.update(dataset.preprocessing.model_dump_json().encode())
    for name, tensor in sorted(network.state_dict().items()):
        if not name.startswith(path + "."):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
