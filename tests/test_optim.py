"""Optimizers and schedules against torch's own."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from training.config import FitConfig
from training.optim import SGD, AdamW, Group, Optimizer, learning_rate_at, parameter_groups


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def by_decay(parameters: nn.Module, decay: float) -> list[dict[str, Any]]:
    weights = [p for p in parameters.parameters() if p.ndim > 1]
    others = [p for p in parameters.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


PAIRS: dict[str, tuple[Callable[[list[Group]], Optimizer], Callable[[Any], Any]]] = {
    "sgd": (lambda groups: SGD(groups, 0.0), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        lambda groups: SGD(groups, 0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ),
    "nesterov": (
        lambda groups: SGD(groups, 0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adamw": (AdamW, lambda p: torch.optim.AdamW(p, lr=0.1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_weights_move_as_torchs_own_optimizer_moves_them(name: str) -> None:
    ours, theirs = network(), network()
    make, make_oracle = PAIRS[name]
    optimizer = make(parameter_groups(ours, weight_decay=0.1))
    oracle = make_oracle(by_decay(theirs, 0.1))
    for step in range(20):
        x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        oracle.zero_grad()
        ours(x).square().mean().backward()
        theirs(x).square().mean().backward()
        optimizer.step(0.1)
        oracle.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_norms_and_biases_do_not_decay_and_frozen_weights_are_left_out() -> None:
    parameters = network()
    parameters[0].requires_grad_(False)
    groups = parameter_groups(parameters, 0.1, lambda name: 0.5 if name == "3.weight" else 1.0)
    assert {group.names: (group.weight_decay, group.learning_rate_scale) for group in groups} == {
        ("1.weight", "1.bias", "3.bias"): (0.0, 1.0),
        ("3.weight",): (0.1, 0.5),
    }


def test_a_groups_learning_rate_is_scaled() -> None:
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    SGD([Group(("w",), (weight,), 0.0, 0.25)], momentum=0.0).step(1.0)
    assert weight.item() == -0.25


@pytest.mark.parametrize("name", PAIRS)
def test_state_taken_over_continues_to_the_bit(name: str) -> None:
    def steps(optimizer: Optimizer, net: nn.Module, count: range) -> None:
        for step in count:
            optimizer.zero_grad()
            net(torch.full((2, 1, 8, 8), step / 10)).square().mean().backward()
            optimizer.step(0.01)

    first, make = network(), PAIRS[name][0]
    optimizer = make(parameter_groups(first, 0.1))
    steps(optimizer, first, range(3))
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = make(parameter_groups(second, 0.1))
    resumed.load_state({key: value.clone() for key, value in optimizer.state().items()}, 3)
    steps(optimizer, first, range(3, 6))
    steps(resumed, second, range(3, 6))
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


def rates(num_steps: int, **settings: Any) -> list[float]:
    config = FitConfig.of(learning_rate=0.1, **settings)
    return [learning_rate_at(config, step, num_steps) for step in range(num_steps)]


def test_one_cycle_is_torchs_own() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=50, pct_start=0.2, cycle_momentum=False
    )
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert rates(50, schedule="one-cycle", warmup=0.2) == pytest.approx(expected)


def test_constant_and_cosine_begin_with_a_linear_warm_up() -> None:
    assert rates(10, warmup=0.4) == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 7)
    cosine = rates(10, schedule="cosine", warmup=0.2)
    assert cosine[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert all(later < earlier for earlier, later in itertools.pairwise(cosine[2:]))
    assert 0 < cosine[-1] < 0.005


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_runs_have_a_learning_rate(schedule: str, num_steps: int) -> None:
    assert all(0 < rate <= 0.1 for rate in rates(num_steps, schedule=schedule))
