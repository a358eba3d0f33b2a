"""An audit in several processes: the same bytes, also when a process is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lathe.common.db import Database, migrate
from lathe.common.errors import Internal, LatheError
from lathe.datasets.auditing import Auditor
from lathe.datasets.chunkwork import Chunker, ChunkResult, ChunkWork
from lathe.datasets.model import AuditOptions, AuditState
from lathe.datasets.workers import ChunkWorkers, Task, _work
from lathe.text.jsonl import Line
from lathe.text.render import RenderOptions
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import build_tiny_tokenizer
from tests.unit.datasets.conftest import World, jsonl, row

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONTENT = jsonl(row(f"Hello {n}", f"Yes, {n} it is.") for n in range(200))


def die_once(lines: Sequence[Line]) -> ChunkResult:
    """Kills its process over the second chunk, the first time."""
    if lines[0].number == 65 and not (died := Path(os.environ["LATHE_TEST_DIED"])).exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _work(lines)


def die(lines: Sequence[Line]) -> ChunkResult:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


async def chunks():
    chunker = Chunker()
    for lines in (*chunker.feed(CONTENT), *chunker.finish()):
        yield lines


@pytest.fixture
async def world(tmp_path):
    db = Database(f"sqlite+aiosqlite:///{tmp_path}/datasets.sqlite")
    await migrate(db, "lathe.datasets")
    yield World(db, tmp_path / "cache")
    await db.close()


@pytest.fixture
def task(tmp_path):
    return Task(build_tiny_tokenizer(tmp_path / "tokenizer"), RenderOptions(512), NOW)


async def test_a_killed_process_costs_nothing_but_time(task, tmp_path, monkeypatch):
    monkeypatch.setenv("LATHE_TEST_DIED", str(tmp_path / "died"))
    work = ChunkWork(Tokenizer.from_folder(task.tokenizer), task.options, task.now)
    expected = [work.run(lines) async for lines in chunks()]
    workers = ChunkWorkers(task, 1, die_once)
    try:
        assert [result async for result in workers.results(chunks())] == expected
    finally:
        workers.close()
    assert (tmp_path / "died").exists()


async def test_a_chunk_that_kills_each_process_ends_the_audit(task):
    workers = ChunkWorkers(task, 1, die)
    try:
        with pytest.raises(Internal, match="died 3 times at the lines from 1 on"):
            [result async for result in workers.results(chunks())]
    finally:
        workers.close()


async def test_a_tokenizer_that_cannot_be_read_is_told_of(task, tmp_path):
    workers = ChunkWorkers(replace(task, tokenizer=tmp_path), 1)
    try:
        with pytest.raises(LatheError, match=r"tokenizer\.json"):
            [result async for result in workers.results(chunks())]
    finally:
        workers.close()


async def test_the_objects_do_not_depend_on_the_number_of_processes(world):
    base = await world.base_models.add_tiny(world.objects)
    dataset = await world.ready(CONTENT)
    service = world.start()
    assert (
        await service.ensure_audit("acme", dataset.id, base.name, AuditOptions())
    ).state is AuditState.RUNNING
    (task,) = await world.store.running_audits()
    await Auditor(world.store, world.objects, world.folder).run(task)
    made = [item.key async for item in world.objects.list("blobs/")]
    # The dataset, its tokens and its findings; another byte would be another object.
    assert len(made) == 3
    await Auditor(world.store, world.objects, world.folder, workers=2, bytes_a_worker=1000).run(task)
    assert [item.key async for item in world.objects.list("blobs/")] == made
