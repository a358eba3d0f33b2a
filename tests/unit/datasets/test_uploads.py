"""From staging to a validated, immutable blob; and what a client may ask."""

import asyncio
from contextlib import suppress
from datetime import timedelta

import pytest

from lathe.common.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from lathe.datasets.model import CLAIM_LEASE, DatasetState, blob_key
from tests.fixtures.worlds import Died, DyingRows, DyingStore
from tests.unit.datasets.conftest import GOOD, jsonl, row, sha


async def test_a_good_file_becomes_ready_and_leaves_nothing_behind(world, service):
    dataset = await world.upload()
    assert dataset.state is DatasetState.VALIDATING
    await world.validate()
    dataset = await service.get("acme", dataset.id)
    assert dataset.state is DatasetState.READY
    assert (dataset.report.example_count, dataset.report.finding_count) == (12, 0)
    assert world.objects.keys() == [blob_key(sha(GOOD))] and dataset.staging_key == ""


@pytest.mark.parametrize("parts", [1, 3, 7])
async def test_parts_are_joined_in_order(world, service, parts):
    dataset = await world.ready(parts=parts)
    assert dataset.state is DatasetState.READY
    assert await world.objects.get(blob_key(sha(GOOD))) == GOOD
    assert world.objects.keys() == [blob_key(sha(GOOD))]


async def test_findings_name_line_field_and_reason_first_20_and_all_counted(world):
    bad = [{"messages": [{"role": "robot", "content": "x"}]}] * 25
    dataset = await world.ready(jsonl([row(), *bad]))
    assert dataset.state is DatasetState.ERROR
    assert (dataset.report.finding_count, len(dataset.report.findings)) == (25, 20)
    first = dataset.report.findings[0]
    assert (first.line, first.field, first.code) == (2, "messages[0].role", "unrecognized_role")


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (jsonl([row()] * 7), "invalid_n_examples", "has 7 example"),
        (b"", "invalid_n_examples", "has 0 example"),
        (GOOD + b'{"messages": [', "invalid_json", "stop half-way"),
        (GOOD + b"\xff\xfe\n", "invalid_utf8", ""),
    ],
)
async def test_bad_files_are_refused_with_openais_codes(world, content, code, words):
    dataset = await world.ready(content)
    assert dataset.state is DatasetState.ERROR
    assert code in {finding.code for finding in dataset.report.findings}
    assert any(words in finding.message for finding in dataset.report.findings)


async def test_the_rules_depend_on_the_purpose(world):
    assert (await world.ready(b"\x89PNG", purpose="vision")).state is DatasetState.READY
    assert (await world.ready(b"", purpose="user_data")).report.findings[0].code == "empty_file"
    assert (await world.ready(b'{"input": 1}\n', purpose="evals")).state is DatasetState.READY
    wrong = await world.ready(b'{"input": 1}\n[1]\nx\n', purpose="evals")
    assert [finding.line for finding in wrong.report.findings] == [2, 3]


async def test_bytes_that_are_not_those_announced_are_not_kept(world, service):
    dataset = await service.create("acme", "a.jsonl", "fine-tune", None, "")
    await world.objects.put(dataset.staging_key, GOOD[:-5])
    await service.commit_upload("acme", dataset.id, dataset.staging_key, len(GOOD), sha(GOOD))
    await world.validate()
    dataset = await service.get("acme", dataset.id)
    assert (dataset.state, dataset.report.findings[0].code) == (DatasetState.ERROR, "digest_mismatch")
    assert dataset.sha256 == "" and world.objects.keys() == []
    # The gateway repeats a call whose answer was lost.
    again = await service.commit_upload("acme", dataset.id, dataset.staging_key, len(GOOD), sha(GOOD))
    assert again == dataset
    with pytest.raises(FailedPrecondition, match="never changes"):
        await service.commit_upload("acme", dataset.id, dataset.staging_key, 7, sha(GOOD))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
async def test_an_upload_whose_bytes_are_gone_says_so(world, service, name):
    dataset = await world.upload(name=name)
    await world.objects.delete(dataset.staging_key)
    await world.validate()
    dataset = await service.get("acme", dataset.id)
    assert (dataset.state, dataset.report.findings[0].code) == (DatasetState.ERROR, "upload_lost")
    assert dataset.sha256 == "" and world.objects.keys() == []


