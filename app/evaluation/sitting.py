"""One evaluation, from the samples to what was found; it belongs to the thread that runs it.

Threads read samples ahead, and every batch is a request to the live predictor at the lowest
priority, two of them at any moment, so that the device never waits and no predict waits for more
than one batch. While others are asking, one short batch is asked for at a time, and a long rest
follows it: as a predict comes at any moment, the share of the device that is taken is the share of
predicts that meet a batch, and at two in a hundred their 99th percentile hardly sees it.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor

from app.engine.predictor import Prediction, Predictor
from app.evaluation.answer import Evaluation, Speed, thumbnails_of
from app.evaluation.asking import Asking
from app.evaluation.out_of_fold import OutOfFold
from app.evaluation.question import Question
from app.evaluation.reader import Piece, Reader, joined
from models.seen import read_seen
from training.config import DataConfig
from training.datasets import measured_on, split_source
from training.measure import as_trained, whole
from training.progress import Progress
from training.source import Part
from training.trial import Answered, ClassesUnknown, Contender, Findings, Trial, run_trial

IN_FLIGHT: Final = 2
"""Requests given to the predictor: one computes, the next one waits behind it."""
PIECE_S: Final = 0.01
"""About so long a thread reads before it hands over, so that whoever decodes a picture gets one."""
GENTLE_MS: Final = 1.5
"""So long may a batch compute while others are asking; a single row may take longer."""
ITEM_BATCHES: Final = 4
"""So many batches are asked for at once where nobody else asks; whoever comes goes between them."""
GENTLE_SHARE: Final = 0.02
"""Of the device's time, while others are asking, where the deadline leaves it."""
NICENESS: Final = 10
COUNTED_ROWS, COUNTED_S = 128, 0.5
MAX_FAULTS_LISTED: Final = 20
MAX_TIMED: Final = 128
NUM_ALONE: Final = 15
ALONE_S: Final = 2.0


