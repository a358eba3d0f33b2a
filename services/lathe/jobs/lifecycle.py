"""What the end of an attempt or of a job means for the job. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from lathe.jobs import messages, policy, transitions
from lathe.jobs.model import Attempt, EventLevel, Job, JobError, JobState, NewEvent, Outcome
from lathe.jobs.transitions import Trigger


def ended(job: Job, state: JobState, reason: str, now: datetime) -> Job:
    """The job in a terminal state, holding nothing any more."""
    return replace(
        job,
        state=state,
        state_reason=reason,
        finish_time=now,
        estimated_finish_time=None,
        hold_until=None,
        attempt_id="",
        lease_token="",
    )


def failed(job: Job, trigger: Trigger, error: JobError, now: datetime) -> tuple[Job, list[NewEvent]]:
    """The job after it failed for `error`. Raises FailedPrecondition if the table does not let it."""
    state = transitions.apply(job.state, trigger)
    return replace(ended(job, state, error.message, now), error=error), [messages.failed(error)]


def after_attempt(job: Job, attempt: Attempt, why: str, now: datetime) -> tuple[Job, list[NewEvent]]:
    """The job after its current attempt ended with `attempt.outcome`.

    why: in words, for a lost attempt. Raises FailedPrecondition if the job is in no state to hold an attempt.
    """
    outcome = attempt.outcome or Outcome.LOST
    job = replace(
        job,
        lost_lease_count=job.lost_lease_count + (outcome is Outcome.LOST),
        retry_count=job.retry_count + (outcome is Outcome.RETRYABLE),
    )
    trigger = _spent(job, outcome) or transitions.trigger_of(outcome)
    state = transitions.apply(job.state, trigger)
    error = attempt.error or JobError("server_error", why or "The attempt gave no reason.")
    match state:
        case JobState.FAILED:
            return failed(job, trigger, _in_users_words(job, _blame(job, trigger, error)), now)
        case JobState.CANCELLED:
            return ended(job, state, "Cancelled by the user.", now), [messages.cancelled()]
        case JobState.RUNNING:
            return _trained(job, attempt, now), []
        case _:
            return _given_back(job, state, attempt, error, now)


def _spent(job: Job, outcome: Outcome) -> Trigger | None:
    spent = (outcome is Outcome.LOST and job.lost_lease_count > policy.MAX_LOST_LEASES) or (
        outcome is Outcome.RETRYABLE and job.retry_count > policy.MAX_RETRIES
    )
    if spent and transitions.allowed(job.state, Trigger.BUDGET_SPENT):
        return Trigger.BUDGET_SPENT
    return None


def _blame(job: Job, trigger: Trigger, error: JobError) -> JobError:
    if trigger is not Trigger.BUDGET_SPENT:
        return error
    tries = f"{job.lost_lease_count} lost and {job.retry_count} failed attempts"
    return JobError(
        "server_error", f"Given up after {tries}; the last one said: {error.message}", error.param
    )


def _in_users_words(job: Job, error: JobError) -> JobError:
    """An engine knows the parent as a folder only; users know it as a model."""
    return messages.parent_deleted(job.parent) if error.code == messages.PARENT_DELETED else error


def _trained(job: Job, attempt: Attempt, now: datetime) -> Job:
    return replace(
        job,
        state=JobState.RUNNING,
        state_reason="Training is complete; the model is being registered.",
        start_time=job.start_time or attempt.create_time,
        estimated_finish_time=now,
        trained_tokens=max(job.trained_tokens, attempt.trained_tokens),
        step=max(job.step, attempt.step),
        final_attempt_id=attempt.id,
        attempt_id="",
        lease_token="",
    )


def _given_back(
    job: Job, state: JobState, attempt: Attempt, error: JobError, now: datetime
) -> tuple[Job, list[NewEvent]]:
    hold, events = None, []
    if attempt.outcome is Outcome.RETRYABLE:
        hold = now + timedelta(seconds=5.0 * 2 ** min(job.retry_count, 5))
    if attempt.outcome in (Outcome.RETRYABLE, Outcome.LOST):
        events.append(messages.attempt_lost(attempt.number, error.message.rstrip(".")))
    reason = (
        "Paused; it goes on from its newest checkpoint when it is resumed."
        if state is JobState.PAUSED
        else "Waits for an engine to go on from its newest checkpoint."
    )
    changed = replace(
        job,
        state=state,
        state_reason=reason,
        hold_until=hold,
        estimated_finish_time=None,
        attempt_id="",
        lease_token="",
    )
    return changed, events


def warning(message: str) -> NewEvent:
    """Something that users should know and that does not end the job."""
    return NewEvent(message, level=EventLevel.WARN)
