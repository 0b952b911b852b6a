"""What dropout draws for the pieces of a batch, against what it draws for the whole."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from training.drawn import DrawnForAll
from training.order import Batch
from training.share import share_of

NUM = 11
Network = Callable[[Tensor], Tensor]


def by_pieces(network: Network, rows: Tensor, num_ranks: int) -> Tensor:
    """What all ranks answer, each for its own rows, all with one seed."""
    batch, answers = Batch(0, 0, torch.arange(NUM)), []
    for rank in range(num_ranks):
        piece = share_of(batch, rank, num_ranks)
        torch.manual_seed(7)
        with DrawnForAll(piece, len(piece.indices)):
            answers.append(network(rows[piece.indices]))
    return torch.cat(answers)


def at_once(network: Network, rows: Tensor) -> Tensor:
    torch.manual_seed(7)
    return network(rows)


def depth(rows: Tensor) -> Tensor:
    return stochastic_depth(rows, 0.5, "row")


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Dropout(0.3), (6,)),
        (nn.Dropout(0.3, inplace=True), (6,)),
        (nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Dropout(0.5)), (3, 4, 4)),
        (nn.Dropout1d(0.5), (5, 3)),
        (nn.Dropout2d(0.5), (5, 3, 3)),
        (nn.Dropout3d(0.5), (5, 2, 2, 2)),
        (depth, (3, 4, 4)),
    ],
)
def test_a_sample_keeps_what_was_drawn_for_it(
    network: Network, shape: tuple[int, ...], num_ranks: int
) -> None:
    rows = torch.rand((NUM, *shape), generator=torch.Generator().manual_seed(1)) + 1
    whole = at_once(network, rows.clone())
    assert (whole == 0).any(), "something must be dropped"
    assert (whole != 0).any()
    assert torch.equal(by_pieces(network, rows, num_ranks), whole)


def test_pictures_in_channels_last_draw_in_that_order() -> None:
    rows = torch.rand(NUM, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    network = nn.Dropout(0.5)
    assert torch.equal(by_pieces(network, rows, 2), at_once(network, rows))


def test_who_predicts_drops_nothing() -> None:
    rows = torch.rand(NUM, 6)
    assert torch.equal(by_pieces(nn.Dropout(0.5).eval(), rows, 2), rows)


def test_gradients_are_those_of_the_whole() -> None:
    rows = torch.rand(NUM, 6, requires_grad=True)
    network = nn.Dropout(0.5)
    for answer in (by_pieces(network, rows, 2), at_once(network, rows)):
        answer.square().sum().backward()
    assert rows.grad is not None
    once = torch.autograd.grad(at_once(network, rows).square().sum(), rows)[0]
    assert torch.allclose(rows.grad, 2 * once)
