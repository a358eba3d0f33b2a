"""Every way from one job state to another, as one table.

`python -m lathe.jobs.transitions` prints it as Markdown for docs/job-states.md.
"""

from __future__ import annotations

from enum import StrEnum

from lathe.common.errors import FailedPrecondition
from lathe.jobs.model import TERMINAL_STATES, JobState, Outcome


class Trigger(StrEnum):
    """What can happen to a job."""

    FILES_VALID = "files_valid"
    FILES_INVALID = "files_invalid"
    REFUSED = "refused"
    LEASED = "leased"
    REPORTED = "reported"
    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    PREEMPT = "preempt"
    ATTEMPT_SUCCEEDED = "attempt_succeeded"
    ATTEMPT_FAILED = "attempt_failed"
    ATTEMPT_RELEASED = "attempt_released"
    ATTEMPT_CANCELLED = "attempt_cancelled"
    ATTEMPT_RETRYABLE = "attempt_retryable"
    LEASE_LOST = "lease_lost"
    BUDGET_SPENT = "budget_spent"
    REGISTERED = "registered"
    REGISTRATION_REFUSED = "registration_refused"


MEANINGS: dict[Trigger, str] = {
    Trigger.FILES_VALID: "datasets has audited every file",
    Trigger.FILES_INVALID: "the audit found what cannot train, or a file is gone",
    Trigger.REFUSED: "no engine for the base model can be started",
    Trigger.LEASED: "an engine took the job as a new attempt",
    Trigger.REPORTED: "the attempt reported its first progress",
    Trigger.CANCEL: "the user cancels",
    Trigger.PAUSE: "the user pauses",
    Trigger.RESUME: "the user resumes",
    Trigger.PREEMPT: "the policy wants the place for another job",
    Trigger.ATTEMPT_SUCCEEDED: "the attempt wrote the final adapter",
    Trigger.ATTEMPT_FAILED: "the attempt says that the job cannot succeed",
    Trigger.ATTEMPT_RELEASED: "the engine gave the attempt back after a checkpoint",
    Trigger.ATTEMPT_CANCELLED: "the engine stopped the attempt",
    Trigger.ATTEMPT_RETRYABLE: "something around the attempt failed; another may do better",
    Trigger.LEASE_LOST: "the lease ran out, or the engine died or lost a worker",
    Trigger.BUDGET_SPENT: "too many retryable errors or lost leases",
    Trigger.REGISTERED: "the adapters and the result file are registered",
    Trigger.REGISTRATION_REFUSED: "what the attempt wrote cannot be registered",
}

# Triggers that end an attempt, and where a job without a wish of its own goes then.
_GIVES_BACK = (
    Trigger.ATTEMPT_RELEASED,
    Trigger.ATTEMPT_CANCELLED,
    Trigger.ATTEMPT_RETRYABLE,
    Trigger.LEASE_LOST,
)
_HOLDING = (JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.PREEMPTING)


def _table() -> dict[tuple[JobState, Trigger], JobState]:
    s, t = JobState, Trigger
    rows: dict[tuple[JobState, Trigger], JobState] = {
        (s.VALIDATING_FILES, t.FILES_VALID): s.QUEUED,
        (s.VALIDATING_FILES, t.FILES_INVALID): s.FAILED,
        (s.VALIDATING_FILES, t.CANCEL): s.CANCELLED,
        # A replica of the version before had resolved it without the options that it does not know.
        (s.QUEUED, t.FILES_VALID): s.QUEUED,
        (s.QUEUED, t.FILES_INVALID): s.FAILED,
        (s.QUEUED, t.LEASED): s.STARTING,
        (s.QUEUED, t.REFUSED): s.FAILED,
        (s.QUEUED, t.CANCEL): s.CANCELLED,
        (s.QUEUED, t.PAUSE): s.PAUSED,
        (s.PAUSED, t.RESUME): s.QUEUED,
        (s.PAUSED, t.CANCEL): s.CANCELLED,
        (s.STARTING, t.REPORTED): s.RUNNING,
        (s.STARTING, t.PAUSE): s.PAUSING,
        (s.RUNNING, t.PAUSE): s.PAUSING,
        (s.STARTING, t.PREEMPT): s.PREEMPTING,
        (s.RUNNING, t.PREEMPT): s.PREEMPTING,
        (s.PREEMPTING, t.PAUSE): s.PAUSING,
        (s.PAUSING, t.RESUME): s.PREEMPTING,
        (s.RUNNING, t.REGISTERED): s.SUCCEEDED,
        (s.RUNNING, t.REGISTRATION_REFUSED): s.FAILED,
        # A cancel that was accepted stands, however the attempt ends.
        (s.CANCELLING, t.ATTEMPT_SUCCEEDED): s.CANCELLED,
        (s.CANCELLING, t.ATTEMPT_FAILED): s.CANCELLED,
    }
    after_attempt = {
        s.STARTING: s.QUEUED,
        s.RUNNING: s.QUEUED,
        s.PREEMPTING: s.QUEUED,
        s.PAUSING: s.PAUSED,
        s.CANCELLING: s.CANCELLED,
    }
    for state, target in after_attempt.items():
        rows.update({(state, trigger): target for trigger in _GIVES_BACK})
    for state in _HOLDING:
        rows[state, t.CANCEL] = s.CANCELLING
        rows[state, t.ATTEMPT_SUCCEEDED] = s.RUNNING
        rows[state, t.ATTEMPT_FAILED] = s.FAILED
        rows[state, t.BUDGET_SPENT] = s.FAILED
    return rows


TABLE = _table()

# ATTEMPT_SUCCEEDED leads to RUNNING, where only the registration is left: nothing may give that attempt back.
_OUTCOMES = {
    Outcome.SUCCEEDED: Trigger.ATTEMPT_SUCCEEDED,
    Outcome.FAILED: Trigger.ATTEMPT_FAILED,
    Outcome.RELEASED: Trigger.ATTEMPT_RELEASED,
    Outcome.CANCELLED: Trigger.ATTEMPT_CANCELLED,
    Outcome.RETRYABLE: Trigger.ATTEMPT_RETRYABLE,
    Outcome.LOST: Trigger.LEASE_LOST,
}


def trigger_of(outcome: Outcome) -> Trigger:
    """What the end of an attempt means to its job."""
    return _OUTCOMES[outcome]


def allowed(state: JobState, trigger: Trigger) -> bool:
    """Whether the table has a row for it."""
    return (state, trigger) in TABLE


def apply(state: JobState, trigger: Trigger) -> JobState:
    """The next state. Raises FailedPrecondition if the table has no row."""
    target = TABLE.get((state, trigger))
    if target is None:
        raise FailedPrecondition(
            f"A job that is {state.replace('_', ' ')} cannot do this: {trigger.replace('_', ' ')}.",
            reason="JOB_STATE",
            metadata={"state": str(state), "trigger": str(trigger)},
        )
    return target


def markdown() -> str:
    """The table for docs/job-states.md."""
    lines = ["| From | When | To |", "|---|---|---|"]
    for state in JobState:
        for trigger in Trigger:
            if (state, trigger) in TABLE:
                lines.append(f"| `{state}` | `{trigger}`: {MEANINGS[trigger]} | `{TABLE[state, trigger]}` |")
    ends = ", ".join(f"`{state}`" for state in JobState if state in TERMINAL_STATES)
    lines += ["", f"Nothing leaves {ends}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
