"""The pieces of a batch that ranks take."""

import pytest
import torch

from training.mixing import mixed
from training.order import Batch, Order
from training.share import share_of


def batch(num: int) -> Batch:
    return Batch(step=3, epoch=1, indices=torch.arange(100, 100 + num))


@pytest.mark.parametrize("num", [1, 2, 3, 5, 8, 9, 33])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_pieces_are_the_batch_in_its_order(num: int, num_ranks: int) -> None:
    pieces = [share_of(batch(num), rank, num_ranks) for rank in range(num_ranks)]
    assert torch.cat([piece.indices for piece in pieces]).equal(batch(num).indices)
    assert sum(piece.weight for piece in pieces) == pytest.approx(1)
    assert {piece.size for piece in pieces} == {num}
    assert len(pieces[0].indices)
    assert num == 1 or all(len(piece.indices) != 1 for piece in pieces)


def test_every_rank_draws_the_same_order() -> None:
    order = Order(43, 8, 2, seed=5)
    wholes = list(order.batches())
    for whole, first, second in zip(wholes, order.batches(), order.batches(), strict=True):
        shares = [share_of(first, 0, 2), share_of(second, 1, 2)]
        assert torch.cat([one.indices for one in shares]).equal(whole.indices)


@pytest.mark.parametrize("num", [4, 7])
def test_mixing_a_piece_is_a_piece_of_the_mixed_batch(num: int) -> None:
    x = torch.rand(200, 1, 6, 6)
    whole = batch(num).indices
    expected = mixed(x[whole], whole, 0.4, 1.0, seed=0, step=3)
    found_x, found_others = [], []
    for rank in range(2):
        piece = share_of(batch(num), rank, 2, with_neighbour=True)
        mine, others, share = mixed(x[piece.indices], piece.indices, 0.4, 1.0, seed=0, step=3)
        assert share == expected[2]
        found_x.append(mine[1:])
        found_others.append(others[1:])
    assert torch.cat(found_x).equal(expected[0])
    assert torch.cat(found_others).equal(expected[1])
