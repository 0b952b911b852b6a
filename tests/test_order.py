"""Which samples each step sees."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.order import Order, in_turn

sizes = st.integers(1, 60)


@given(num=sizes, batch=sizes, epochs=st.integers(1, 3))
def test_every_epoch_sees_every_sample_once_and_never_one_alone(
    num: int, batch: int, epochs: int
) -> None:
    order = Order(num, batch, epochs, seed=0)
    batches = list(order.batches())
    assert len(batches) == order.num_steps == order.steps_per_epoch * epochs
    for epoch in range(epochs):
        seen = torch.cat([b.indices for b in batches if b.epoch == epoch])
        assert sorted(seen.tolist()) == list(range(num))
    if num > 1 and batch > 1:
        assert min(len(b.indices) for b in batches) > 1


@given(num=sizes, batch=sizes, first=st.integers(0, 50))
def test_a_resumed_order_goes_on_where_it_stopped(num: int, batch: int, first: int) -> None:
    order = Order(num, batch, 3, seed=1)
    whole, rest = list(order.batches()), list(order.batches(first))
    assert len(rest) == len(whole[first:])
    for mine, other in zip(rest, whole[first:], strict=True):
        assert (mine.step, mine.epoch) == (other.step, other.epoch)
        assert torch.equal(mine.indices, other.indices)


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [next(Order(50, 50, 1, seed).batches()).indices.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    first, second = (batch.indices.tolist() for batch in Order(50, 50, 2, 0).batches())
    assert first != second


def test_measuring_goes_in_turn() -> None:
    assert [batch.indices.tolist() for batch in in_turn(5, 2)] == [[0, 1], [2, 3], [4]]
