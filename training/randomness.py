"""Randomness as a function of (seed, purpose, epoch, step, sample), not a state.

A run that is resumed, or fed by another number of workers, therefore draws the same numbers, and
a snapshot has no generator to store.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def seed_for(seed: int, purpose: str, epoch: int = 0, step: int = 0, sample: int = 0) -> int:
    """A 63-bit seed that belongs to these arguments alone; the same in every process."""
    text = f"{seed}:{purpose}:{epoch}:{step}:{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(
    seed: int, purpose: str, epoch: int = 0, step: int = 0, sample: int = 0
) -> torch.Generator:
    """A CPU generator at the start of the stream that belongs to these arguments."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, epoch, step, sample))


def uniforms(key: int, samples: Tensor, num_draws: int) -> Tensor:
    """Independent uniform numbers for each sample, by counter instead of by state.

    Args:
        key: a seed, from `seed_for`.
        samples: int64 `[N]`, on the CPU: which samples draw.
        num_draws: numbers for each.

    Returns:
        float32 `[N, num_draws]` in [0, 1). Row i depends on `key` and `samples[i]` only, not on
        the company it keeps. The mixing function is the finaliser of SplitMix64 (Steele, Lea and
        Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    streams = _mixed(samples.numpy().astype(np.uint64) * _GOLDEN_GAMMA + np.uint64(key))
    counters = np.arange(1, num_draws + 1, dtype=np.uint64) * _GOLDEN_GAMMA
    bits = _mixed(streams[:, None] + counters[None, :])
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24))


def _mixed(
    bits: "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def seed_device(device: torch.device, seed: int) -> None:
    """Set the generators that dropout draws from: the CPU's, and the GPU's where one computes.

    `torch.manual_seed` visits every kind of device and takes 160 microseconds; this takes two.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside the block and leave the caller's CPU generator as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
