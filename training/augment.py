"""Random changes of training pictures, a whole batch at once.

Every draw is a function of (seed, epoch, sample): a picture is changed in the same way whatever
batch it comes in, however it was fed, and in a run that was resumed. Pictures stay bytes, so that
everything after this is the same preprocessing as without it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.feed import on_its_way
from training.randomness import seed_for, uniforms

NUM_DRAWS = 9


@dataclass(frozen=True)
class Preset:
    """How far pictures may be changed, each amount drawn evenly up to these bounds.

    Attributes:
        shift: share of the side that a picture moves, either way.
        rotation_degrees: either way.
        zoom: share by which a picture grows or shrinks.
        zoom_in_only: never shrink it, and never move what lies outside into it.
        shear: tangent of the angle, either way.
        flip: whether half of the pictures are mirrored left to right.
        brightness, contrast, saturation: share of change, either way.
    """

    shift: float = 0.0
    rotation_degrees: float = 0.0
    zoom: float = 0.0
    zoom_in_only: bool = False
    shear: float = 0.0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    @property
    def moves_only(self) -> bool:
        """Whether pictures are only moved, by whole pixels."""
        return self.shift > 0 and not (
            self.rotation_degrees or self.zoom or self.shear or self.flip
        )


PRESETS = {
    "none": Preset(),
    # By whole pixels and nothing else: a thirtieth of the cost of the next one.
    "shift": Preset(shift=0.08),
    # A mirrored digit is another digit or none, and a 6 on its head is a 9: small angles, no flip.
    "digits": Preset(shift=0.08, rotation_degrees=10, zoom=0.1, shear=0.1),
    "natural": Preset(
        rotation_degrees=5,
        zoom=0.25,
        zoom_in_only=True,
        flip=True,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
    ),
}

Augmentation = Callable[[Tensor, int, Tensor], Tensor]


def augmentation(name: str, seed: int) -> Augmentation | None:
    """The preset `name` for a run with this seed; None where it changes nothing.

    The function takes a batch of uint8 pictures `[N, C, H, W]`, the epoch, and which samples they
    are, int64 `[N]` on the CPU; it gives uint8 `[N, C, H, W]` on the pictures' device.
    """
    preset = PRESETS[name]
    if preset == Preset():
        return None

    def augment(pictures: Tensor, epoch: int, samples: Tensor) -> Tensor:
        draws = uniforms(seed_for(seed, "augment", epoch=epoch), samples, NUM_DRAWS)
        return changed(pictures, preset, on_its_way(draws, pictures.device) * 2 - 1)

    return augment


def changed(pictures: Tensor, preset: Preset, draws: Tensor) -> Tensor:
    """`pictures` changed by `preset`.

    Args:
        pictures: uint8 `[N, C, H, W]`.
        preset: the bounds.
        draws: float32 `[N, NUM_DRAWS]` in [-1, 1): the share of each bound that is used.

    Returns:
        uint8 `[N, C, H, W]`; row i depends on row i of the arguments only.
    """
    if preset.moves_only:
        return _moved(pictures, preset.shift, draws)
    seen = _sampled(pictures.float(), _transform(preset, draws))
    return _recoloured(seen, preset, draws).round_().clamp_(0, 255).to(torch.uint8)


def _moved(pictures: Tensor, shift: float, draws: Tensor) -> Tensor:
    """Whole pixels up, down, left or right; the border is repeated."""
    num, channels, height, width = pictures.shape
    by_y = (draws[:, 0] * (shift * height + 0.5)).round().long().view(num, 1, 1)
    by_x = (draws[:, 1] * (shift * width + 0.5)).round().long().view(num, 1, 1)
    device = pictures.device
    rows = (torch.arange(height, device=device).view(1, -1, 1) + by_y).clamp_(0, height - 1)
    columns = (torch.arange(width, device=device).view(1, 1, -1) + by_x).clamp_(0, width - 1)
    index = (rows * width + columns).view(num, 1, -1).expand(-1, channels, -1)
    return pictures.flatten(2).gather(2, index).view_as(pictures)


def _transform(preset: Preset, draws: Tensor) -> Tensor:
    """Where each output pixel is looked up, as `[N, 2, 3]` on coordinates from -1 to 1."""
    angle = draws[:, 2] * math.radians(preset.rotation_degrees)
    zoom, shear = _zoom(preset, draws[:, 3]), draws[:, 4] * preset.shear
    mirror = torch.where(draws[:, 5] < 0, -1.0, 1.0) if preset.flip else torch.ones_like(angle)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    slack = 1 - zoom if preset.zoom_in_only else torch.full_like(zoom, 2 * preset.shift)
    return torch.stack(
        (
            torch.stack((cos * mirror, shear * cos - sin, draws[:, 0] * slack), 1),
            torch.stack((sin * mirror, shear * sin + cos, draws[:, 1] * slack), 1),
        ),
        1,
    )


def _zoom(preset: Preset, draws: Tensor) -> Tensor:
    """Below 1 is nearer: a smaller part of the picture fills the frame."""
    return 1 - (draws + 1) / 2 * preset.zoom if preset.zoom_in_only else 1 + draws * preset.zoom


def _sampled(pictures: Tensor, transform: Tensor) -> Tensor:
    """Bilinear; the border is repeated, so that it may be black or white.

    The grid is spelled out: a matrix product would round a picture's own row differently in
    batches of different sizes.
    """
    height, width = pictures.shape[2:]
    y = ((torch.arange(height, device=pictures.device) * 2 + 1) / height - 1).view(1, -1, 1)
    x = ((torch.arange(width, device=pictures.device) * 2 + 1) / width - 1).view(1, 1, -1)
    cells = transform.view(-1, 6, 1, 1)
    grid = torch.stack(
        (
            cells[:, 0] * x + cells[:, 1] * y + cells[:, 2],
            cells[:, 3] * x + cells[:, 4] * y + cells[:, 5],
        ),
        3,
    )
    return F.grid_sample(
        pictures, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _recoloured(pictures: Tensor, preset: Preset, draws: Tensor) -> Tensor:
    """Saturation, contrast and brightness: each draws the picture nearer to or farther from its
    grey, its mean, and black."""
    if preset.saturation and pictures.shape[1] == 3:
        grey = pictures.mean(1, keepdim=True)
        pictures = grey + (pictures - grey) * _factor(preset.saturation, draws[:, 6])
    if preset.contrast:
        mean = pictures.mean((1, 2, 3), keepdim=True)
        pictures = mean + (pictures - mean) * _factor(preset.contrast, draws[:, 7])
    if preset.brightness:
        pictures = pictures * _factor(preset.brightness, draws[:, 8])
    return pictures


def _factor(bound: float, draws: Tensor) -> Tensor:
    return (1 + draws * bound).view(-1, 1, 1, 1)
