"""An audit in several processes: the same bytes, also when a process is killed."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from lathe.common.db import Database, migrate
from lathe.common.errors import Internal, LatheError
from lathe.datasets.auditing import Auditor, chunk_of_work
from lathe.datasets.chunkwork import Chunk, Chunker, ChunkResult, ChunkWork, joined
from lathe.datasets.model import AuditOptions, AuditState
from lathe.datasets.workers import Processes, Task, Work, limited_memory, run_chunk
from lathe.text.render import RenderOptions
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import build_tiny_tokenizer
from tests.unit.datasets.conftest import World, jsonl, row

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONTENT = jsonl(row(f"Hello {n}", f"Yes, {n} it is.") for n in range(200))


def die_once(died: Path, task: Task, lines: Chunk) -> ChunkResult:
    """Kills its process over the second chunk, the first time."""
    if lines[0].number == 65 and not died.exists():
        died.touch()
        die()
    return run_chunk(task, lines)


def die_at_two_lines(task: Task, lines: Chunk) -> ChunkResult:
    """Over one of them its process ends, over the other it takes more memory than it may."""
    for line in lines:
        if line.number == 70:
            os.abort()
        if line.number == 130:
            with limited_memory(1 << 20):
                bytearray(64 << 20)
    return run_chunk(task, lines)


def die_anyway(lines: Chunk) -> ChunkResult:
    raise AssertionError(die())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def search_for_long(started: Path) -> None:
    """Longer than any test waits."""
    whole = started.with_suffix(".whole")
    whole.write_text(str(os.getpid()))
    whole.rename(started)
    time.sleep(3600)


def appears(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


async def searching(started: Path, end: Callable[[], None] | None) -> None:
    """A service that ends amid a search, as it is told to or by end."""
    processes = Processes(1)
    search = asyncio.create_task(processes.result(Work(partial(search_for_long, started), "the search")))
    await asyncio.to_thread(appears, started)
    if end is not None:
        end()
    search.cancel()
    processes.close()


def service(started: Path, end: Callable[[], None] | None) -> None:
    asyncio.run(searching(started, end))


def runs(process: int) -> bool:
    """What has ended and waits for its parent has no command line."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def chunks():
    chunker = Chunker()
    return [*chunker.feed(CONTENT), *chunker.finish()]


async def works(do):
    for lines in chunks():
        yield Work(partial(do, lines), f"the lines from {lines[0].number} on")


@pytest.fixture
def one():
    processes = Processes(1)
    yield processes
    processes.close()


@pytest.fixture
async def world(tmp_path):
    db = Database(f"sqlite+aiosqlite:///{tmp_path}/datasets.sqlite")
    await migrate(db, "lathe.datasets")
    yield World(db, tmp_path / "cache")
    await db.close()


@pytest.fixture
def task(tmp_path):
    return Task(build_tiny_tokenizer(tmp_path / "tokenizer"), RenderOptions(512), NOW)


async def test_a_killed_process_costs_nothing_but_time(task, tmp_path, one):
    work = ChunkWork(Tokenizer.from_folder(task.tokenizer), task.options, task.now)
    expected = [work.run(lines) for lines in chunks()]
    died = tmp_path / "died"
    assert [result async for result in one.results(works(partial(die_once, died, task)))] == expected
    assert died.exists()


async def test_work_that_kills_each_process_is_given_up(one):
    with pytest.raises(Internal, match=r"died 3 times.* at the search for duplicates"):
        await one.result(Work(die, "the search for duplicates"))


@pytest.mark.parametrize(("end", "code"), [(None, 0), (die, -signal.SIGKILL)], ids=["told", "killed"])
def test_nothing_outlives_a_service_that_ends_amid_a_search(tmp_path, end, code):
    """The search may take minutes, which neither Ctrl-C nor a pod's end waits for."""
    started = tmp_path / "started"
    parent = multiprocessing.get_context("spawn").Process(target=service, args=(started, end))
    parent.start()
    parent.join(60)
    ended, search = parent.exitcode, int(started.read_text())
    try:
        assert ended == code
        deadline = time.monotonic() + 30
        while runs(search) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not runs(search)
    finally:
        for process in (parent.pid, search):
            if runs(process):
                os.kill(process, signal.SIGKILL)


async def test_what_no_process_survives_is_told_of_by_its_line(task, one, monkeypatch):
    monkeypatch.setattr("lathe.datasets.workers._DEATHS", 1)
    expected = [
        ChunkWork(Tokenizer.from_folder(task.tokenizer), task.options, task.now).run(lines)
        for lines in chunks()
    ]
    do = partial(die_at_two_lines, task)

    async def works():
        for lines in chunks():
            yield chunk_of_work(do, lines)

    found = [result async for result in one.results(works())]
    assert (found[0], found[3]) == (expected[0], expected[3])
    assert [
        (item.line, item.code) for result in found for item in result.findings if item.code == "row_too_heavy"
    ] == [
        (70, "row_too_heavy"),
        (130, "row_too_heavy"),
    ]
    assert [line for result in found for line in result.lines] == [
        n for n in range(1, 201) if n not in (70, 130)
    ]


async def test_what_kills_every_line_is_held_against_none(task, one, monkeypatch):
    monkeypatch.setattr("lathe.datasets.workers._DEATHS", 1)
    lines = chunks()[0][:2]
    with pytest.raises(Internal, match="at the lines from 1 on"):
        await one.result(chunk_of_work(die_anyway, lines))


def test_the_lines_of_a_chunk_make_its_result(task):
    work = ChunkWork(Tokenizer.from_folder(task.tokenizer), replace(task.options, context_limit=16), task.now)
    (lines, *_) = Chunker().feed(
        jsonl([*(row(f"Hello {n}", "Yes " * n) for n in range(40)), {"messages": []}] * 2)
    )
    assert joined(lines, [work.run([line]) for line in lines]) == work.run(lines)


async def test_a_tokenizer_that_cannot_be_read_is_told_of(task, tmp_path, one):
    elsewhere = partial(run_chunk, replace(task, tokenizer=tmp_path))
    with pytest.raises(LatheError, match=r"tokenizer\.json"):
        [result async for result in one.results(works(elsewhere))]


async def test_a_full_disk_is_told_of_as_one(one):
    """/dev/full has no room."""
    write = partial(Path("/dev/full").write_bytes, bytes(1 << 16))
    with pytest.raises(OSError, match="No space left") as raised:
        await one.result(Work(write, "writing"))
    assert raised.value.errno == errno.ENOSPC


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
