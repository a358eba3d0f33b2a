"""Waiting with the `openai` SDK, which has no such calls for jobs."""

from __future__ import annotations

import openai
from openai.types.fine_tuning import FineTuningJob

from tests.fixtures.until import LIMIT_S, wait_until

# Of a job on a busy machine, with an engine to start and others before it.
JOB_S = 240.0
ENDED = ("succeeded", "failed", "cancelled")
# Of a job that is there to be cancelled: far more steps than an engine makes until it is told to stop.
ENDLESS = {"n_epochs": 50, "batch_size": 1}


def wait_for_file(sdk: openai.OpenAI, file_id: str) -> openai.types.FileObject:
    """The file once it is processed, or an error."""
    return sdk.files.wait_for_processing(file_id, poll_interval=0.1, max_wait_seconds=LIMIT_S)


def ended(sdk: openai.OpenAI, job_id: str, seconds: float = JOB_S) -> FineTuningJob:
    """The job once it has ended, in whatever way."""
    return wait_until(
        lambda: sdk.fine_tuning.jobs.retrieve(job_id), lambda job: job.status in ENDED, seconds=seconds
    )


def succeeded(sdk: openai.OpenAI, job_id: str) -> FineTuningJob:
    """The job once it has ended as it should."""
    job = ended(sdk, job_id)
    assert job.status == "succeeded", job
    return job


def cancel(sdk: openai.OpenAI, job_id: str) -> FineTuningJob:
    """Cancel a job, and wait until its engine has let go of it: what shares a pass with it has other last bits."""
    sdk.fine_tuning.jobs.cancel(job_id)
    job = ended(sdk, job_id)
    assert job.status == "cancelled", job
    return job
