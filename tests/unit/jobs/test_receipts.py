"""Receipts, reruns, and what engines tell users by the way."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lathe.common.errors import FailedPrecondition, InvalidArgument, NotFound
from lathe.jobs import protos
from lathe.jobs.model import (
    AdapterObject,
    EngineReceipt,
    EventLevel,
    Job,
    JobState,
    Outcome,
    SlicePlan,
    StepMetrics,
    TokenObject,
    WeightComparison,
)
from lathe.jobs.ports import ResolvedModel
from lathe.jobs.progress import MAX_NOTE, Note, ReportedCheckpoint
from lathe.jobs.training import TrainingSpec
from lathe.jobs.workers import Lease
from lathe.v1 import worker_pb2
from tests.fakes.jobs import OTHER, USER, World, measured

PLAN = SlicePlan(320, 2, "bfloat16", "cpu")
RECEIPT = EngineReceipt({"torch": "2.13.0"}, {"cpu_capability": "AVX512"}, ((-6, 2), (3, 1)), False, "e" * 64)


async def succeeded(world: World, **fields: Any) -> Job:
    lease = await world.leased(**fields)
    await world.report(lease, 1, 2, slice_plan=PLAN)
    await world.complete(lease, Outcome.SUCCEEDED, receipt=RECEIPT)
    await world.steps.run_once()
    job = await world.job(lease.job.id)
    assert job.state is JobState.SUCCEEDED
    return job


async def receipt(world: World, job: Job) -> dict[str, Any]:
    _, document = await world.service.receipt("acme", job.id)
    content = json.loads(document)
    assert isinstance(content, dict)
    return content


async def test_the_receipt_says_what_the_job_was_made_from(world: World) -> None:
    job = await succeeded(world, seed=7, spec=TrainingSpec(n_epochs=1, schedule="linear"))
    found = await receipt(world, job)
    assert found["schema_version"] == 1
    assert found["training_file"] == {"id": "file-1", "sha256": "a" * 64, "tokens_sha256": "b" * 64}
    assert (found["seed"], found["base_model"]["digest"], found["parent"]) == (7, "d" * 64, None)
    assert (found["hyperparameters"]["n_epochs"], found["hyperparameters"]["schedule"]) == (1, "linear")
    assert found["slice_plan"]["train_tokens_per_slice"] == 320
    assert found["workers"] == 1
    assert found["engine"]["versions"] == {"torch": "2.13.0"}
    assert found["engine"]["halvings"] == [
        {"validations_from_step": 7, "times": 2},
        {"step": 3, "times": 1},
    ]
    assert found["adapter"]["model"] == job.fine_tuned_model
    assert found["adapter"]["weights_sha256"] == "e" * 64
    assert (
        world.datasets.results[f"{job.id}-receipt"].decode()
        == (await world.service.receipt("acme", job.id))[1]
    )


async def test_there_is_no_receipt_before_the_end(world: World) -> None:
    job = await world.queued()
    with pytest.raises(FailedPrecondition, match="is queued"):
        await world.service.receipt("acme", job.id)
    with pytest.raises(FailedPrecondition, match="is queued"):
        await world.service.rerun("acme", job.id, "", USER)
    with pytest.raises(NotFound):
        await world.service.receipt("beta", job.id)


async def test_a_rerun_is_given_all_that_decided_the_numbers(world: World) -> None:
    first = await succeeded(world, seed=7, spec=TrainingSpec(batch_size=4))
    again = await world.service.rerun("acme", first.id, "r", USER)
    assert (await world.service.rerun("acme", first.id, "r", USER)).id == again.id
    assert (again.rerun_of, again.seed, again.slice_plan) == (first.id, 7, PLAN)
    assert again.hyperparameters == first.hyperparameters
    assert again.compute.dedicated
    await world.steps.run_once()
    lease = await dedicated(world, again)
    attempt = protos.attempt_pb(lease)
    assert list(attempt.halvings) == [
        worker_pb2.Halving(step=-6, times=2),
        worker_pb2.Halving(step=3, times=1),
    ]
    assert attempt.compare_with.manifest_sha256 == "f" * 64
    assert attempt.slice_plan.threads == 2
    same = WeightComparison(bit_identical=True)
    await world.complete(lease, Outcome.SUCCEEDED, receipt=RECEIPT, comparison=same)
    await world.steps.run_once()
    assert f"The weights are bit-identical to those of {first.id}" in await world.messages(again.id)
    done = await world.job(again.id)
    assert protos.job_pb(done).comparison.bit_identical
    assert (await receipt(world, done))["comparison"]["bit_identical"] is True
    assert (await receipt(world, done))["rerun_of"] == first.id


async def dedicated(world: World, job: Job) -> Lease:
    """The lease of the engine that was started for this job alone."""
    await world.reconciler.run_once()
    [engine] = [launch.engine_id for launch in world.launcher.launches.values() if launch.job_id == job.id]
    await world.register(engine)
    lease = await world.workers.lease(engine)
    assert lease is not None and lease.job.id == job.id
    return lease


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        (WeightComparison(False, 1.25e-6, "layers.0.lora_A"), "by at most 1.25e-06 (in layers.0.lora_A)"),
        (
            WeightComparison(not_compared_reason="the first one was deleted."),
            "were not compared with those of",
        ),
    ],
)
async def test_a_rerun_says_how_far_it_is(world: World, comparison: WeightComparison, words: str) -> None:
    first = await succeeded(world)
    again = await world.service.rerun("acme", first.id, "", USER)
    await world.steps.run_once()
    await world.complete(await dedicated(world, again), Outcome.SUCCEEDED, comparison=comparison)
    await world.steps.run_once()
    assert any(words in message for message in await world.messages(again.id))


async def test_a_rerun_on_other_tokens_is_told(world: World) -> None:
    first = await succeeded(world)
    audit = world.datasets.audits["file-1"]
    world.datasets.audits["file-1"] = replace(audit, tokens=TokenObject("blobs/other", "9" * 64))
    again = await world.service.rerun("acme", first.id, "", USER)
    await world.steps.run_once()
    assert any("render to other tokens" in message for message in await world.messages(again.id))


async def test_a_rerun_needs_what_the_first_one_had(world: World) -> None:
    first = await succeeded(world)
    world.models.models["tiny"] = ResolvedModel(OTHER, True, methods=("supervised",))
    with pytest.raises(FailedPrecondition, match="not what"):
        await world.service.rerun("acme", first.id, "", USER)
    del world.models.models["tiny"]
    with pytest.raises(NotFound):
        await world.service.rerun("acme", first.id, "", USER)


async def test_a_reruns_request_id_is_its_own(world: World) -> None:
    first, other = await succeeded(world), await succeeded(world)
    made = await world.create(request_id="made")
    again = await world.service.rerun("acme", first.id, "again", USER)
    for call in (
        world.service.rerun("acme", first.id, "x" * 129, USER),
        world.service.rerun("acme", first.id, "made", USER),
        world.service.rerun("acme", other.id, "again", USER),
        world.create(request_id="again"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            await call
        assert [violation.field for violation in raised.value.violations] == ["request_id"]
    assert (await world.create(request_id="made")).id == made.id
    assert (await world.service.rerun("acme", first.id, "again", USER)).id == again.id


async def test_the_receipt_does_not_say_what_an_older_engine_did_not(world: World) -> None:
    """One from before an upgrade tells nothing of how it computed, not even whether it fused."""
    lease = await world.leased()
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()
    found = await receipt(world, lease.job)
    unsaid = ("versions", "flags", "halvings", "fused")
    assert {name: found["engine"][name] for name in unsaid} == dict.fromkeys(unsaid)
    assert found["engine"]["code_version"] == "0.1.0" and found["adapter"]["weights_sha256"] is None


async def test_a_continued_job_of_the_version_before_names_its_parent(world: World) -> None:
    """That version kept the parent only as the model that was asked for."""
    lease = await world.leased()
    parent = AdapterObject("jobs/p/a/final", "c" * 64)
    async with world.store.write() as session:
        job = await session.job(lease.job.id)
        assert job is not None
        await session.save(job, replace(job, model="ft:tiny:acme::p", initial_adapter=parent))
    await world.complete(lease, Outcome.SUCCEEDED, receipt=RECEIPT)
    await world.steps.run_once()
    done = await world.job(lease.job.id)
    assert (await receipt(world, done))["parent"]["model"] == "ft:tiny:acme::p"
    assert world.models.adapters[done.fine_tuned_model].parent_model_id == "ft:tiny:acme::p"


async def test_a_sentence_of_the_engine_is_told_once(world: World) -> None:
    lease = await world.leased()
    notes = [
        Note(2, "out_of_memory", "Halved."),
        Note(2, "sharded", "Who can serve it?"),
        Note(2, "generation", "x" * 5000, {"prompt": "p"}),
        Note(2, "out_of_memory", "Halved."),
    ]
    await world.report(lease, 2, notes=notes)
    await world.report(lease, 3, notes=notes)
    async with world.store.read() as session:
        told = [event for event in await session.events(lease.job.id, after=0, limit=100) if event.kind]
    assert [(event.kind, event.level, event.step) for event in told] == [
        ("out_of_memory", EventLevel.WARN, 2),
        ("sharded", EventLevel.WARN, 2),
        ("generation", EventLevel.INFO, 2),
    ]
    assert len(told[2].message) == MAX_NOTE and told[2].data == {"prompt": "p"}
    assert protos.event_pb(told[2]).data["prompt"] == "p"


def reported(lease: Lease, step: int) -> ReportedCheckpoint:
    files = AdapterObject(f"{lease.attempt.prefix}checkpoints/{step}", "c" * 64)
    return ReportedCheckpoint(step, files, measured(step))


async def test_the_engine_says_which_checkpoints_are_given_up(world: World) -> None:
    lease = await world.leased(spec=TrainingSpec(keep_checkpoints=2))

    async def told(steps: Sequence[int], dropped: Sequence[int]) -> list[int]:
        points = [reported(lease, step) for step in steps]
        await world.report(lease, checkpoints=points, dropped_checkpoints=dropped)
        async with world.store.read() as session:
            return [point.step for point in await session.checkpoints(lease.job.id)]

    assert await told([1, 2], []) == [2, 1]
    # One that nobody has heard of yet may be given up at once, and is told of; repeating a report changes nothing.
    for _ in range(2):
        assert await told([3, 4], [1, 3]) == [4, 2]
    created = [text for text in await world.messages(lease.job.id) if text.startswith("Checkpoint")]
    assert created == [f"Checkpoint created at step {step}" for step in (1, 2, 3, 4)]


async def test_figures_of_a_step_come_back(world: World) -> None:
    lease = await world.leased()
    row: StepMetrics = replace(measured(1), figures={"rewards/margins": 0.5, "kl": float("nan")})
    await world.report(lease, metrics=[row])
    async with world.store.read() as session:
        [found] = await session.metrics(lease.job.id)
    assert found.figures == {"rewards/margins": 0.5}
    assert protos.metrics_pb(found).figures["rewards/margins"] == 0.5
