"""What an attempt's reports say of its speed. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from lathe.jobs.figures import Speed, Work
from lathe.jobs.model import Attempt, EngineRecord, Job, StepMetrics
from lathe.jobs.progress import MEMORY, Note


def begun(attempt: Attempt, job: Job, engine: EngineRecord | None, now: datetime) -> Speed:
    """Of an attempt that has done nothing yet. engine: None if it is gone."""
    plan, chosen = job.slice_plan, job.hyperparameters
    return Speed(
        attempt_id=attempt.id,
        work=Work(
            job.base.digest,
            job.base.parameter_count,
            job.spec.method,
            chosen is not None and chosen.full_parameter,
            job.compute.workers,
        ),
        engine_class=engine.engine_class if engine is not None else job.compute.engine_class,
        device=plan.device if plan is not None else engine.device if engine is not None else "",
        threads=plan.threads if plan is not None else engine.threads if engine is not None else 0,
        tokens=0.0,
        seconds=0.0,
        steps=0,
        update_time=now,
    )


def continued(
    known: Speed, steps: Sequence[StepMetrics], engine: EngineRecord | None, now: datetime
) -> Speed:
    """With steps that it did since."""
    held = engine.memory_bytes if engine is not None else 0
    return replace(
        known,
        tokens=known.tokens + math.fsum(step.tokens_per_second * step.step_seconds for step in steps),
        seconds=known.seconds + math.fsum(step.step_seconds for step in steps),
        steps=known.steps + len(steps),
        update_time=now,
        held_bytes=max(known.held_bytes, held),
    )


def pass_memory(notes: Sequence[Note]) -> tuple[int, int] | None:
    """Bytes and tokens of the heaviest slice, if a note says them."""
    for note in notes:
        if note.kind == MEMORY:
            found = note.data.get("bytes", ""), note.data.get("tokens", "")
            if all(text.isdecimal() and len(text) <= 15 for text in found):
                return int(found[0]), min(int(found[1]), 2**31 - 1)
    return None
