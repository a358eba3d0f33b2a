"""Any process may be killed at any moment; a job finishes all the same, with the numbers it would have had."""

from __future__ import annotations

import time

import pytest

from lathe.client import Client
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.data import LESSONS, ask
from tests.e2e.survival import (
    check_history,
    final_adapter,
    start_long,
    upload_long,
    wait_for_step,
    wait_for_success,
)
from tests.fixtures.platforms import Platform

pytestmark = pytest.mark.kills


@pytest.fixture(scope="module")
def long_dataset(client: Client) -> datasets_pb2.Dataset:
    return upload_long(client)


@pytest.fixture(scope="module")
def undisturbed(
    platform: Platform, client: Client, base_model: str, long_dataset: datasets_pb2.Dataset
) -> dict[str, bytes]:
    """The adapter of the same job when nobody kills anything."""
    job = wait_for_success(client, start_long(client, base_model, long_dataset))
    check_history(client, job)
    assert job.attempt_count == 1
    return final_adapter(platform, client, job)


@pytest.fixture
def running(
    client: Client, base_model: str, long_dataset: datasets_pb2.Dataset, undisturbed: dict[str, bytes]
) -> jobs_pb2.Job:
    """A job in the middle of its work."""
    return wait_for_step(client, start_long(client, base_model, long_dataset), 60)


def check_same(
    platform: Platform, client: Client, job: jobs_pb2.Job, undisturbed: dict[str, bytes]
) -> jobs_pb2.Job:
    """It succeeds, and everything is as if nothing had happened."""
    job = wait_for_success(client, job)
    check_history(client, job)
    assert final_adapter(platform, client, job) == undisturbed
    return job


def test_an_engine_is_killed(
    platform: Platform, client: Client, running: jobs_pb2.Job, undisturbed: dict[str, bytes]
) -> None:
    platform.kill("engine")
    job = check_same(platform, client, running, undisturbed)
    assert (job.attempt_count, job.lost_lease_count) == (2, 1)
    completion = client.chat(job.fine_tuned_model, ask(LESSONS[0][0]), temperature=0, max_tokens=20)
    assert completion.choices[0].message.content == LESSONS[0][1]


def test_what_starts_engines_is_killed(
    platform: Platform, client: Client, running: jobs_pb2.Job, undisturbed: dict[str, bytes]
) -> None:
    """The whole control process where there is one, else `jobs`; its engines leave with it."""
    name = "jobs" if "jobs" in platform.processes else "up"
    platform.kill(name)
    platform.start(name)
    check_same(platform, client, running, undisturbed)


def test_what_is_killed_before_the_job_began(
    platform: Platform,
    client: Client,
    base_model: str,
    long_dataset: datasets_pb2.Dataset,
    undisturbed: dict[str, bytes],
) -> None:
    """The rows are being tokenised, or the job waits for an engine."""
    job = start_long(client, base_model, long_dataset)
    for name in platform.processes:
        platform.kill(name)
    for name in platform.processes:
        platform.start(name)
    check_same(platform, client, job, undisturbed)


@pytest.mark.processes_only
def test_every_other_service_is_killed_while_a_job_runs(
    platform: Platform, client: Client, running: jobs_pb2.Job, undisturbed: dict[str, bytes]
) -> None:
    for name in ("accounts", "models", "datasets", "gateway"):
        platform.kill(name)
        time.sleep(0.3)
        platform.start(name)
    job = check_same(platform, client, running, undisturbed)
    # Training needs none of them.
    assert job.attempt_count == 1
