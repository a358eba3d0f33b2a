"""A database and a store that outlive the processes started over them."""

import hashlib
import json

import pytest

from lathe.common.background import Wakeup
from lathe.common.db import Database, migrate
from lathe.datasets.auditing import Auditor
from lathe.datasets.blobs import Blobs
from lathe.datasets.cleaner import Cleaner
from lathe.datasets.conversion import convert
from lathe.datasets.model import blob_key
from lathe.datasets.preparation import PreparationService
from lathe.datasets.preparing import Preparing
from lathe.datasets.rowindexes import RowIndexes
from lathe.datasets.service import DatasetsService, TokenUse
from lathe.datasets.store import SqlDatasetStore
from lathe.datasets.tokenizers import TokenizerCache
from lathe.datasets.truncation import Truncations
from lathe.datasets.upload_store import SqlUploadStore
from lathe.datasets.validation import Validation
from tests.fakes.clock import FakeClock
from tests.fakes.datasets import FakeBaseModels
from tests.fakes.ids import FakeIds
from tests.fakes.objectstore import MemoryObjectStore


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def row(user: str = "Hello", answer: str = "How can I help you today?", **changes: object) -> dict:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **changes}


def jsonl(rows) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in rows)


GOOD = jsonl([row(f"Hello {n}") for n in range(12)])


async def converted_here(source, target, options):
    """A Converter without a process of its own."""
    return convert(source, target, options)


class World:
    def __init__(self, db, folder):
        self.db = db
        self.folder = folder
        self.clock = FakeClock()
        self.objects = MemoryObjectStore(self.clock)
        self.ids = FakeIds()
        self.base_models = FakeBaseModels()
        self.token_use = TokenUse()

    @property
    def store(self):
        return SqlDatasetStore(self.db)

    @property
    def uploads(self):
        return SqlUploadStore(self.db)

    def start(self, *, store=None, objects=None):
        return DatasetsService(
            store or self.store,
            objects or self.objects,
            self.base_models,
            self.clock,
            self.ids,
            token_use=self.token_use,
        )

    async def validate(self, *, store=None, objects=None):
        await self.validation(store=store, objects=objects).step()

    def validation(self, *, store=None, objects=None):
        return Validation(self.blobs(store=store, objects=objects), convert=converted_here)

    def blobs(self, *, store=None, objects=None):
        return Blobs(store or self.store, objects or self.objects, self.clock, self.ids)

    async def audit(self, *, store=None, objects=None):
        await Auditor(store or self.store, objects or self.objects, self.folder).step()

    def preparation(self, *, store=None, objects=None):
        store, objects = store or self.store, objects or self.objects
        indexes = RowIndexes(store, objects, self.folder / "rows", self.clock, Wakeup())
        truncations = Truncations(indexes, TokenizerCache(objects, self.folder))
        return PreparationService(self.start(store=store, objects=objects), indexes, truncations)

    async def prepare(self, *, store=None, objects=None):
        """Index, compare with held-out sets, write: what the background does."""
        service = self.preparation(store=store, objects=objects)
        indexes = service.indexes
        preparing = Preparing(indexes.store, indexes.objects, indexes, service.truncations)
        await preparing.index_all()
        await preparing.compare_all()
        await preparing.write_all()

    async def derive(self, dataset, operation):
        """The datasets that an operation makes, once they are settled."""
        made = await self.preparation().prepare(dataset.project, dataset.id, operation, "")
        await self.prepare()
        await self.validate()
        await self.prepare()
        return [await self.start().get(dataset.project, each.dataset.id) for each in made]

    async def content(self, dataset):
        return await self.objects.get(blob_key(dataset.sha256))

    async def sweep(self, *, store=None, objects=None):
        await self.cleaner(store=store, objects=objects).sweep()

    def cleaner(self, *, store=None, objects=None, busy=()):
        return Cleaner(self.blobs(store=store, objects=objects), self.uploads, busy, self.token_use)

    async def upload(self, content=GOOD, *, purpose="fine-tune", parts=0, name="train.jsonl", options=None):
        """Create, put the bytes into staging as the gateway does, commit."""
        service = self.start()
        dataset = await service.create("acme", name, purpose, None, "", import_options=options)
        key = dataset.staging_key
        if parts:
            size = -(-len(content) // parts)
            for number in range(parts):
                await self.objects.put(f"{key}/{number:05d}", content[number * size : (number + 1) * size])
        else:
            await self.objects.put(key, content)
        return await service.commit_upload("acme", dataset.id, key, len(content), sha(content))

    async def ready(self, content=GOOD, **options):
        dataset = await self.upload(content, **options)
        await self.validate()
        return await self.start().get("acme", dataset.id)


@pytest.fixture
async def world(tmp_path):
    db = Database(f"sqlite+aiosqlite:///{tmp_path}/datasets.sqlite")
    await migrate(db, "lathe.datasets")
    yield World(db, tmp_path / "cache")
    await db.close()


@pytest.fixture
def service(world):
    return world.start()
