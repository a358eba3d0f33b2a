"""What users can do."""

import asyncio
from dataclasses import replace

import pytest

from lathe.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    LatheError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from lathe.jobs.model import AdapterObject, EventLevel, Job, JobState, Outcome
from lathe.jobs.ports import Audit, AuditState, DatasetState, FileFinding, FileWarning, Quota, ResolvedModel
from lathe.jobs.training import Method, TrainingSpec
from tests.fakes.jobs import BASE, World


async def test_a_new_job_is_validated_and_queued(world: World) -> None:
    job = await world.create(suffix="tickets")
    assert job.state is JobState.VALIDATING_FILES
    await world.steps.run_once()
    job = await world.job(job.id)
    assert (job.state, job.total_steps) == (JobState.QUEUED, 39)
    assert job.hyperparameters is not None and job.hyperparameters.n_epochs == 3
    assert await world.messages(job.id) == [
        f"Created fine-tuning job: {job.id}",
        "Validating training file: file-1",
        "Files validated, moving job to queued state",
    ]


@pytest.mark.parametrize(
    ("fields", "error", "path"),
    [
        ({"model": "gpt-9"}, NotFound, "job.model"),
        ({"training": "file-9"}, NotFound, "job.training_dataset"),
        ({"validation": "file-9"}, NotFound, "job.validation_dataset"),
        ({"training": "file-bad"}, InvalidArgument, "job.training_dataset"),
        ({"training": "file-half"}, FailedPrecondition, "job.training_dataset"),
        ({"training": "file-gone"}, NotFound, "job.training_dataset"),
        ({"training": "file-evals"}, InvalidArgument, "job.training_dataset"),
        (
            {"spec": TrainingSpec(target_modules=("x",))},
            InvalidArgument,
            "job.method.supervised.lora.target_modules",
        ),
        ({"model": "frozen"}, InvalidArgument, "job.model"),
        ({"training": "file-pairs"}, InvalidArgument, "job.training_dataset"),
        ({"spec": TrainingSpec(method=Method.DPO)}, InvalidArgument, "job.training_dataset"),
        (
            {"training": "file-pairs", "spec": TrainingSpec(method=Method.ORPO), "validation": "file-1"},
            InvalidArgument,
            "job.validation_dataset",
        ),
    ],
)
async def test_what_cannot_be_used_is_named(
    world: World, fields: dict[str, object], error: type[LatheError], path: str
) -> None:
    world.datasets.add("file-bad", state=DatasetState.ERROR)
    world.datasets.add("file-half", state=DatasetState.UPLOADING)
    world.datasets.add("file-gone", state=DatasetState.DELETING)
    world.datasets.add("file-evals")
    world.datasets.infos["file-evals"] = replace(world.datasets.infos["file-evals"], purpose="evals")
    world.datasets.add("file-pairs", format_="preference")
    world.datasets.add("file-1", format_="chat")
    world.models.models["frozen"] = ResolvedModel(BASE, False, "it has no chat template")
    with pytest.raises(error) as raised:
        await world.create(**fields)
    assert [violation.field for violation in raised.value.violations] == [path]


async def test_chat_rows_on_a_base_without_a_chat_template_are_refused_in_words(world: World) -> None:
    world.models.models["plain"] = ResolvedModel(BASE, True, methods=tuple(Method), chats=False)
    world.datasets.add("file-chats", format_="chat")
    world.datasets.add("file-texts", format_="text")
    with pytest.raises(
        InvalidArgument, match=rf"{BASE.id} has no chat template.*text or completion"
    ) as raised:
        await world.create(model="plain", training="file-chats")
    assert [violation.field for violation in raised.value.violations] == ["job.training_dataset"]
    with pytest.raises(InvalidArgument, match="no chat template"):
        await world.create(model="plain", training="file-texts", validation="file-chats")
    assert (await world.create(model="plain", training="file-texts")).model == "plain"


async def test_the_same_request_id_makes_one_job(world: World) -> None:
    made = await asyncio.gather(*(world.create(request_id="r1") for _ in range(3)))
    assert len({job.id for job in made}) == 1
    assert (await world.create(request_id="r2")).id != made[0].id
    world.datasets.add("file-1")
    assert (await world.create(request_id="r1", project="beta")).id != made[0].id


async def test_the_quota_of_waiting_jobs_is_kept(world: World) -> None:
    world.accounts.quota = Quota(max_queued_jobs=1)
    await world.create()
    with pytest.raises(ResourceExhausted):
        await world.create()
    await world.create(project="beta")


async def test_a_job_of_another_project_is_not_there(world: World) -> None:
    job = await world.create()
    with pytest.raises(NotFound, match="projects/beta/jobs/"):
        await world.service.get("beta", job.id)
    with pytest.raises(NotFound):
        await world.service.cancel("beta", job.id)


