"""What models promises, on a real SQLite file and a store in memory."""

import hashlib
import json
from datetime import timedelta

import pytest

from lathe.common.db import Database, migrate
from lathe.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from lathe.common.names import import_staging
from lathe.models.cleaner import Cleaner
from lathe.models.model import AdapterObject, BaseModelState, Lineage, manifest_key
from lathe.models.service import ModelsService
from lathe.models.store import SqlModelStore
from tests.fakes.clock import FakeClock
from tests.fakes.ids import FakeIds
from tests.fakes.objectstore import MemoryObjectStore
from tests.fixtures.models import SHAPES, safetensors, tiny_folder, upload

LINEAGE = Lineage("projects/acme/jobs/ftjob-1", "att-1", 10, "a" * 64, "b" * 64, "c" * 64, "{}", 7, "0.1.0")
TUNED = "ft:tiny:acme:tickets:x1"
PREFIX = "jobs/ftjob-1/att-1/final"


class World:
    """A database and a store that outlive the processes started over them."""

    def __init__(self, db):
        self.db = db
        self.clock = FakeClock()
        self.objects = MemoryObjectStore(self.clock)
        self.ids = FakeIds()

    def start(self):
        return ModelsService(SqlModelStore(self.db), self.objects, self.clock, self.ids)

    async def sweep(self):
        await Cleaner(SqlModelStore(self.db), self.objects, self.clock).sweep()

    async def put_adapter(self, prefix=PREFIX, name="final"):
        manifest = json.dumps({"files": [], "name": name}).encode()
        for path in ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"):
            await self.objects.put(f"{prefix}/{path}", b"x")
        await self.objects.put(f"{prefix}/manifest.json", manifest)
        return AdapterObject(prefix, hashlib.sha256(manifest).hexdigest())


@pytest.fixture
async def world(tmp_path):
    db = Database(f"sqlite+aiosqlite:///{tmp_path}/models.sqlite")
    await migrate(db, "lathe.models")
    yield World(db)
    await db.close()


@pytest.fixture
def models(world):
    return world.start()


@pytest.fixture
async def base(models):
    await upload(models, tiny_folder())
    return await models.commit_base_model("tiny")


async def test_a_folder_becomes_a_model_that_says_how_it_can_be_tuned(world, base):
    assert base.state is BaseModelState.READY
    assert (base.facts.architecture, base.facts.context_length) == ("LlamaForCausalLM", 512)
    assert base.facts.parameter_count == 1024 * 8 + 3 * 8 + 8 * 8 * 2 + 4 * 8 * 2 + 3 * 8 * 16
    assert base.facts.tunable and "dpo" in base.facts.methods and "q_proj" in base.facts.target_modules
    assert "<|im_start|>" in base.facts.chat_template
    assert len(base.facts.tokenizer_digest) == len(base.facts.template_digest) == 64
    manifest = json.loads(await world.objects.get(manifest_key(base.digest)))
    assert manifest["digest"] == base.digest
    assert {file["path"] for file in manifest["files"]} == {file.path for file in base.files} - {"README.md"}
    for file in manifest["files"]:
        assert hashlib.sha256(await world.objects.get(file["object_key"])).hexdigest() == file["sha256"]
    assert not [key for key in sorted(world.objects.keys()) if key.startswith("staging/")]


async def test_importing_twice_is_one_model_whatever_the_id(models, base):
    assert await models.create_base_model(tiny_folder().new("another-name"), "") == base
    assert [model.id for model in await models.list_base_models(after="", limit=10)] == ["tiny"]


async def test_the_same_request_answers_with_the_first(models):
    first = await models.create_base_model(tiny_folder().new("one"), "acme/r1")
    assert await models.create_base_model(tiny_folder(rope_theta=5.0).new("two"), "acme/r1") == first


async def test_an_id_stands_for_one_digest(models, base):
    with pytest.raises(AlreadyExists, match=base.digest):
        await models.create_base_model(tiny_folder(rope_theta=5.0).new("tiny"), "")


async def test_files_that_are_stored_need_no_upload(models, base):
    changed = tiny_folder(rope_theta=5.0)
    second = await models.create_base_model(changed.new("second"), "")
    assert [file.path for file in second.files if not file.stored] == ["config.json"]
    await upload(models, changed, "second")
    assert (await models.commit_base_model("second")).state is BaseModelState.READY