class Sitting:
    """One evaluation; it belongs to the thread that runs it."""

    def __init__(
        self,
        question: Question,
        predictors: Sequence[Predictor],
        asking: Asking,
        num_threads: int,
        watch: Callable[[Progress], None],
    ) -> None:
        self._question, self._predictors, self._asking = question, predictors, asking
        self._num_threads, self._watch = num_threads, watch
        # Versions with the same preprocessing share what was read.
        self._preprocessings = list(
            {
                one.manifest.preprocessing.model_dump_json(): one.manifest.preprocessing
                for one in predictors
            }.values()
        )
        self._input_of = [
            self._preprocessings.index(one.manifest.preprocessing) for one in predictors
        ]
        run = asking.folder_of_run(question.run)
        self._out_of_fold = OutOfFold.of_run(run, predictors[0].labels)
        self._temperatures = tuple(one.manifest.temperature or 1.0 for one in predictors)
        self._unreadable: list[str] = []
        self._num_unreadable = 0
        self._batches: list[list[tuple[float, int]]] = [[] for _ in predictors]
        self._last: Piece | None = None
        self._num_left = 0

    def run(self) -> Evaluation:
        """Read, ask, count, and say what was found."""
        began = time.perf_counter()
        torch.set_num_threads(1)  # of this thread: what it counts is little
        source = split_source(self._config())
        name = self._question.part or measured_on(source.parts)
        if name not in source.parts:
            there = ", ".join(source.parts)
            raise ClassesUnknown(f"{self._question.shown_as} has no part {name!r}; it has {there}")
        part, leave_out = source.parts[name], self._question.leave_out_seen
        trial = Trial(
            [self._contender(place) for place in range(len(self._predictors))],
            source.classes,
            leave_out_seen=len(self._predictors) > 1 if leave_out is None else leave_out,
        )
        with ThreadPoolExecutor(self._num_threads, "evaluate-read", step_back) as threads:
            findings = self._drive(trial, part, threads)
            seconds = time.perf_counter() - began
            listed = _listed(findings)
            shown = part.samples.prepared(self._preprocessings[0])
            return Evaluation(
                models=tuple((one.name, one.version) for one in self._predictors),
                labels=tuple(one.labels for one in self._predictors),
                temperatures=self._temperatures,
                dataset=self._question.shown_as,
                part=name,
                findings=findings,
                speeds=tuple(
                    self._speed(place, findings.num_offered / seconds)
                    for place in range(len(self._predictors))
                ),
                names={index: part.samples.name(index) for index in listed},
                thumbnails=thumbnails_of(shown, listed, self._preprocessings[0]),
                unreadable=tuple(self._unreadable),
                num_unreadable=self._num_unreadable,
                num_out_of_fold=self._out_of_fold.num_used,
                seconds=seconds,
            )

    def _config(self) -> DataConfig:
        from training.builtin import NAMES

        question, manifest = self._question, self._predictors[0].manifest
        if question.dataset in NAMES:
            return as_trained(manifest, question.dataset, data_root=question.data_root)
        return whole(question.dataset)

    def _contender(self, place: int) -> Contender:
        predictor = self._predictors[place]
        name = f"{predictor.name}:{predictor.version}"
        folder = self._asking.folder_of(predictor)
        seen = read_seen(folder, predictor.manifest.files)
        return Contender(name, predictor.labels, seen if place else self._out_of_fold.without(seen))

    def _drive(self, trial: Trial, part: Part, threads: ThreadPoolExecutor) -> Findings:
        self._num_left = len(part)
        needs_digests = trial.needs_digests or bool(self._out_of_fold)
        reader = Reader(part, self._preprocessings, needs_digests)
        items = self._items(trial, self._pieces(reader, len(part), threads))
        batches = _gathered(self._answered(items))
        loop = run_trial(trial, batches, len(part), self._question.top_k)
        try:
            while True:
                progress = next(loop)
                self._asking.check()
                self._watch(progress)
        except StopIteration as stop:
            findings: Findings = stop.value
            return findings
        finally:
            loop.close()

    def _pieces(
        self, reader: "Reader", num_samples: int, threads: ThreadPoolExecutor
    ) -> Iterator[Piece]:
        """Everything in turn, read ahead by threads in pieces of about the same time."""
        ahead: deque[Future[Piece]] = deque()
        begun, rows = 0, 1
        try:
            while ahead or begun < num_samples:
                room = self._num_threads + 1 if self._asking.is_quiet else 1
                while begun < num_samples and len(ahead) < room:
                    chosen = range(begun, min(begun + rows, num_samples))
                    ahead.append(threads.submit(reader.read, chosen))
                    begun = chosen.stop
                piece = ahead.popleft().result()
                self._asking.check()
                if len(piece.indices):
                    # Not more than doubled: the first picture also loads the codecs.
                    row_s = piece.seconds / len(piece.indices)
                    rows = max(1, min(int(PIECE_S / max(row_s, 1e-9)), 2 * rows, reader.max_rows))
                yield piece
        finally:
            for one in ahead:
                one.cancel()

    def _items(self, trial: Trial, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """What is evidence, in as many rows as a batch should have now."""
        held: list[Piece] = []
        num_held = 0
        for piece in pieces:
            self._note(piece.faults)
            self._out_of_fold.meet(piece.indices, piece.digests)
            admitted = trial.admit(piece.digests, len(piece.indices))
            if bool(admitted.any()):
                held.append(piece if bool(admitted.all()) else piece.rows(admitted))
                num_held += len(held[-1].indices)
            wanted = self._batch_rows()
            while num_held >= wanted:
                rest = joined(held)
                yield rest.rows(slice(0, wanted))
                held, num_held = [rest.rows(slice(wanted, None))], num_held - wanted
                wanted = self._batch_rows()
        while num_held > 0:
            rest, wanted = joined(held), self._batch_rows()
            yield rest.rows(slice(0, wanted))
            held, num_held = [rest.rows(slice(wanted, None))], num_held - wanted

    def _batch_rows(self) -> int:
        """As many as fit a few batches; while others ask, as many as compute in a moment."""
        lanes = [one.lane for one in self._predictors]
        largest = min(lane.largest_batch for lane in lanes)
        if self._asking.is_quiet:
            return ITEM_BATCHES * largest
        rows = largest
        while rows > 1 and max(lane.expected_ms(rows) for lane in lanes) > GENTLE_MS:
            rows //= 2
        return rows

    def _answered(self, items: Iterator[Piece]) -> Iterator[Answered]:
        """Every item with its answers, two of them on the way at any moment."""
        asked: deque[tuple[Piece, list[Future[Prediction] | None]]] = deque()
        try:
            for item in items:
                asked.append((item, self._ask(item)))
                while len(asked) >= (IN_FLIGHT if self._asking.is_quiet else 1):
                    answered, compute_s = self._answer(*asked.popleft())
                    yield answered
                    self._num_left -= len(answered.indices)
                    self._rest(compute_s, self._num_left / len(answered.indices))
            while asked:
                yield self._answer(*asked.popleft())[0]
        finally:
            for _, futures in asked:
                for future in futures:
                    if future is not None:
                        future.cancel()

    def _rest(self, compute_s: float, num_batches: float) -> None:
        """While others ask, leave them the device after a batch that had it for `compute_s`.

        The rests of the `num_batches` that are left take half of the time that is left, at most.
        """
        if not self._asking.is_quiet:
            most_s = self._asking.left_s / 2 / max(1.0, num_batches)
            self._asking.rest(min(compute_s * (1 / GENTLE_SHARE - 1), most_s))

    def _ask(self, item: Piece) -> "list[Future[Prediction] | None]":
        """Begin to ask everybody; not the candidate, where all its answers are here already."""
        self._last = item
        return [
            None
            if place == 0 and self._out_of_fold.covers(item.indices)
            else self._asking.ask(predictor, item.inputs[self._input_of[place]])
            for place, predictor in enumerate(self._predictors)
        ]

    def _answer(
        self, item: Piece, futures: "list[Future[Prediction] | None]"
    ) -> tuple[Answered, float]:
        """What was answered, and how long it took the device in seconds."""
        logits: list[Tensor] = []
        compute_s = 0.0
        for place, future in enumerate(futures):
            if future is None:
                logits.append(self._out_of_fold.put_into(None, item.indices))
                continue
            prediction = self._asking.wait(future)
            compute_s += prediction.compute_ms / 1000
            if len(self._batches[place]) < MAX_TIMED:
                self._batches[place].append((prediction.compute_ms, len(item.indices)))
            temperature = self._temperatures[place]
            scaled = prediction.logits if temperature == 1.0 else prediction.logits / temperature
            own = self._out_of_fold.put_into(scaled, item.indices) if place == 0 else scaled
            logits.append(own)
        return Answered(item.indices, item.targets, tuple(logits)), compute_s

    def _speed(self, place: int, samples_per_second: float) -> Speed:
        """With a few inputs more, each alone."""
        alone = sorted(self._alone_ms(place))
        batches = sorted(self._batches[place])
        batch_ms, batch_rows = batches[len(batches) // 2] if batches else (0.0, 0)
        return Speed(
            samples_per_second=round(samples_per_second, 3),
            alone_p50_ms=round(alone[len(alone) // 2], 3),
            alone_p90_ms=round(alone[len(alone) * 9 // 10], 3),
            batch_rows=batch_rows,
            batch_ms=round(batch_ms, 3),
        )

    def _alone_ms(self, place: int) -> list[float]:
        assert self._last is not None  # something was counted
        row = self._last.inputs[self._input_of[place]][:1]
        until = time.monotonic() + ALONE_S
        found: list[float] = []
        while len(found) < NUM_ALONE and (not found or time.monotonic() < until):
            asked = self._asking.ask(self._predictors[place], row)
            found.append(self._asking.wait(asked).compute_ms)
            self._rest(found[-1] / 1000, NUM_ALONE)
        return found

    def _note(self, faults: Sequence[str]) -> None:
        self._num_unreadable += len(faults)
        self._unreadable += faults[: MAX_FAULTS_LISTED - len(self._unreadable)]


def step_back() -> None:
    """Let the calling thread, which decodes, leave the processors to those that answer."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where a thread has a niceness of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _gathered(answers: Iterator[Answered]) -> Iterator[Answered]:
    """The same in larger batches: what counting costs is a price for each, and others pay it too.

    No answer waits for long, so that progress is seen.
    """
    held: list[Answered] = []
    since = time.monotonic()
    for one in answers:
        held.append(one)
        if sum(len(each.targets) for each in held) >= COUNTED_ROWS or (
            time.monotonic() - since > COUNTED_S
        ):
            yield _one_of(held)
            held, since = [], time.monotonic()
    if held:
        yield _one_of(held)


def _one_of(answers: Sequence[Answered]) -> Answered:
    return Answered(
        torch.cat([one.indices for one in answers]),
        torch.cat([one.targets for one in answers]),
        tuple(torch.cat(each) for each in zip(*(one.logits for one in answers), strict=True)),
    )


def _listed(findings: Findings) -> list[int]:
    """Samples that are named in the answer."""
    pair = findings.comparison
    indices = [one.index for one in findings.mistakes]
    if pair is not None:
        indices += [one.index for one in (*pair.gained, *pair.lost)]
    return sorted(set(indices))