async def test_a_commit_can_be_repeated_but_never_changes_a_dataset(world, service):
    dataset = await world.ready()
    facts = ("acme", dataset.id, "staging/any", len(GOOD))
    assert await service.commit_upload(*facts, sha(GOOD)) == dataset
    with pytest.raises(FailedPrecondition, match="never changes"):
        await service.commit_upload(*facts, "0" * 64)
    other = await service.create("acme", "b", "fine-tune", None, "")
    with pytest.raises(InvalidArgument, match="staging_key"):
        await service.commit_upload("acme", other.id, "staging/else", len(GOOD), sha(GOOD))
    with pytest.raises(NotFound):
        await service.commit_upload("other", other.id, other.staging_key, len(GOOD), sha(GOOD))


async def test_create_answers_a_repeated_request_with_the_first(service):
    first = await service.create("acme", "a", "fine-tune", None, "r1")
    assert await service.create("acme", "b", "evals", None, "r1") == first
    assert (await service.create("other", "a", "fine-tune", None, "r1")).id != first.id
    assert (await service.create("acme", "a", "fine-tune", None, "")).id != first.id


@pytest.mark.parametrize(
    ("name", "purpose", "life", "field"),
    [
        ("", "fine-tune", None, "display_name"),
        ("a\nb", "fine-tune", None, "display_name"),
        ("a", "fine-tune-results", None, "purpose"),
        ("a", "training", None, "purpose"),
        ("a", "fine-tune", timedelta(minutes=30), "expire_time"),
        ("a", "fine-tune", timedelta(days=31), "expire_time"),
    ],
)
async def test_what_cannot_be_created_names_its_field(service, name, purpose, life, field):
    expire = service.clock.now() + life if life is not None else None
    with pytest.raises(InvalidArgument) as error:
        await service.create("acme", name, purpose, expire, "")
    assert error.value.violations[0].field == f"dataset.{field}"


async def test_results_are_kept_once(world, service):
    first = await service.create_result_file("acme", "results.csv", b"step,loss\n1,2\n", "job-1")
    assert (first.state, first.purpose) == (DatasetState.READY, "fine-tune-results")
    assert await service.create_result_file("acme", "results.csv", b"step,loss\n1,2\n", "job-1") == first
    assert await world.objects.get(blob_key(first.sha256)) == b"step,loss\n1,2\n"
    with pytest.raises(InvalidArgument, match="request_id"):
        await service.create_result_file("acme", "results.csv", b"", "")


async def test_a_results_file_interrupted_before_its_bytes_is_finished_by_the_repetition(world, service):
    died = world.start(objects=DyingStore(world.objects, 0))
    with pytest.raises(Died):
        await died.create_result_file("acme", "results.csv", b"one", "job-1")
    await world.validate()
    again = await service.create_result_file("acme", "results.csv", b"two", "job-1")
    assert (again.state, again.sha256, again.size_bytes) == (DatasetState.READY, sha(b"two"), 3)


async def test_deleting_hides_at_once_and_the_bytes_go_with_the_last_reference(world, service):
    one, two = await world.ready(), await world.ready()
    with pytest.raises(NotFound):
        await service.delete("other", one.id)
    await service.delete("acme", one.id)
    for call in (service.get("acme", one.id), service.delete("acme", one.id)):
        with pytest.raises(NotFound):
            await call
    await world.sweep()
    assert world.objects.keys() == [blob_key(sha(GOOD))]
    await service.delete("acme", two.id)
    await world.sweep()
    assert world.objects.keys() == []


async def test_deleted_while_it_is_validated_leaves_nothing(world, service):
    dataset = await world.upload()
    await service.delete("acme", dataset.id)
    await world.cleaner(busy={dataset.name}).sweep()
    assert world.objects.keys() != []
    await world.validation().validate(dataset)
    await world.sweep()
    assert world.objects.keys() == []


async def test_expired_and_abandoned_datasets_go(world, service):
    expire = world.clock.now() + timedelta(hours=2)
    kept = await world.ready()
    expiring = await service.create("acme", "a", "fine-tune", expire, "")
    abandoned = await service.create("acme", "b", "fine-tune", None, "")
    await world.objects.put(f"{abandoned.staging_key}/00000", b"half")
    await world.sweep()
    assert len(await service.page("acme", limit=9)) == 3
    world.clock.tick(2 * 3600)
    await world.sweep()
    assert {found.id for found in await service.page("acme", limit=9)} == {kept.id, abandoned.id}
    assert expiring.id not in {found.id for found in await service.page("acme", limit=9)}
    world.clock.tick(24 * 3600)
    await world.sweep()
    assert [found.id for found in await service.page("acme", limit=9)] == [kept.id]
    assert world.objects.keys() == [blob_key(sha(GOOD))]