async def test_bytes_that_were_not_announced_are_refused_and_go(world, models):
    await models.create_base_model(tiny_folder().new(), "")
    await world.objects.put("staging/x", b"other")
    with pytest.raises(InvalidArgument, match="Send the file again"):
        await models.commit_file("tiny", "config.json", "staging/x", 5, hashlib.sha256(b"other").hexdigest())
    assert world.objects.keys() == []
    with pytest.raises(NotFound):
        await models.commit_file("tiny", "no.json", "staging/x", 5, "0" * 64)


async def test_a_commit_before_all_files_are_there_names_them(models):
    await models.create_base_model(tiny_folder().new(), "")
    with pytest.raises(FailedPrecondition, match=r"5 of 5 files .* config\.json"):
        await models.commit_base_model("tiny")


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("config.json", b'{"auto_map": {"AutoModel": "x.X"}}', "auto_map"),
        ("config.json", b"not json", "config.json is not JSON"),
        ("config.json", b"[]", "one JSON object"),
        ("tokenizer_config.json", b'{"auto_map": {}}', "auto_map"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("model.safetensors", b"\x80\x02pickled weights", "no safetensors file"),
        ("model.safetensors", safetensors(SHAPES)[:-1], "cut short"),
        ("model.safetensors", safetensors({"model.norm.weight": (8,)}), "no tensor"),
    ],
)
async def test_a_folder_that_cannot_be_used_is_refused_at_commit(models, path, content, words):
    await upload(models, tiny_folder().with_file(path, content))
    with pytest.raises(InvalidArgument, match=words):
        await models.commit_base_model("tiny")
    assert (await models.get_base_model("tiny")).state is BaseModelState.UPLOADING


async def test_a_model_without_a_chat_template_can_be_tuned(models):
    plain = json.loads(tiny_folder().contents["tokenizer_config.json"])
    del plain["chat_template"]
    await upload(models, tiny_folder().with_file("tokenizer_config.json", json.dumps(plain).encode()))
    facts = (await models.commit_base_model("tiny")).facts
    assert facts.tunable and facts.methods and facts.chat_template == ""


async def test_a_model_that_cannot_be_tuned_says_why(models):
    await upload(models, tiny_folder(architectures=["GPT2LMHeadModel"]), "gpt2")
    facts = (await models.commit_base_model("gpt2")).facts
    assert not facts.tunable and "GPT2LMHeadModel" in facts.not_tunable_reason and facts.methods == ()


async def test_two_imports_of_one_folder_at_the_same_time_are_one_model(world, models):
    await models.create_base_model(tiny_folder().new("one"), "")
    await models.create_base_model(tiny_folder().new("two"), "")
    await upload(models, tiny_folder(), "one")
    one = await models.commit_base_model("one")
    assert await models.commit_base_model("two") == one
    await world.sweep()
    assert [model.id for model in await models.list_base_models(after="", limit=10)] == ["one"]
    assert await world.objects.head(manifest_key(one.digest)) is not None
    assert all([await world.objects.head(file.object_key) for file in one.files])


async def test_what_a_model_id_means(world, models, base):
    adapter = await models.register_adapter(
        "acme", TUNED, "tiny", await world.put_adapter(), LINEAGE, is_final=True
    )
    step = await models.register_adapter(
        "acme",
        TUNED + ":ckpt-step-4",
        "tiny",
        await world.put_adapter("jobs/ftjob-1/att-1/checkpoints/step-00000004"),
        LINEAGE,
        is_final=False,
    )
    assert (await models.resolve("acme", "tiny")).base_model == base
    assert (await models.resolve("acme", "baseModels/tiny")).adapter is None
    found = await models.resolve("acme", TUNED)
    assert (found.base_model, found.adapter) == (base, adapter)
    assert adapter.lineage == LINEAGE
    assert (await models.resolve("acme", TUNED + ":ckpt-step-4")).adapter == step
    await models.create_base_model(tiny_folder(rope_theta=9.0).new("uploading"), "")
    words = set()
    for project, model_id in [
        ("other", TUNED),
        ("acme", TUNED + ":ckpt-step-5"),
        ("acme", "none"),
        ("acme", "uploading"),
        ("acme", "a/b"),
    ]:
        with pytest.raises(NotFound) as error:
            await models.resolve(project, model_id)
        words.add(str(error.value).replace(model_id, "…"))
    assert len(words) == 1


