"""Carries out evaluations and promotions in this server, one at a time, oldest first.

Each is a row of the job store: created here or by another process, claimed by the server that is
free. Whoever created one may wait for its end, and gets the exception where it fails.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from app.errors import BadInput, Draining, NoSuchEvaluation, ServiceError, refusal_of
from app.evaluation.answer import Evaluation
from app.evaluation.documents import Documents
from app.evaluation.evaluator import Evaluator
from app.evaluation.question import Question
from app.evaluation.rule import Rule
from app.evaluation.uploads import Uploads
from app.jobs.job import Job, JobError, Kind, NewJob, StaleWorker
from app.jobs.store import JobStore
from app.promotion import Promotion, Proposal, promote
from models.store import ModelStore
from training.faults import DatasetError
from training.progress import Progress
from training.report import ReportError
from training.trial import ClassesUnknown, NoEvidence

log = logging.getLogger(__name__)

KINDS: Final = (Kind.EVALUATION, Kind.PROMOTION)
LOOK_S: Final = 2.0
"""How often the store is looked at for work that other processes left there."""


class Examiner:
    """The owner of one server's evaluations.

    Args:
        jobs: where they are rows.
        documents: where what they found is kept.
        uploads: samples that go with the evaluation that they were sent for.
        evaluator: of this server.
        store: whose aliases move.
        timeout_s: no evaluation takes longer.
    """

    def __init__(
        self,
        jobs: JobStore,
        documents: Documents,
        uploads: Uploads,
        evaluator: Evaluator,
        store: ModelStore,
        timeout_s: float,
    ) -> None:
        self.jobs, self.documents, self.uploads = jobs, documents, uploads
        self._evaluator, self._store, self._timeout_s = evaluator, store, timeout_s
        self._worker = f"{socket.gethostname()}-{os.getpid()}-examiner"
        self._something = asyncio.Event()
        self._endings: dict[str, asyncio.Future[None]] = {}
        self._running: tuple[str, asyncio.Task[Mapping[str, Any]]] | None = None
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work."""
        self._loop = asyncio.create_task(self._work(), name="evaluations")

    async def stop(self) -> None:
        """Give back what is running: it is queued again, and another server may take it."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        for ending in self._endings.values():
            if not ending.done():
                ending.set_exception(Draining("the service is stopping"))
                ending.exception()

    async def create(self, new: NewJob, wait_s: float) -> Job:
        """Queue `new`, and wait for its end for at most `wait_s` seconds.

        Returns:
            The job as it stands then.

        Raises:
            Whatever it failed with, if it failed in this time.
        """
        job = await asyncio.to_thread(self._create, new)
        ending = self._endings.setdefault(job.id, asyncio.get_running_loop().create_future())
        self._something.set()
        # Read again: it may have been claimed, and done, before anybody waited for its end.
        job = await asyncio.to_thread(self.jobs.get, job.id)
        # What was written down a moment ago may not have been told yet.
        is_told = ending.done() or self._task_of(job) is not None
        if wait_s <= 0 or (job.is_final and not is_told):
            self._endings.pop(job.id, None)
            return job
        try:
            async with asyncio.timeout(wait_s):
                await asyncio.shield(ending)
        except TimeoutError:
            pass
        finally:
            self._endings.pop(job.id, None)
        return await asyncio.to_thread(self.jobs.get, job.id)

    async def cancel(self, job_id: str, by: str) -> Job:
        """End it, wherever it is; raises as `JobStore.cancel`."""
        job = await asyncio.to_thread(self.jobs.cancel, job_id, by=by)
        task = self._task_of(job)
        if task is not None:
            task.cancel()  # what it reads goes when it has ended
        else:
            await asyncio.to_thread(self._let_go, job)
        return job

    async def read(self, job_id: str) -> dict[str, Any]:
        """What it found.

        Raises:
            NoSuchEvaluation: it is not finished, or was deleted.
        """
        found = await asyncio.to_thread(self.documents.read, job_id)
        if found is None:
            raise NoSuchEvaluation(f"{job_id} has no report: it has not succeeded, or is deleted")
        return found

    def _create(self, new: NewJob) -> Job:
        """The job; samples that were sent twice for one, or for none, go at once."""
        try:
            job = self.jobs.create(new, fingerprint=_fingerprint(new))
        except Exception:
            self._let_go(new)
            raise
        if job.options != new.options:
            self._let_go(new)
        return job

    def _task_of(self, job: Job) -> "asyncio.Task[Mapping[str, Any]] | None":
        """What works at it; None where it is not in hand here."""
        return self._running[1] if self._running and self._running[0] == job.id else None

    def _let_go(self, job: Job | NewJob) -> None:
        self.uploads.remove(job.options["question"]["dataset"])

    def _sweep(self) -> None:
        unfinished = self.jobs.unfinished(KINDS)
        self.uploads.sweep({one.options["question"]["dataset"] for one in unfinished})

    async def _work(self) -> None:
        try:
            await asyncio.to_thread(self._sweep)
        except (ServiceError, OSError) as error:
            log.warning("what killed servers left of uploads stays there: %s", error)
        while True:
            try:
                job = await asyncio.to_thread(self._claim)
            except ServiceError as error:
                log.error("evaluations wait: %s", error)
                job = None
            if job is not None:
                await self._carry_out(job)
                continue
            self._something.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._something.wait()

    def _claim(self) -> Job | None:
        return self.jobs.claim(KINDS, self._worker)

    async def _carry_out(self, job: Job) -> None:
        """The edge of a job: whatever it raises is written down, and told to who waits."""
        progress: dict[str, Any] = {}
        task = asyncio.create_task(self._result(job, progress))
        self._running = job.id, task
        heart = asyncio.create_task(self._beat(job, progress, task))
        error: BaseException | None = None
        try:
            result = await task
            await asyncio.to_thread(self.jobs.heartbeat, job, dict(progress))
            await asyncio.to_thread(self.jobs.succeed, job, result)
        except asyncio.CancelledError:
            if asyncio.current_task() is not None and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                with contextlib.suppress(Exception):
                    self.jobs.release(job, "its server stopped", is_blamed=False)
                self._running = None
                raise
            error = BadInput(f"{job.id} was cancelled")
        except StaleWorker:
            error = BadInput(f"{job.id} was cancelled")
        except Exception as failure:
            error = failure
            await self._fail(job, failure)
        finally:
            heart.cancel()
            task.cancel()
        await asyncio.to_thread(self._let_go, job)
        self._running = None
        self._end(job, error)

    async def _fail(self, job: Job, failure: Exception) -> None:
        told = refusal_of(failure)
        if told.status == 500:
            log.error("%s failed", job.id, exc_info=failure)
        error = JobError(told.code, told.message, told.param)
        try:
            await asyncio.to_thread(self.jobs.fail, job, error)
        except (StaleWorker, ServiceError) as late:
            log.warning("%s ended, and this could not be written down: %s", job.id, late)

    def _end(self, job: Job, error: BaseException | None) -> None:
        ending = self._endings.get(job.id)
        if ending is None or ending.done():
            return
        if error is None:
            ending.set_result(None)
        else:
            ending.set_exception(error)
            ending.exception()  # who waited may have gone

    async def _beat(self, job: Job, progress: Mapping[str, Any], task: "asyncio.Task[Any]") -> None:
        """Keep the lease, tell how far it is, and notice that somebody cancelled it elsewhere."""
        while True:
            await asyncio.sleep(min(1.0, self.jobs.lease_s / 3))
            try:
                await asyncio.to_thread(self.jobs.heartbeat, job, dict(progress))
            except StaleWorker:
                task.cancel()
                return
            except ServiceError as error:
                log.warning("no heartbeat of %s: %s", job.id, error)

    async def _result(self, job: Job, progress: dict[str, Any]) -> Mapping[str, Any]:
        def watch(step: Progress) -> None:
            progress.update(
                done=step.step,
                total=step.num_steps,
                accuracy=step.accuracy,
                seconds_left=step.seconds_left,
            )

        question = question_of(job.options["question"])
        deadline = time.monotonic() + self._timeout_s
        try:
            if job.kind is Kind.EVALUATION:
                evaluation = await self._evaluator.evaluate(question, deadline, watch)
                promotion = None
            else:
                proposal = self._proposal(job, question)
                promotion = await promote(proposal, self._evaluator, self._store, deadline, watch)
                evaluation_or_none = promotion.evaluation
                if evaluation_or_none is None:
                    return {"promotion": promotion.to_json()}
                evaluation = evaluation_or_none
        except (ClassesUnknown, NoEvidence, DatasetError, ReportError) as error:
            raise BadInput(str(error)) from error
        return await asyncio.to_thread(self._keep, job, evaluation, promotion)

    def _proposal(self, job: Job, question: Question) -> Proposal:
        asked = job.options["proposal"]
        return Proposal(
            name=asked["name"],
            alias=asked["alias"],
            version=asked["version"],
            rule=Rule.model_validate(asked["rule"]),
            question=question,
            by=job.by,
            source=job.id,
        )

    def _keep(
        self, job: Job, evaluation: Evaluation, promotion: Promotion | None
    ) -> Mapping[str, Any]:
        """Write what was found; the row gets its figures."""
        told = None if promotion is None else promotion.to_json()
        self.documents.write(job.id, {**evaluation.to_json(), "promotion": told})
        return {
            "figures": evaluation.report.figures(),
            "sentence": evaluation.sentence,
            "models": [f"{name}:{version}" for name, version in evaluation.models],
            "promotion": told,
        }


def options_of(question: Question, proposal: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a job's row holds of what is to be done."""
    options: dict[str, Any] = {"question": {**asdict(question), "top_k": list(question.top_k)}}
    return options if proposal is None else {**options, "proposal": dict(proposal)}


def _fingerprint(new: NewJob) -> str:
    """Of what was asked for: the same samples are the same, wherever they lie."""
    question = {**new.options["question"], "dataset": new.dataset}
    asked = [new.kind, {**new.options, "question": question}, new.model]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def question_of(options: Mapping[str, Any]) -> Question:
    """The question that `options_of` wrote down."""
    return Question(**{**options, "top_k": tuple(options["top_k"])})
