"""Estimates of jobs: what is on record and the engines there are, brought to the rules of estimates.py."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lathe.common.clock import Clock
from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.jobs import auditing, estimates, hyperparameters
from lathe.jobs.estimates import Engines
from lathe.jobs.figures import NO_PRICES, BreakEven, JobEstimate, Prices, ReplacedPrompt, Speed, Work
from lathe.jobs.forecast import Scene, seconds_until
from lathe.jobs.model import ONE_CLASS, EngineClasses, Job, JobError, JobState
from lathe.jobs.ports import Audit, JobStore, User
from lathe.jobs.quotas import Quotas
from lathe.jobs.requests import JobRequest
from lathe.jobs.service import JobsService
from lathe.jobs.training import Hyperparameters
from lathe.jobs.workers import holding

# Attempts on record that are looked at.
_ON_RECORD = 500


@dataclass(frozen=True, slots=True)
class Estimator:
    """device and threads: of the engines that this platform starts; `` and 0 if that is not known to it. bfloat16:
    whether the CPUs of all engines have instructions for it; None if that is not known."""

    store: JobStore
    quotas: Quotas
    clock: Clock
    prices: Prices = NO_PRICES
    classes: EngineClasses = ONE_CLASS
    device: str = ""
    threads: int = 0
    bfloat16: bool | None = None

    async def estimate(self, job: Job, chosen: Hyperparameters, audits: Sequence[Audit]) -> JobEstimate:
        """job: one that waits or is about to, kept already or not. audits: READY; of the training file and, if there is
        one, the validation file."""
        now = self.clock.now()
        asking = replace(
            job,
            state=JobState.QUEUED,
            queue_time=job.queue_time or now,
            hyperparameters=chosen,
            estimate=None,
        )
        async with self.store.read() as session:
            measured = await session.speeds(_ON_RECORD)
            others = [one for one in await session.jobs_in([JobState.QUEUED]) if one.id != job.id]
            scene = Scene(
                now,
                running=await holding(session),
                engines=await session.engines(),
                attempts=await session.open_attempts(),
            )
        scene = replace(
            scene,
            queued=others,
            quotas=await self.quotas.running(one.project for one in (*others, asking)),
        )
        training, validation = audits[0], audits[1] if len(audits) > 1 else Audit("", audits[0].state)
        tokens = estimates.tokens_of(
            chosen,
            examples=training.rows,
            tokens=training.input_tokens,
            trained=training.trained_tokens,
            max_row=training.max_row_tokens,
            steps=hyperparameters.total_steps(chosen, training.rows),
            validation_examples=validation.rows,
            validation_tokens=validation.input_tokens,
        )
        base, compute = job.base, job.compute
        work = Work(base.digest, base.parameter_count, chosen.method, chosen.full_parameter, compute.workers)
        names = [compute.engine_class, *(one for one in self.classes.known if one != compute.engine_class)]
        # In a thread: a long line takes a while to play through.
        classes = await asyncio.to_thread(
            lambda: [self._class(_of_class(asking, name), scene, measured) for name in names]
        )
        return estimates.job_estimate(tokens, work, classes, measured, self.prices)

    def _class(self, asking: Job, scene: Scene, measured: Sequence[Speed]) -> Engines:
        name = asking.compute.engine_class
        alike = [one for one in scene.engines if one.engine_class == name and one.device]
        seen = [one for one in measured if one.engine_class == name]
        known = [(one.device, one.threads) for one in alike] + [(one.device, one.threads) for one in seen]
        device, threads = (*known, (self.device, self.threads))[0]
        wait = seconds_until(asking, replace(scene, queued=[*scene.queued, asking]))
        return Engines(name, device, threads, wait, self.bfloat16)


def _of_class(job: Job, engine_class: str) -> Job:
    return replace(job, compute=replace(job.compute, engine_class=engine_class))


@dataclass(frozen=True, slots=True)
class Answer:
    """estimate: None while the files are being audited. break_even: if it was asked for."""

    estimate: JobEstimate | None = None
    break_even: BreakEven | None = None


@dataclass(frozen=True, slots=True)
class EstimatesService:
    """What users can ask before they make a job."""

    jobs: JobsService
    estimator: Estimator

    async def estimate(self, request: JobRequest, replaced: ReplacedPrompt | None, user: User) -> Answer:
        """What the job would take.

        Raises what JobsService.create raises, quotas apart, and InvalidArgument for files that cannot be trained on and
        for a replaced prompt that says too little.
        """
        if replaced is not None:
            estimates.check_replaced(replaced)
        asked = await self.jobs.checked(request, user)
        spec, base = asked.spec, asked.model.base
        files = auditing.Files(request.project, base, spec.method, asked.training, asked.validation)
        audits = await auditing.audit_files(self.jobs.datasets, files)
        if isinstance(audits, JobError):
            path = f"job.{audits.param.removesuffix('_file')}_dataset"
            raise InvalidArgument(
                audits.message,
                reason=audits.code.upper(),
                violations=[FieldViolation(path, audits.message)],
            )
        if not auditing.are_ready(audits):
            return Answer()
        chosen = hyperparameters.resolve(spec, base, audits[0].rows)
        draft = self.jobs.draft(request, asked)
        found = await self.estimator.estimate(draft, chosen, audits)
        if replaced is None:
            return Answer(found)
        return Answer(found, estimates.break_even(found, replaced, self.estimator.prices))