async def test_tuning_a_tuned_model_keeps_its_lora(world: World) -> None:
    lora = TrainingSpec(lora_r=8, lora_alpha=16.0, target_modules=("q_proj",))
    world.models.models["ft:tiny"] = ResolvedModel(
        BASE, True, "", ("supervised",), AdapterObject("jobs/a/b/final", "0" * 64), lora
    )
    job = await world.queued(model="ft:tiny")
    assert job.hyperparameters is not None
    assert (job.hyperparameters.lora_r, job.hyperparameters.target_modules) == (8, ("q_proj",))
    with pytest.raises(InvalidArgument):
        await world.create(model="ft:tiny", spec=TrainingSpec(lora_r=16))


async def test_bad_files_fail_the_job_with_lines(world: World) -> None:
    finding = FileFinding(3, "messages[1].role", "unrecognized_role", "the role 'bot' is unknown")
    job = await world.create()
    world.datasets.audits["file-1"] = Audit("k", AuditState.ERROR, findings=(finding,), finding_count=1)
    await world.steps.run_once()
    job = await world.job(job.id)
    assert job.state is JobState.FAILED and job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "line 3, messages[1].role" in job.error.message


async def test_warnings_are_told_and_the_job_goes_on(world: World) -> None:
    job = await world.create()
    warning = FileWarning(
        "duplicate", 12, tuple(range(2, 14)), "a row is the same as an earlier one", "Drop it."
    )
    audit = replace(world.datasets.audits["file-1"], warnings=(warning,))
    world.datasets.audits["file-1"] = audit
    await world.steps.run_once()
    job = await world.job(job.id)
    assert job.state is JobState.QUEUED and "1 kind of warning" in job.state_reason
    async with world.store.read() as session:
        events = await session.events(job.id, after=0, limit=100)
    told = [event for event in events if event.level is EventLevel.WARN]
    assert [event.message for event in told] == [
        "The training file, lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more: a row is the same as an earlier one. "
        "Drop it."
    ]


async def test_a_file_that_was_deleted_fails_the_job(world: World) -> None:
    job = await world.create()
    del world.datasets.audits["file-1"]
    await world.steps.run_once()
    assert (await world.job(job.id)).state is JobState.FAILED


async def test_an_outage_makes_a_job_wait(world: World) -> None:
    job = await world.create()
    world.datasets.down = Unavailable("datasets is away.")
    await world.steps.run_once()
    job = await world.job(job.id)
    assert (job.state, job.state_reason) == (
        JobState.VALIDATING_FILES,
        "Waits and is tried again: datasets is away.",
    )
    world.datasets.down = None
    await world.steps.run_once()
    assert (await world.job(job.id)).state is JobState.QUEUED


async def test_cancel_is_idempotent_and_at_once_without_an_engine(world: World) -> None:
    job = await world.create()
    assert (await world.service.cancel("acme", job.id)).state is JobState.CANCELLED
    again = await world.service.cancel("acme", job.id)
    assert again.state is JobState.CANCELLED and again.finish_time is not None
    await world.steps.run_once()
    assert (await world.job(job.id)).state is JobState.CANCELLED


async def test_a_job_that_ended_otherwise_cannot_be_cancelled(world: World) -> None:
    lease = await world.leased()
    await world.complete(lease, Outcome.SUCCEEDED)
    with pytest.raises(FailedPrecondition):
        await world.service.cancel("acme", lease.job.id)


async def test_lists_filter_and_page(world: World) -> None:
    made: list[Job] = []
    for number in range(3):
        world.clock.tick(1)
        made.append(await world.create(metadata={"n": str(number), "team": "a"}))
    newest = await world.service.list("acme", states=[], metadata={"team": "a"}, after=None, limit=2)
    assert [job.id for job in newest] == [made[2].id, made[1].id]
    last = newest[-1]
    rest = await world.service.list(
        "acme", states=[], metadata={}, after=(last.create_time, last.id), limit=2
    )
    assert [job.id for job in rest] == [made[0].id]
    one = await world.service.list("acme", states=[], metadata={"team": "a", "n": "1"}, after=None, limit=9)
    assert [job.id for job in one] == [made[1].id]
    none = await world.service.list("acme", states=[JobState.FAILED], metadata={}, after=None, limit=9)
    assert not none and not await world.service.list("beta", states=[], metadata={}, after=None, limit=9)


async def test_watch_tells_everything_once_and_ends(world: World) -> None:
    lease = await world.leased()
    seen: list[str] = []
    states: list[JobState] = []
    begun = asyncio.Event()

    async def watch() -> None:
        async for job, events in world.service.watch("acme", lease.job.id, 0):
            states.append(job.state)
            begun.set()
            seen.extend(event.message for event in events)

    watching = asyncio.create_task(watch())
    await begun.wait()
    await world.report(lease, 1)
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()
    await asyncio.wait_for(watching, 60)
    assert states[0] is JobState.STARTING and states[-1] is JobState.SUCCEEDED
    assert seen == await world.messages(lease.job.id)
