"""What an engine reports of an attempt, and what a report makes of its job. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from lathe.jobs import messages, transitions
from lathe.jobs.model import (
    AdapterObject,
    Attempt,
    EventLevel,
    Job,
    JobState,
    NewEvent,
    SlicePlan,
    StepMetrics,
)
from lathe.jobs.transitions import Trigger

# A longer sentence is cut: an event is for reading.
MAX_NOTE = 4000
# The kind of the note that says what the heaviest slice takes; its data are bytes and tokens.
MEMORY = "memory"
# The kind of the note on a checkpoint that no attempt can go on from.
DAMAGED = "checkpoint_damaged"
# Warnings: what costs the user something; sharded: that not every engine can serve the result.
_WARNINGS = frozenset({DAMAGED, "out_of_memory", "sharded"})


@dataclass(frozen=True, slots=True)
class ReportedCheckpoint:
    step: int
    object: AdapterObject
    metrics: StepMetrics | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence of the engine that users are told; kind: such as out_of_memory, early_stopping, generation."""

    step: int
    kind: str
    message: str
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of an attempt."""

    attempt_id: str
    lease_token: str
    metrics: Sequence[StepMetrics] = ()
    checkpoints: Sequence[ReportedCheckpoint] = ()
    slice_plan: SlicePlan | None = None
    total_steps: int = 0
    notes: Sequence[Note] = ()
    # Steps of checkpoints that keep_checkpoints gives up; their files go once this is answered.
    dropped_checkpoints: Sequence[int] = ()


def progressed(job: Job, attempt: Attempt, progress: Progress) -> tuple[Job, list[NewEvent]]:
    """State, plan and counters after a report."""
    events: list[NewEvent] = []
    state = job.state
    if state is JobState.STARTING:
        state = transitions.apply(state, Trigger.REPORTED)
    start_time = job.start_time
    if start_time is None:
        start_time = attempt.create_time
        events.append(messages.started())
    step = max([job.step, *(row.step for row in progress.metrics)])
    total = progress.total_steps or job.total_steps
    reason = f"Training: step {step} of {total}." if state is JobState.RUNNING else job.state_reason
    return (
        replace(
            job,
            state=state,
            state_reason=reason,
            start_time=start_time,
            step=step,
            total_steps=total,
            slice_plan=job.slice_plan or progress.slice_plan,
        ),
        events,
    )


def estimate(job: Job, metrics: Sequence[StepMetrics], now: datetime) -> datetime | None:
    """When the job will be done if its steps go on as the last ones did."""
    seconds = [row.step_seconds for row in metrics if row.step_seconds > 0]
    if not seconds:
        return job.estimated_finish_time
    left = max(0, job.total_steps - job.step)
    return now + timedelta(seconds=left * sum(seconds) / len(seconds))


def note_events(notes: Sequence[Note]) -> list[NewEvent]:
    """The events of sentences, each sentence of a step once. What is kept for estimates is none."""
    events = [_note_event(note) for note in notes if note.kind != MEMORY]
    return list({(event.step, event.kind, event.message): event for event in events}.values())


def _note_event(note: Note) -> NewEvent:
    level = EventLevel.WARN if note.kind in _WARNINGS else EventLevel.INFO
    data = {key: _cut(value) for key, value in note.data.items()}
    return NewEvent(_cut(note.message), level=level, step=note.step, kind=note.kind[:32], data=data)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_NOTE else f"{text[: MAX_NOTE - 1]}…"