async def test_an_adapter_is_registered_once_and_only_when_it_is_whole(world, models, base):
    files = await world.put_adapter()
    first = await models.register_adapter("acme", TUNED, "tiny", files, LINEAGE, is_final=True)
    again = await models.register_adapter("acme", TUNED, "tiny", files, LINEAGE, is_final=True)
    assert again == first
    with pytest.raises(FailedPrecondition, match="another digest"):
        await models.register_adapter(
            "acme", TUNED + "b", "tiny", AdapterObject(PREFIX, "0" * 64), LINEAGE, is_final=True
        )
    with pytest.raises(FailedPrecondition, match="no manifest"):
        await models.register_adapter(
            "acme", TUNED + "b", "tiny", AdapterObject("jobs/a/b/final", "0" * 64), LINEAGE, is_final=True
        )
    await world.objects.delete(f"{PREFIX}/adapter_model.safetensors")
    with pytest.raises(FailedPrecondition, match="adapter_model"):
        await models.register_adapter("acme", TUNED + "b", "tiny", files, LINEAGE, is_final=True)
    with pytest.raises(InvalidArgument):
        await models.register_adapter("other", TUNED + "c", "tiny", files, LINEAGE, is_final=True)
    with pytest.raises(InvalidArgument, match="below 'jobs/"):
        await models.register_adapter(
            "acme", TUNED + "d", "tiny", AdapterObject("blobs/x", "0" * 64), LINEAGE, is_final=True
        )


async def test_deleting_an_adapter_hides_it_at_once_and_its_files_go(world, models, base):
    adapter = await models.register_adapter(
        "acme", TUNED, "tiny", await world.put_adapter(), LINEAGE, is_final=True
    )
    with pytest.raises(FailedPrecondition, match="Delete the tuned models first"):
        await models.delete_base_model("tiny")
    with pytest.raises(NotFound):
        await models.delete_adapter("other", adapter.id)
    await models.delete_adapter("acme", adapter.id)
    for call in (models.get_adapter("acme", adapter.id), models.resolve("acme", TUNED)):
        with pytest.raises(NotFound):
            await call
    assert list(await models.list_adapters("acme", after=None, limit=10)) == []
    await world.sweep()
    assert not [key for key in sorted(world.objects.keys()) if key.startswith("jobs/")]
    await models.delete_base_model("tiny")


async def test_deleting_a_base_model_keeps_files_that_another_needs(world, models, base):
    changed = tiny_folder(rope_theta=5.0)
    await upload(models, changed, "second")
    second = await models.commit_base_model("second")
    await models.delete_base_model("tiny")
    with pytest.raises(NotFound):
        await models.get_base_model("tiny")
    with pytest.raises(Unavailable):
        await models.create_base_model(tiny_folder(rope_theta=7.0).new("tiny"), "")
    await world.sweep()
    assert set(world.objects.keys()) == {
        manifest_key(second.digest),
        *(file.object_key for file in second.files),
    }
    await models.delete_base_model("second")
    await world.sweep()
    assert world.objects.keys() == []


async def test_a_finished_import_leaves_nothing_in_staging(world, models):
    """Such as the parts of a file whose takeover was answered too late."""
    await upload(models, tiny_folder())
    await world.objects.put(f"{import_staging('tiny')}{'a' * 64}/00000", b"part")
    await world.objects.put(f"{import_staging('tiny-2')}{'a' * 64}/00000", b"another's")
    await models.commit_base_model("tiny")
    kept = world.objects.keys()
    assert [key for key in kept if key.startswith("staging/")] == [
        f"{import_staging('tiny-2')}{'a' * 64}/00000"
    ]


async def test_an_import_that_nobody_finishes_goes_after_a_day(world, models):
    await upload(models, tiny_folder())
    await world.sweep()
    assert (await models.get_base_model("tiny")).state is BaseModelState.UPLOADING
    world.clock.tick(timedelta(days=1, seconds=1).total_seconds())
    await world.sweep()
    assert world.objects.keys() == []
    with pytest.raises(NotFound):
        await models.get_base_model("tiny")


class Stops(Exception):
    """The process died here."""


