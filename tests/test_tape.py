"""Operations that were noted, and are done again."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.tape import Tape, Unrepeatable


def test_it_does_the_same_with_other_inputs_and_changes_what_lies_outside() -> None:
    weight, seen = torch.randn(3, 4, requires_grad=True), torch.zeros(())

    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.add_(1.0)
        loss = F.linear(x, weight).tanh().sum()
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    inputs, others = torch.randn(5, 4), torch.randn(5, 4)
    tape = Tape([inputs])
    with tape:
        outputs = work(inputs)
    with torch.no_grad():
        weight.mul_(2.0)
    repeated, expected = tape.repeated(outputs)(others), work(others)
    assert all(torch.equal(one, other) for one, other in zip(repeated, expected, strict=True))
    assert seen == 3


def test_random_numbers_are_drawn_again() -> None:
    x = torch.ones(1000)
    tape = Tape([x])
    with tape:
        noted = F.dropout(x)
    repeat = tape.repeated([noted])
    torch.manual_seed(5)
    (found,) = repeat(x)
    torch.manual_seed(5)
    assert torch.equal(found, F.dropout(x))
    assert not torch.equal(found, noted)


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x[x > 0]])
def test_what_shows_python_a_number_is_not_repeated(ask: object) -> None:
    x = torch.ones(3)
    tape = Tape([x])
    with tape:
        ask(x)  # type: ignore[operator]
        doubled = x * 2
    with pytest.raises(Unrepeatable, match="shows Python a number"):
        tape.repeated([doubled])


def test_an_answer_that_was_there_before_is_not_repeated() -> None:
    x = torch.ones(3)
    with Tape([x]) as tape:
        pass
    with pytest.raises(Unrepeatable, match="not computed"):
        tape.repeated([torch.ones(3)])


def test_tapes_agree_on_the_same_calls_on_the_same_memory() -> None:
    x, weight = torch.ones(3), torch.ones(3)

    def noted(factor: float, other: Tensor) -> Tape:
        tape = Tape([x])
        with tape:
            (x * other).mul_(factor)
        return tape

    first = noted(2.0, weight)
    assert first.agrees_with(noted(2.0, weight))
    assert not first.agrees_with(noted(3.0, weight))
    assert not first.agrees_with(noted(2.0, weight.clone()))
