"""Deleting never takes what something names, and leaves nothing: two processes over one database and one store, each
of which may die before any of its calls, with the calls of both in any order."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lathe.common.db import Database, migrate
from lathe.common.errors import Unavailable
from lathe.datasets.blobs import Blobs
from lathe.datasets.cleaner import Cleaner
from lathe.datasets.model import DatasetState, blob_key
from lathe.datasets.upload_service import UploadService
from lathe.datasets.validation import Validation
from tests.unit.datasets.conftest import GOOD, World, sha

# Two, so that equal content is common.
CONTENTS = (b"one content", b"another")
REPLICAS = ("a", "b")
DECISIVE = {
    *("claim_blob", "release_blob", "is_claimed", "note_digest", "finish_validation", "remove", "unnamed"),
    *("head", "copy", "delete", "clear_staging"),
}
_TEMPLATE = TemporaryDirectory(prefix="lathe-collection-")


class Gate:
    """Where a task waits before each call to the database or the store."""

    def __init__(self) -> None:
        self.arrived, self.open = asyncio.Event(), asyncio.Event()

    async def wait(self) -> None:
        self.arrived.set()
        await self.open.wait()
        self.open.clear()


class Gated:
    """The methods of the target whose order decides, behind the gate."""

    def __init__(self, target: Any, gate: Gate) -> None:
        self._target, self._gate = target, gate

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        if name not in DECISIVE:
            return method

        async def call(*args: Any, **options: Any) -> Any:
            await self._gate.wait()
            return await method(*args, **options)

        return call


class Running:
    """A task of a replica, standing at its gate."""

    def __init__(self, replica: str, gate: Gate, task: asyncio.Task[None]) -> None:
        self.replica, self.gate, self.task = replica, gate, task

    async def go_on(self) -> None:
        """Until it stands at the gate again, or has ended."""
        self.gate.arrived.clear()
        self.gate.open.set()
        await self.settle()

    async def settle(self) -> None:
        arrived = asyncio.ensure_future(self.gate.arrived.wait())
        await asyncio.wait({self.task, arrived}, return_when=asyncio.FIRST_COMPLETED)
        arrived.cancel()
        if self.task.done() and not isinstance(self.task.exception(), Unavailable | None):
            raise self.task.exception()


class Collection(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = TemporaryDirectory(prefix="lathe-collection-")
        path = Path(self.folder.name) / "datasets.sqlite"
        shutil.copyfile(template(), path)
        self.db = Database(f"sqlite+aiosqlite:///{path}")
        self.world = World(self.db, Path(self.folder.name))
        self.running: list[Running] = []
        self.busy: dict[str, set[str]] = {replica: set() for replica in REPLICAS}
        self.made: list[str] = []

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @rule(which=st.sampled_from((CONTENTS[0], *CONTENTS)), in_parts=st.booleans())
    def upload(self, which: bytes, in_parts: bool) -> None:
        self.made.append(self.do(self._upload(which, in_parts)))

    @rule(which=st.sampled_from((CONTENTS[0], *CONTENTS)))
    def upload_and_validate(self, which: bytes) -> None:
        """A third process, which is quick."""
        self.made.append(self.do(self._upload(which, in_parts=False)))
        with suppress(Unavailable):
            self.do(self.world.validate())

    async def _upload(self, content: bytes, in_parts: bool) -> str:
        if not in_parts:
            return (await self.world.upload(content, purpose="user_data")).id
        service = self.world.start()
        uploads = UploadService(service, self.world.uploads)
        dataset = await service.create("acme", "a", "user_data", None, "")
        await uploads.open(dataset, len(content), "", presigned=False)
        targets = [await uploads.open_part("acme", dataset.id) for _ in range(2)]
        for target, data in zip(targets, (content[:3], content[3:]), strict=True):
            await self.world.objects.put(target.object_key, data)
        await uploads.complete("acme", dataset.id, [target.part_id for target in targets])
        return dataset.id

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        chosen = data.draw(st.sampled_from(self.made))
        self.made.remove(chosen)
        self.do(self.world.start().delete("acme", chosen))

    @rule(
        replica=st.sampled_from(REPLICAS),
        what=st.sampled_from(("sweep", "sweep", "validate", "sweep_orphans")),
    )
    def start(self, replica: str, what: str) -> None:
        if len(self.running) < 4:
            self.do(self._start(replica, what))

    async def _start(self, replica: str, what: str) -> None:
        gate = Gate()
        store, objects = Gated(self.world.store, gate), Gated(self.world.objects, gate)
        blobs = Blobs(store, objects, self.world.clock, self.world.ids)  # type: ignore[arg-type]
        if what == "validate":
            work = Validation(blobs, self.busy[replica]).step()
        else:
            work = getattr(Cleaner(blobs, self.world.uploads, self.busy[replica]), what)()
        running = Running(replica, gate, asyncio.ensure_future(work))
        await running.settle()
        self.running.append(running)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), calls=st.sampled_from((1, 1, 1, 100)))
    def go_on(self, data: Any, calls: int) -> None:
        running = data.draw(st.sampled_from(self.running))
        for _ in range(calls):
            if not running.task.done():
                self.do(running.go_on())
        self.running = [one for one in self.running if not one.task.done()]

    @rule(replica=st.sampled_from(REPLICAS))
    def die(self, replica: str) -> None:
        self.do(self._die(replica))

    async def _die(self, replica: str) -> None:
        for one in self.running:
            if one.replica == replica:
                one.task.cancel()
                await asyncio.wait({one.task})
        self.running = [one for one in self.running if one.replica != replica]
        self.busy[replica] = set()

    @rule(hours=st.sampled_from((0.25, 30)))
    def time_passes(self, hours: float) -> None:
        """No process stands still for as long as this."""
        self._drain()
        self.world.clock.tick(hours * 3600)

    def _drain(self) -> None:
        while self.running:
            for one in self.running:
                if not one.task.done():
                    self.do(one.go_on())
            self.running = [one for one in self.running if not one.task.done()]

    @invariant()
    def what_is_ready_is_there(self) -> None:
        self.do(self._check_ready())

    async def _check_ready(self) -> None:
        for dataset in await self.world.store.in_state(DatasetState.READY):
            content = next(content for content in CONTENTS if sha(content) == dataset.sha256)
            assert await self.world.objects.get(blob_key(dataset.sha256)) == content

    def teardown(self) -> None:
        try:
            self._drain()
            self.do(self._settle())
        finally:
            for replica in REPLICAS:
                self.do(self._die(replica))
            self.do(self.db.close())
            self.loop.close()
            self.folder.cleanup()

    async def _settle(self) -> None:
        """Left to itself for two days, the platform has validated what was uploaded and kept nothing else."""
        for _ in range(2):
            for step in (self.world.sweep, self.world.validate, self.world.cleaner().sweep_orphans):
                # What waits for the claim of a call that broke off goes on when that is old.
                with suppress(Unavailable):
                    await step()
            self.world.clock.tick(30 * 3600)
        await self.world.sweep()
        await self.world.cleaner().sweep_orphans()
        kept = await self.world.store.in_state(DatasetState.READY)
        assert {dataset.id for dataset in kept} == set(self.made)
        assert self.world.objects.keys() == sorted({blob_key(dataset.sha256) for dataset in kept})
        assert await self.world.store.unnamed([sha(content) for content in CONTENTS]) == {
            sha(content) for content in CONTENTS
        } - {dataset.sha256 for dataset in kept}


def template() -> Path:
    """A database with the tables; making them anew for each example would take most of the time."""
    path = Path(_TEMPLATE.name) / "template.sqlite"
    if not path.exists():

        async def make() -> None:
            db = Database(f"sqlite+aiosqlite:///{path}")
            await migrate(db, "lathe.datasets")
            await db.close()

        asyncio.run(make())
    return path


Collection.TestCase.settings = settings(
    max_examples=8, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCollection = Collection.TestCase


async def test_a_deletion_that_stood_still_takes_nothing_that_came_later(world, service):
    """Two calls delete the same blob, of one process or of two; one of them is slow."""
    old = await world.ready()
    await service.delete("acme", old.id)
    gate = Gate()
    slow = Blobs(world.store, Gated(world.objects, gate), world.clock, world.ids)
    running = Running("", gate, asyncio.ensure_future(slow.delete(old.sha256, old.name)))
    await running.settle()
    await world.sweep()
    new = await world.upload()
    with suppress(Unavailable):
        await world.validate()
    while not running.task.done():
        await running.go_on()
    await world.validate()
    assert (await service.get("acme", new.id)).state is DatasetState.READY
    assert await world.objects.get(blob_key(new.sha256)) == GOOD


async def test_what_arrives_when_its_dataset_is_gone_is_swept(world, service):
    kept, gone = await world.ready(), await service.create("acme", "a", "fine-tune", None, "")
    await service.delete("acme", gone.id)
    await world.sweep()
    late = [
        f"{gone.staging_key}/00003",
        f"{gone.staging_key}.whole",
        blob_key("0" * 64),
        "rowindexes/" + "0" * 64 + ".v1",
    ]
    for key in (*late, "staging/import-base/x"):
        await world.objects.put(key, b"late")
    world.objects.unfinished = [world.clock.now()]
    await world.cleaner().sweep_orphans()
    assert set(late) < set(world.objects.keys()) and world.objects.unfinished
    world.clock.tick(24 * 3600 + 1)
    await world.cleaner().sweep_orphans()
    assert world.objects.keys() == [blob_key(kept.sha256), "staging/import-base/x"]
    assert not world.objects.unfinished
