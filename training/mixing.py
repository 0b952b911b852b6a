"""Mixup and cutmix: a batch mixed with itself, by shares that are functions of the seed and the step.

Zhang et al., "mixup: beyond empirical risk minimization", 2018; Yun et al., "CutMix", 2019.
"""

import numpy as np
import torch
from torch import Tensor

from training.randomness import seed_for


def mixed(
    x: Tensor, targets: Tensor, mixup: float, cutmix: float, seed: int, step: int
) -> tuple[Tensor, Tensor, float]:
    """Every sample with the next one of the batch in it.

    Args:
        x: float `[N, ...]`, as the network takes it; cutmix needs pictures `[N, C, H, W]`.
        targets: int64 `[N]`.
        mixup, cutmix: the parameter of each one's Beta distribution; 0 is off.
        seed, step: decide the draws.

    Returns:
        The mixed samples, the targets of what was mixed in, and the share of the sample itself.
    """
    draws = np.random.default_rng(seed_for(seed, "mix", step=step))
    cuts = cutmix > 0 and x.ndim == 4 and (not mixup or draws.random() < 0.5)
    alpha = cutmix if cuts else mixup
    if not alpha:
        return x, targets, 1.0
    share = float(draws.beta(alpha, alpha))
    partner, partner_targets = x.roll(1, 0), targets.roll(1, 0)
    if not cuts:
        return torch.lerp(partner, x, share), partner_targets, share
    top, bottom = _span(x.shape[2], share, draws)
    left, right = _span(x.shape[3], share, draws)
    x = x.clone()
    x[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    covered = (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
    return x, partner_targets, 1 - covered


def _span(side: int, share: float, draws: np.random.Generator) -> tuple[int, int]:
    """One side of a rectangle that covers `1 - share` of the picture where it lies within it."""
    half, centre = side * (1 - share) ** 0.5 / 2, draws.random() * side
    return max(0, round(centre - half)), min(side, round(centre + half))
