"""A job that is long enough to be hit, and what must be true of it afterwards. Also for tests/acceptance."""

from __future__ import annotations

from lathe.client import Client
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.data import jsonl, lessons
from tests.fixtures.platforms import Platform
from tests.fixtures.until import wait_until

FILES = ("adapter_model.safetensors", "adapter_config.json")
STEPS_PER_EPOCH = 50
N_EPOCHS = 8
# On a busy machine, with leases to run out and processes to start anew.
END_S = 300.0
ENDED = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)


def upload_long(client: Client) -> datasets_pb2.Dataset:
    """200 rows."""
    return client.datasets.wait(client.datasets.upload(jsonl(lessons(40))).name)


def start_long(
    client: Client, base_model: str, dataset: datasets_pb2.Dataset, n_epochs: int = N_EPOCHS
) -> jobs_pb2.Job:
    """Epochs of 50 steps, always with the same seed."""
    return client.jobs.create(base_model, dataset.name, seed=11, n_epochs=n_epochs, batch_size=4)


def wait_for_step(client: Client, job: jobs_pb2.Job, step: int, timeout: float = END_S) -> jobs_pb2.Job:
    """Until the job has reported `step`."""
    job = wait_until(
        lambda: client.jobs.get(job.name), lambda job: job.step >= step or job.state in ENDED, seconds=timeout
    )
    assert job.step >= step, job
    return job


def wait_for_success(client: Client, job: jobs_pb2.Job, timeout: float = END_S) -> jobs_pb2.Job:
    job = wait_until(lambda: client.jobs.get(job.name), lambda job: job.state in ENDED, seconds=timeout)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job
    return job


def check_history(client: Client, job: jobs_pb2.Job) -> None:
    """Every step is told once and in order, every epoch has its checkpoint, nothing happened twice."""
    total = job.method.supervised.hyperparameters.n_epochs * STEPS_PER_EPOCH
    epochs = list(range(STEPS_PER_EPOCH, total + 1, STEPS_PER_EPOCH))
    events = list(client.jobs.events(job.name))[::-1]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    steps = [event.metrics.step for event in events if event.type == jobs_pb2.EVENT_TYPE_METRICS]
    assert steps == list(range(1, total + 1))
    messages = [event.message for event in events if event.type == jobs_pb2.EVENT_TYPE_MESSAGE]
    for once in ("Fine-tuning job started", f"New fine-tuned model created: {job.fine_tuned_model}"):
        assert messages.count(once) == 1
    saved = [message for message in messages if message.startswith("Checkpoint created")]
    assert saved == [f"Checkpoint created at step {step}" for step in epochs]
    assert messages[-1] == "The job has successfully completed"
    assert [one.step for one in client.jobs.checkpoints(job.name)] == epochs[:-4:-1]
    assert job.total_steps == job.step == total


def final_adapter(platform: Platform, client: Client, job: jobs_pb2.Job) -> dict[str, bytes]:
    """The files that the job made, by name."""
    assert platform.read_object is not None
    prefix = client.adapters.of_model(job.fine_tuned_model).object.prefix.rstrip("/")
    return {name: platform.read_object(f"{prefix}/{name}") for name in FILES}