async def test_an_outage_of_the_store_waits(world, service):
    dataset = await world.upload()
    world.objects.outage = Unavailable("The store is away.", retry_after=1)
    with pytest.raises(Unavailable):
        await world.validate()
    assert (await service.get("acme", dataset.id)).state is DatasetState.VALIDATING
    world.objects.outage = None
    await world.validate()
    assert (await service.get("acme", dataset.id)).state is DatasetState.READY


@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("calls", range(3))
async def test_validation_interrupted_at_any_change_of_the_store_goes_on(world, service, calls, after, parts):
    dataset = await world.upload(parts=parts)
    with pytest.raises(Died):
        await world.validation(objects=DyingStore(world.objects, calls, after=after)).validate(dataset)
    await world.validate()
    await world.sweep()
    dataset = await service.get("acme", dataset.id)
    assert (dataset.state, dataset.staging_key) == (DatasetState.READY, "")
    assert world.objects.keys() == [blob_key(sha(GOOD))]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["finish_validation", "clear_staging"])
async def test_validation_interrupted_at_any_change_of_the_database_goes_on(world, service, method, after):
    dataset = await world.upload()
    with pytest.raises(Died):
        await world.validation(store=DyingRows(world.store, method, after=after)).validate(dataset)
    await world.validate()
    await world.sweep()
    assert (await service.get("acme", dataset.id)).state is DatasetState.READY
    assert world.objects.keys() == [blob_key(sha(GOOD))]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["clear_staging", "claim_blob", "release_blob", "remove"])
async def test_a_deletion_interrupted_anywhere_goes_on(world, service, method, after):
    dataset = await world.upload()
    await world.validate()
    await world.objects.put("staging/x/00000", b"left")
    await service.delete("acme", dataset.id)
    with suppress(Died):
        await world.sweep(store=DyingRows(world.store, method, after=after))
    world.clock.tick((CLAIM_LEASE + timedelta(seconds=1)).total_seconds())
    await world.sweep()
    assert world.objects.keys() == ["staging/x/00000"]
    assert (await world.ready()).state is DatasetState.READY


async def test_a_new_copy_waits_while_the_old_one_is_being_deleted(world, service):
    old = await world.ready()
    await service.delete("acme", old.id)
    assert await world.store.claim_blob(sha(GOOD), old.name, "one", world.clock.now())
    new = await world.upload()
    with pytest.raises(Unavailable):
        await world.validate()
    await world.store.release_blob(sha(GOOD), "one")
    await world.validate()
    assert (await service.get("acme", new.id)).state is DatasetState.READY
    assert await world.objects.get(blob_key(sha(GOOD))) == GOOD


class Meeting:
    """Objects for two replicas that validate the same upload: the second takes the bytes when the first has hashed
    them, and in between the uploader writes others."""

    def __init__(self, objects, tampered):
        self._objects, self._tampered = objects, tampered
        self.second_stands, self.first_has_hashed, self.second_has_copied = (
            asyncio.Event() for _ in range(3)
        )

    def of(self, copy):
        class Objects:
            def __getattr__(_, name):
                return copy if name == "copy" else getattr(self._objects, name)

        return Objects()

    async def first_copies(self, source, target):
        if target.startswith("blobs/"):
            await self._objects.put(*self._tampered)
            self.first_has_hashed.set()
            await self.second_has_copied.wait()
        await self._objects.copy(source, target)

    async def second_copies(self, source, target):
        self.second_stands.set()
        await self.first_has_hashed.wait()
        await self._objects.copy(source, target)
        self.second_has_copied.set()
        await asyncio.Event().wait()


async def test_bytes_changed_between_two_replicas_never_get_the_name_of_others(world, service):
    dataset = await service.create("acme", "a", "user_data", None, "")
    await world.objects.put(dataset.staging_key, b"one")
    await service.commit_upload("acme", dataset.id, dataset.staging_key, 3, sha(b"one"))
    meeting = Meeting(world.objects, (dataset.staging_key, b"two"))
    second = asyncio.ensure_future(world.validate(objects=meeting.of(meeting.second_copies)))
    await meeting.second_stands.wait()
    await world.validate(objects=meeting.of(meeting.first_copies))
    second.cancel()
    assert (await service.get("acme", dataset.id)).state is DatasetState.READY
    assert await world.objects.get(blob_key(sha(b"one"))) == b"one"
    assert world.objects.keys() == [blob_key(sha(b"one"))]
