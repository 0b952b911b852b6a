"""Randomness as a function: equal arguments give equal numbers, everything else is independent."""

import torch

from training.randomness import generator, seed_for, seeded, uniforms


def test_a_seed_is_the_same_in_every_process_and_differs_in_every_argument() -> None:
    assert seed_for(0, "shuffle") == 1299125535095788908
    seeds = {
        seed_for(seed, purpose, epoch, step, sample)
        for seed in range(3)
        for purpose in ("a", "b")
        for epoch in range(3)
        for step in range(3)
        for sample in range(3)
    }
    assert len(seeds) == 3 * 2 * 3 * 3 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_of_other_purposes_are_other_streams() -> None:
    draws = [torch.rand(4, generator=generator(1, purpose)) for purpose in ("a", "b", "a")]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_a_samples_numbers_do_not_depend_on_its_company() -> None:
    alone, together = uniforms(9, torch.tensor([5]), 4), uniforms(9, torch.arange(10), 4)
    assert torch.equal(alone[0], together[5])


def test_uniforms_are_even_and_independent() -> None:
    draws = uniforms(seed_for(0, "test"), torch.arange(100_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert torch.allclose(draws.mean(0), torch.tensor(0.5), atol=0.005)
    assert torch.allclose(draws.var(0), torch.tensor(1 / 12), atol=0.001)
    neighbours = torch.cat((draws[1:], draws[:-1]), 1)
    correlation = torch.corrcoef(neighbours.T) - torch.eye(8)
    assert correlation.abs().max() < 0.015


def test_seeded_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with seeded(7):
        torch.rand(5)
    assert torch.equal(torch.rand(1), expected)