def dying(objects, calls):
    """The store, with a process that dies at its `calls`-th change of it."""

    class Dying:
        def __getattr__(self, name):
            return getattr(objects, name)

    left = [calls]

    def change(name):
        async def method(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Stops
            return await getattr(objects, name)(*args, **kwargs)

        return method

    store = Dying()
    for name in ("put", "copy", "delete", "delete_prefix"):
        setattr(store, name, change(name))
    return store


@pytest.mark.parametrize("calls", range(12))
async def test_an_import_interrupted_anywhere_goes_on_and_ends_the_same(world, calls):
    folder = tiny_folder()
    died = ModelsService(SqlModelStore(world.db), dying(world.objects, calls), world.clock, world.ids)
    with pytest.raises(Stops):
        await upload(died, folder)
        await died.commit_base_model("tiny")
        await died.objects.delete("end/reached")
        raise Stops
    models = world.start()
    await upload(models, folder)
    model = await models.commit_base_model("tiny")
    assert model.state is BaseModelState.READY and all(file.stored for file in model.files)
    assert await world.objects.head(manifest_key(model.digest)) is not None


@pytest.mark.parametrize("calls", range(8))
async def test_a_deletion_interrupted_anywhere_goes_on(world, models, base, calls):
    await models.delete_base_model("tiny")
    try:
        await Cleaner(SqlModelStore(world.db), dying(world.objects, calls), world.clock).sweep()
    except Stops:
        assert world.objects.keys() != []
    await world.sweep()
    assert world.objects.keys() == []
    assert (await world.start().create_base_model(tiny_folder().new(), "")).state is BaseModelState.UPLOADING


async def test_an_outage_of_the_store_loses_nothing(world, models):
    await upload(models, tiny_folder())
    world.objects.outage = Unavailable("The store is away.", retry_after=1)
    with pytest.raises(Unavailable):
        await models.commit_base_model("tiny")
    world.objects.outage = None
    assert (await models.commit_base_model("tiny")).state is BaseModelState.READY


async def test_what_a_stream_stored_after_its_import_was_over_is_swept(world, models, base):
    await models.create_base_model(tiny_folder(rope_theta=9.0).new("uploading"), "")
    late = ["staging/import-tiny/abc-whole", "staging/import-gone/abc/00000"]
    others = ["staging/import-uploading/abc/00000", "staging/x/00000"]
    for key in (*late, *others):
        await world.objects.put(key, b"late")
    await world.sweep()
    assert set(late) <= set(world.objects.keys())
    world.clock.tick(23 * 3600)
    await world.objects.put(others[0], b"goes on")
    world.clock.tick(2 * 3600)
    await world.sweep()
    # The import itself is abandoned after a day, with what it stored.
    left = set(world.objects.keys())
    assert not left & {*late, *others[:1]} and others[1] in left


async def keys(world, prefix="jobs/"):
    return [info.key async for info in world.objects.list(prefix)]


async def test_what_an_ended_job_left_goes_but_for_what_stays_and_is_registered(world, models, base):
    final = await world.put_adapter()
    await models.register_adapter("acme", TUNED, "tiny", final, LINEAGE, is_final=True)
    shown, left = "jobs/ftjob-1/att-1/checkpoints/step-2", "jobs/ftjob-1/att-0/checkpoints/step-20"
    for prefix in (shown, left, "jobs/ftjob-10/att-1/final"):
        await world.put_adapter(prefix)
    before = await keys(world)
    await models.sweep_job_files("ftjob-1", [f"{shown}/"])
    assert await keys(world) == [key for key in before if not key.startswith(left)]
    await models.sweep_job_files("ftjob-1", [shown])
    assert len(await keys(world)) == len(before) - 4


async def test_only_folders_of_the_job_itself_can_be_kept(world, models):
    await world.put_adapter()
    for prefix in ("jobs/ftjob-2/att-1/final", "jobs/ftjob-1/../x", "jobs/ftjob-1/"):
        with pytest.raises(InvalidArgument, match="kept_prefixes"):
            await models.sweep_job_files("ftjob-1", [prefix])
    assert len(await keys(world)) == 4


async def test_a_sweep_of_a_job_that_breaks_off_leaves_nothing_that_looks_whole(world, models):
    await world.put_adapter()
    deleted = []
    delete = world.objects.delete

    async def breaks_off(key):
        if deleted:
            raise Unavailable("away")
        deleted.append(key)
        await delete(key)

    world.objects.delete = breaks_off
    with pytest.raises(Unavailable):
        await models.sweep_job_files("ftjob-1", [])
    assert deleted == [f"{PREFIX}/manifest.json"]
    world.objects.delete = delete
    await models.sweep_job_files("ftjob-1", [])
    assert not await keys(world)
