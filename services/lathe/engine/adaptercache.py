"""Which adapters are in the model's memory for sampling: loaded when first asked for, evicted least used first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lathe.common.clock import Clock
from lathe.common.errors import FailedPrecondition, ResourceExhausted
from lathe.common.objectstore.base import ObjectStore
from lathe.engine.basecache import ensure_adapter
from lathe.engine.full import is_full
from lathe.engine.loop import ModelLoop
from lathe.engine.model import AdapterRef

# A whole tuned model takes the place of so large a part of the adapters: memory for at most four of them.
WHOLE_MODEL = 4


class AdapterCache:
    """Keys are manifest digests. An adapter in training is served from its published files like any other."""

    def __init__(
        self, store: ObjectStore, loop: ModelLoop, folder: Path, max_adapters: int, clock: Clock
    ) -> None:
        self._store, self._loop, self._folder, self._limit = store, loop, folder, max_adapters
        self._clock = clock
        # Key -> how many calls use it; the least recently used first.
        self._users: OrderedDict[str, int] = OrderedDict()
        self._places: dict[str, int] = {}
        self._fetching: dict[str, asyncio.Lock] = {}
        self._residence = asyncio.Lock()

    @property
    def loaded(self) -> int:
        return len(self._users)

    async def load(self, ref: AdapterRef) -> bool:
        """Bring it into memory; False when it was there. Raises NotFound, DataLoss, InvalidArgument."""
        was_there = ref.manifest_sha256 in self._users
        async with self.using(ref):
            return not was_there

    @asynccontextmanager
    async def using(self, ref: AdapterRef | None) -> AsyncIterator[str]:
        """The engine's key of an adapter ("" for None, the base), which stays in memory inside the block."""
        if ref is None:
            yield ""
            return
        key = ref.manifest_sha256
        if key not in self._users:
            async with self._fetching.setdefault(key, asyncio.Lock()):
                folder = await ensure_adapter(self._store, ref, self._folder, self._clock)
            self._fetching.pop(key, None)
            # One at a time decides who stays in memory; those who are there already do not wait for it.
            async with self._residence:
                if key not in self._users:
                    whole = await asyncio.to_thread(is_full, folder)
                    places = max(1, self._limit // WHOLE_MODEL) if whole else 1
                    await self._make_room(places)
                    await asyncio.wrap_future(self._loop.load_adapter(key, folder))
                    self._users[key], self._places[key] = 0, places
                self._users[key] += 1
        else:
            self._users[key] += 1
        self._users.move_to_end(key)
        try:
            yield key
        finally:
            self._users[key] -= 1

    async def _make_room(self, places: int) -> None:
        while sum(self._places[key] for key in self._users) + places > self._limit:
            idle = [key for key, users in self._users.items() if users == 0]
            for key in idle:
                del self._users[key]
                try:
                    await asyncio.wrap_future(self._loop.drop_adapter(key))
                    del self._places[key]
                    break
                except FailedPrecondition:
                    # A call has just ended and the model thread has not freed its sequence yet.
                    self._users[key] = 0
            else:
                raise ResourceExhausted(
                    f"All {self._limit} adapters in memory are in use; try again soon.", retry_after=1.0
                )
