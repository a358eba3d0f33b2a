"""ModelStore on SQLite and on PostgreSQL."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lathe.common.db import Database, check_schema, migrate
from lathe.common.errors import FailedPrecondition, NotFound
from lathe.models.model import Adapter, AdapterObject, BaseModel, BaseModelState, Facts, Lineage, ModelFile
from lathe.models.ports import Finish
from lathe.models.store import SqlModelStore

NOW = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
FACTS = Facts(
    "t" * 64,
    "c" * 64,
    "LlamaForCausalLM",
    135_000_000_000,
    2048,
    True,
    "",
    ("supervised",),
    ("q_proj",),
    "{{ x }}",
)
LINEAGE = Lineage(
    "projects/p/jobs/j",
    "att-1",
    3,
    "a",
    "b",
    "c",
    '{"n_epochs": 1}',
    2**31 - 1,
    "0.1",
    "dpo",
    "ft:b:p::parent",
    "9" * 64,
)


def model(id_="one", digest="d" * 64, sha="f" * 64):
    files = (ModelFile("config.json", 10, "e" * 64), ModelFile("model.safetensors", 5 * 2**32, sha))
    return BaseModel(id_, "One", BaseModelState.UPLOADING, digest, files, "mit", "2024-06", "here", NOW)


def adapter(id_="adp-1", model_id="ft:one:p:s:1", time=NOW):
    return Adapter("p", id_, model_id, "one", AdapterObject("jobs/j/a/final", "0" * 64), LINEAGE, time, True)


@pytest.fixture(params=["sqlite", "postgresql"])
async def store(request, tmp_path):
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path}/models.sqlite"
    else:
        url = request.getfixturevalue("postgres").new_database("models_store")
    db = Database(url)
    await migrate(db, "lathe.models")
    await check_schema(db, "lathe.models")
    yield SqlModelStore(db)
    await db.close()


async def test_a_model_comes_back_as_it_went_in(store):
    assert await store.add_base_model(model(), "p/r1")
    assert await store.get_base_model("one") == model()
    assert await store.find_by_request("p/r1") == model()
    assert await store.find_ready("d" * 64) is None
    await store.set_stored("one", {"config.json"})
    assert [file.stored for file in (await store.get_base_model("one")).files] == [True, False]
    assert await store.finish("one", FACTS) is Finish.READY
    assert await store.finish("one", Facts()) is Finish.READY
    ready = await store.find_ready("d" * 64)
    files = tuple(replace(file, stored=True) for file in model().files)
    assert ready == replace(model(), state=BaseModelState.READY, facts=FACTS, files=files)


async def test_ids_and_requests_are_taken_once(store):
    assert await store.add_base_model(model(), "p/r1")
    assert not await store.add_base_model(model(digest="x" * 64), "p/r2")
    assert not await store.add_base_model(model("two"), "p/r1")
    assert await store.add_base_model(model("three"), "")
    assert await store.add_base_model(model("four"), "")


async def test_one_ready_model_per_digest(store):
    for id_ in ("one", "two"):
        await store.add_base_model(model(id_), "")
    outcomes = await asyncio.gather(store.finish("one", FACTS), store.finish("two", FACTS))
    assert sorted(outcome.value for outcome in outcomes) == ["duplicate", "ready"]
    assert await store.finish("none", FACTS) is Finish.GONE


async def test_pages_by_id(store):
    for id_ in ("c", "a", "b"):
        await store.add_base_model(model(id_), "")
    assert [found.id for found in await store.list_base_models(after="", limit=2)] == ["a", "b"]
    assert [found.id for found in await store.list_base_models(after="b", limit=2)] == ["c"]


async def test_deleting_hides_and_frees_and_waits_for_adapters(store):
    await store.add_base_model(model(), "p/r1")
    with pytest.raises(NotFound):
        await store.add_adapter(adapter())
    await store.finish("one", FACTS)
    await store.add_adapter(adapter())
    assert not await store.begin_delete_base_model("one")
    assert await store.begin_delete_adapter("p", "adp-1")
    assert not await store.begin_delete_base_model("one")
    await store.remove_adapter("p", "adp-1")
    assert await store.begin_delete_base_model("one")
    assert await store.get_base_model("one") is None and await store.find_by_request("p/r1") is None
    assert [found.id for found in await store.deleting_base_models()] == ["one"]
    with pytest.raises(NotFound):
        await store.add_adapter(adapter())
    await store.remove_base_model("one")
    assert await store.deleting_base_models() == []
    assert await store.add_base_model(model(), "p/r1")


async def test_a_live_model_is_never_removed(store):
    await store.add_base_model(model(), "")
    await store.begin_delete_base_model("other")
    assert await store.abandoned_uploads(NOW) == []
    assert await store.abandoned_uploads(NOW + timedelta(seconds=1)) == ["one"]
    assert await store.deleting_base_models() == []


async def test_claims_see_what_other_models_need(store):
    for id_, digest, sha in (("one", "1" * 64, "a" * 64), ("two", "2" * 64, "b" * 64)):
        await store.add_base_model(model(id_, digest, sha), "")
    await store.begin_delete_base_model("one")
    assert await store.claim("1" * 64, "one") and await store.claim("a" * 64, "one")
    assert not await store.claim("e" * 64, "one")
    assert await store.claim("a" * 64, "one")
    assert not await store.claim("a" * 64, "two")
    assert await store.claimed({"a" * 64, "b" * 64, "e" * 64}) == {"a" * 64}
    await store.add_base_model(model("three", "3" * 64, "a" * 64), "")
    assert not await store.claim("a" * 64, "one")
    await store.remove_base_model("one")
    assert await store.claimed({"1" * 64}) == set()


async def test_adapters(store):
    await store.add_base_model(model(), "")
    await store.finish("one", FACTS)
    made = [adapter(f"adp-{n}", f"ft:one:p:s:{n}", NOW + timedelta(microseconds=n // 2)) for n in range(4)]
    for each in reversed(made):
        assert await store.add_adapter(each) == each
    assert await store.add_adapter(replace(made[0], id="adp-9")) == made[0]
    assert await store.get_adapter("p", "adp-0") == made[0]
    assert await store.get_adapter("q", "adp-0") is None
    assert await store.find_adapter("p", "ft:one:p:s:3") == made[3]
    assert await store.list_adapters("p", after=None, limit=2) == made[:2]
    assert await store.list_adapters("p", after=(made[1].create_time, "adp-1"), limit=9) == made[2:]
    assert await store.list_adapters("q", after=None, limit=9) == []
    assert await store.begin_delete_adapter("p", "adp-0")
    assert not await store.begin_delete_adapter("p", "adp-0")
    assert await store.deleting_adapters() == [made[0]]
    with pytest.raises(FailedPrecondition):
        await store.add_adapter(made[0])
    assert await store.get_adapter("p", "adp-0") is None


async def test_the_folders_of_adapters_are_found_by_what_they_begin_with(store):
    await store.add_base_model(model(), "")
    await store.set_stored("one", {"config.json", "model.safetensors"})
    await store.finish("one", FACTS)
    for number, prefix in enumerate(("jobs/j_1/a/final", "jobs/j_1/b/final", "jobs/jx1/a/final")):
        made = replace(
            adapter(f"adp-{number}", f"ft:one:p:s:{number}"), object=AdapterObject(prefix, "0" * 64)
        )
        await store.add_adapter(made)
    # An underscore is no wildcard.
    assert await store.adapter_prefixes("jobs/j_1/") == {"jobs/j_1/a/final", "jobs/j_1/b/final"}
    await store.begin_delete_adapter("p", "adp-0")
    assert await store.adapter_prefixes("jobs/j_1/") == {"jobs/j_1/b/final"}
