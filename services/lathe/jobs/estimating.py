"""Estimates of jobs: what is on record and the engines there are, brought to the rules of estimates.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from lathe.common.clock import Clock
from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.jobs import auditing, estimates, hyperparameters
from lathe.jobs.estimates import Engines
from lathe.jobs.figures import NO_PRICES, BreakEven, JobEstimate, Prices, ReplacedPrompt, Speed, Work
from lathe.jobs.model import (
    LEASED_STATES,
    ONE_CLASS,
    BaseRef,
    ComputeSpec,
    EngineClasses,
    EngineRecord,
    EngineState,
    Job,
    JobError,
    JobState,
    Place,
)
from lathe.jobs.ports import Audit, JobStore, User
from lathe.jobs.requests import JobRequest
from lathe.jobs.service import JobsService
from lathe.jobs.training import Hyperparameters

# Attempts on record that are looked at.
_ON_RECORD = 500


@dataclass(frozen=True, slots=True)
class Estimator:
    """device and threads: of the engines that this platform starts; `` and 0 if that is not known to it."""

    store: JobStore
    clock: Clock
    prices: Prices = NO_PRICES
    classes: EngineClasses = ONE_CLASS
    device: str = ""
    threads: int = 0

    async def estimate(
        self, base: BaseRef, compute: ComputeSpec, chosen: Hyperparameters, audits: Sequence[Audit]
    ) -> JobEstimate:
        """audits: READY; of the training file and, if there is one, the validation file."""
        async with self.store.read() as session:
            measured = await session.speeds(_ON_RECORD)
            engines = await session.engines()
            jobs = await session.jobs_in([*sorted(LEASED_STATES), JobState.QUEUED])
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
        work = Work(base.digest, base.parameter_count, chosen.method, chosen.full_parameter, compute.workers)
        names = [compute.engine_class, *(one for one in self.classes.known if one != compute.engine_class)]
        classes = [
            self._class(Place(base.digest, name), compute.dedicated, engines, jobs, measured)
            for name in names
        ]
        return estimates.job_estimate(tokens, work, classes, measured, self.prices)

    def _class(
        self,
        place: Place,
        dedicated: bool,
        engines: Sequence[EngineRecord],
        jobs: Sequence[Job],
        measured: Sequence[Speed],
    ) -> Engines:
        alike = [one for one in engines if one.engine_class == place.engine_class and one.device]
        seen = [one for one in measured if one.engine_class == place.engine_class]
        known = [(one.device, one.threads) for one in alike] + [(one.device, one.threads) for one in seen]
        device, threads = (*known, (self.device, self.threads))[0]
        if dedicated:
            # One is started for it; nothing is before it in the line.
            return Engines(place.engine_class, device, threads, free_in=(0.0,))
        free_in, ahead = _line(place, engines, jobs, self.clock.now())
        return Engines(place.engine_class, device, threads, free_in, ahead)


def _line(
    place: Place, engines: Sequence[EngineRecord], jobs: Sequence[Job], now: datetime
) -> tuple[list[float | None], list[float | None]]:
    """When each place for a job is free, and how long those who wait for one will take; seconds."""
    serving = [one for one in engines if one.place == place and not one.draining]
    places = sum(one.max_attempts for one in serving if one.state is EngineState.READY)
    free_in: list[float | None] = []
    ahead: list[float | None] = []
    for job in jobs:
        if job.place != place:
            continue
        if job.state in LEASED_STATES:
            end = job.estimated_finish_time
            free_in.append(max(0.0, (end - now).total_seconds()) if end is not None else None)
        else:
            taken = job.estimate.engines[0].seconds if job.estimate is not None else None
            ahead.append(taken.likely if taken is not None else None)
    return [*free_in[:places], *([0.0] * (places - len(free_in)))], ahead


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
        found = await self.estimator.estimate(base, asked.compute, chosen, audits)
        if replaced is None:
            return Answer(found)
        return Answer(found, estimates.break_even(found, replaced, self.estimator.prices))
