"""Folds: who is held out when, and what their curves choose."""

import torch

from training.folds import best_of, folds_of
from training.samples import InMemory
from training.source import Part
from training.state import Epoch


def curve(*accuracies: float) -> list[Epoch]:
    return [Epoch(n, n * 10, 0.0, 1 / n, one) for n, one in enumerate(accuracies, start=1)]


def part(digests: tuple[bytes, ...]) -> Part:
    targets = torch.arange(len(digests)) % 2
    return Part(InMemory(torch.zeros(len(digests), 1)), targets, digests)


def test_the_same_picture_twice_is_held_out_once() -> None:
    digests = tuple(bytes([number // 2]) * 32 for number in range(40))
    folds = folds_of(part(digests), 5, seed=0).tolist()
    assert folds[::2] == folds[1::2]
    assert set(folds) == {0, 1, 2, 3, 4}


def test_the_epoch_is_chosen_over_all_folds_by_their_size() -> None:
    small, large = curve(1.0, 0.5, 0.5), curve(0.5, 0.75, 0.75)
    assert best_of([(1, small), (9, large)]) == 3  # equal accuracy, less loss
    assert best_of([(9, small), (1, large)]) == 1
    assert best_of([]) == 0
