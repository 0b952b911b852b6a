"""What changes weights: one step after the other, on one rank's share of each batch.

A single process is a rank that shares with nobody. Where several share, each computes the gradients
of its samples, weighted by how many they are; the sum over all ranks is the gradient of the whole
batch, and every rank then takes the same step.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.device import choose_device, supports_bf16
from training.augment import augmentation
from training.average import Average
from training.config import FitConfig
from training.datasets import Dataset
from training.drawn import DrawnForAll
from training.feed import Fed, feed_for
from training.layout import laid_out, layout_of
from training.mixing import mixed
from training.optim import learning_rate_at, optimizer_for, parameter_groups
from training.order import Batch, Order
from training.randomness import seed_device, seed_for
from training.replayed_step import ReplayedStep, recorder_for
from training.share import share_of
from training.state import State

TrainMode = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Exchange:
    """How one of several ranks adds its numbers to those of the others.

    Attributes:
        rank: counted from 0.
        num_ranks: in all.
        sum: replaces a float32 tensor by the sum over all ranks, in the same bits everywhere.
    """

    rank: int
    num_ranks: int
    sum: Callable[[Tensor], None]


class Stepper:
    """A network, its optimizer and its share of the samples.

    Args:
        network: changed in place; moved to the device that `config` names.
        dataset: whose training part is learned.
        config: everything that can be set.
        train_mode: puts the network into training mode.
        scale_of: a parameter's name to the factor of its learning rate.
        exchange: with whom each batch is shared; None where with nobody.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset,
        config: FitConfig,
        train_mode: TrainMode,
        scale_of: Callable[[str], float] | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.config, self.train_mode, self.exchange = config, train_mode, exchange
        self.device = choose_device(config.device)
        self.layout = layout_of(network)
        network = network.to(self.device).to(memory_format=self.layout)
        groups = parameter_groups(network, config.weight_decay, scale_of)
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        average = Average(network, config.ema_decay) if config.ema_decay else None
        self.state = State(network, optimizer_for(config, groups), average)
        self.augment = augmentation(config.augment, config.seed)
        self.autocast = _autocast(config, self.device)
        self.order = Order(len(dataset.train), config.batch_size, config.epochs, config.seed)
        # Pictures that each epoch changes are finished after that.
        self.finish = dataset.preprocessing.finisher(self.device)
        finish = None if self.augment else self.finish
        self.feed = feed_for(dataset.train, self.device, dataset.num_workers, finish)
        self.weights = _class_weights(dataset, config, self.device)
        self._learning: list[nn.Parameter] | None = None
        self._share_right = torch.zeros(())
        self._answers = (torch.zeros(0, 1), torch.zeros(0))
        self._replayed: ReplayedStep | None = None

    def batches(self) -> Fed:
        """This rank's share of every batch to come."""
        return self.feed(self._shares())

    def train(self) -> None:
        """Put the network into training mode."""
        self.train_mode(self.state.network)

    def step(self, batch: Batch, inputs: Tensor, targets: Tensor) -> None:
        """One change of the weights; the loss stays on the device, nothing waits for it."""
        state = self.state
        seed_device(self.device, seed_for(self.config.seed, "step", step=batch.step))
        if self.augment and len(targets):
            inputs = self.finish(self.augment(inputs, batch.epoch, batch.indices))
        rate = self.learning_rate(batch.step)
        if self._replayed is not None:
            loss, logits = self._replayed(inputs, targets, rate)
            self._answers = (logits, targets)
        else:
            state.optimizer.zero_grad()
            loss = self._learn(batch, inputs, targets)
            if self.exchange:
                loss = self._shared(self.exchange, batch, loss)
            self._follow_gradients(rate)
        state.step += 1
        if state.average:
            state.average.update(state.network, state.step)
        state.unreported.append(loss)

    def may_record(self, num_steps: int) -> None:
        """Where that many steps pay for it, they are recorded and replayed.

        Not where ranks share a step, nor where each batch is mixed in another way.
        """
        recorder = recorder_for(self.device, num_steps)
        if recorder is None or self.exchange or self.config.mixup or self.config.cutmix:
            return
        num_rows = self.config.batch_size
        self._replayed = ReplayedStep(self._change, self.state.optimizer, recorder, num_rows)

    def learning_rate(self, step: int) -> float:
        """Of that step, before a layer's own factor."""
        return learning_rate_at(self.config, step, self.order.num_steps)

    @property
    def accuracy(self) -> float:
        """Of the last batch."""
        if self.exchange:
            return float(self._share_right)
        logits, targets = self._answers
        return float((logits.argmax(1) == targets).float().mean())

    def _change(
        self, x: Tensor, targets: Tensor, learning_rate: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """One change of the weights without anything around it: its loss and logits."""
        self.state.optimizer.zero_grad()
        with self.autocast():
            logits = self.state.network(laid_out(x, self.layout))
        loss = self._loss(logits, targets)
        self._differentiate(loss)
        self._follow_gradients(learning_rate)
        return loss.detach(), logits.detach()

    def _follow_gradients(self, learning_rate: float | Tensor) -> None:
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        self.state.optimizer.step(learning_rate)

    def _shares(self) -> Iterator[Batch]:
        batches = self.order.batches(self.state.step)
        if self.exchange is None:
            return batches
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        mixes = bool(self.config.mixup or self.config.cutmix)
        return (share_of(batch, rank, num_ranks, with_neighbour=mixes) for batch in batches)

    def _learn(self, batch: Batch, inputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the gradients; give the loss, weighted by the share of the batch."""
        if not len(targets):
            self._answers = (torch.zeros(0, 1, device=self.device), targets)
            return torch.zeros((), device=self.device)
        config = self.config
        x, others, share = inputs, targets, 1.0
        if config.mixup or config.cutmix:
            x, others, share = mixed(
                x, targets, config.mixup, config.cutmix, config.seed, batch.step
            )
        if batch.has_neighbour:
            x, targets, others = x[1:], targets[1:], others[1:]
        drawn = DrawnForAll(batch, len(x)) if self.exchange else nullcontext()
        with self.autocast(), drawn:
            logits = self.state.network(laid_out(x, self.layout))
        loss = share * self._loss(logits, targets)
        if share < 1:
            loss = loss + (1 - share) * self._loss(logits, others)
        if batch.weight < 1:
            loss = loss * batch.weight
        self._differentiate(loss)
        self._answers = (logits.detach(), targets)
        found: Tensor = loss.detach()
        return found

    def _differentiate(self, loss: Tensor) -> None:
        """Give each parameter its gradient, which lies in memory as the parameter does.

        As `backward` does, but for a copy that it makes of gradients that someone else holds, as a
        tape does. Optimizers take the two as they lie.
        """
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, found, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch; a sample counts as much as its class weighs."""
        smoothing, logits = self.config.label_smoothing, logits.float()
        if self.weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        each = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
        return (each * self.weights.take(targets)).mean()

    def _shared(self, exchange: Exchange, batch: Batch, loss: Tensor) -> Tensor:
        """Everything that ranks tell each other in a step, in one tensor; give the whole loss.

        One sum in a fixed order, not buckets in the order in which gradients become ready: so the
        bits do not depend on when a run was interrupted.
        """
        logits, targets = self._answers
        right = (logits.argmax(1) == targets).float().sum() / batch.size
        parameters, statistics = self._learning_of(exchange), self._statistics()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [one.grad for one in parameters if one.grad is not None]
        mine = [torch.stack((loss.float(), right))]
        mine += [gradient.reshape(-1) for gradient in gradients]
        mine += [one.reshape(-1) * batch.weight for one in statistics]
        whole = torch.cat(mine)
        exchange.sum(whole)
        (found, self._share_right), rest = whole[:2], whole[2:]
        for tensor in (*gradients, *statistics):
            piece, rest = rest[: tensor.numel()], rest[tensor.numel() :]
            tensor.copy_(piece.view(tensor.shape))
        agreed: Tensor = found.clone()
        return agreed

    def _learning_of(self, exchange: Exchange) -> list[nn.Parameter]:
        """Parameters that have a gradient on any rank; agreed on in the first step."""
        if self._learning is None:
            has = [float(parameter.grad is not None) for parameter in self.parameters]
            found = torch.tensor(has, device=self.device)
            exchange.sum(found)
            pairs = zip(self.parameters, found.tolist(), strict=True)
            self._learning = [parameter for parameter, number in pairs if number]
        return self._learning

    def _statistics(self) -> list[Tensor]:
        """What batch norms have noted of the samples they saw: averaged over ranks, by samples."""
        return [
            tensor
            for part in self.state.network.modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training
            for tensor in (part.running_mean, part.running_var)
            if tensor is not None
        ]


def _class_weights(dataset: Dataset, config: FitConfig, device: torch.device) -> Tensor | None:
    """float32 `[classes]`, with a mean of 1 over the training samples; None where all are 1."""
    if config.class_weights == "none":
        return None
    counts = dataset.train.targets.bincount(minlength=len(dataset.classes)).float()
    present = int((counts > 0).sum())
    return (counts.sum() / (present * counts.clamp(min=1))).to(device)


def _autocast(config: FitConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """bf16 where it is wanted; `auto` wants it on GPUs, whose hardware has it.

    On a CPU `auto` stays with fp32: the result would otherwise depend on the processor type.
    """
    automatic = device.type == "cuda" and supports_bf16(device)
    if config.precision == "bf16" or (config.precision == "auto" and automatic):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


@contextmanager
def repeatable(device: torch.device, threads: int, determinism: str) -> Iterator[None]:
    """This many threads and cuDNN's repeatable algorithms while a run lasts; if it must be
    exact, operations that have no repeatable form are refused.
    """
    cudnn, mode = torch.backends.cudnn, torch.get_deterministic_debug_mode()
    before = cudnn.deterministic, cudnn.benchmark, torch.get_num_threads()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    # Writing all memory before its use takes some per cent of a small network's step.
    memory.fill_uninitialized_memory = determinism == "exact"
    torch.set_num_threads(threads)
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = True, False
    if determinism == "exact" or (determinism == "auto" and device.type == "cpu"):
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before[:2]
        torch.set_num_threads(before[2])
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fills
