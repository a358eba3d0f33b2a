from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from starlette.datastructures import Headers

from lathe.common.errors import NotFound, Unavailable
from lathe.common.rpc.principal import Principal
from lathe.gateway.http.idempotency import Creates, is_retry
from lathe.gateway.model import IdempotencyRow
from tests.fakes.clock import FakeClock

ALICE = Principal("acme", "member", "key_1")


@dataclass
class Rows:
    """IdempotencyStore in a dictionary; the SQL one has contract tests of its own."""

    clock: FakeClock
    rows: dict[str, IdempotencyRow] = field(default_factory=dict)

    async def begin(self, key_id: str, path: str, digest: str) -> IdempotencyRow:
        row = IdempotencyRow(f"r{len(self.rows)}", key_id, path, digest, "running", self.clock.now())
        self.rows[row.id] = row
        return row

    async def finish(self, row_id: str, status: int, body: bytes) -> None:
        self.rows[row_id] = replace(self.rows[row_id], state="done", status=status, body=body)

    async def discard(self, row_id: str) -> None:
        del self.rows[row_id]

    async def newest(
        self, key_id: str, path: str, digest: str, *, within_s: float = 600
    ) -> IdempotencyRow | None:
        found = [
            row for row in self.rows.values() if (row.key_id, row.path, row.digest) == (key_id, path, digest)
        ]
        return found[-1] if found else None

    async def get(self, row_id: str) -> IdempotencyRow | None:
        return self.rows.get(row_id)

    async def sweep(self, older_than_s: float) -> int:
        return 0


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.rows = Rows(self.clock)
        self.work: list[str] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def create(self, *, retry: bool = False, digest: str = "d") -> bytes:
        creates = Creates(self.rows, self.clock, ALICE, "/p", retry)

        async def work(request_id: str) -> bytes:
            self.work.append(request_id)
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            return request_id.encode()

        return await creates.once(digest, work)


async def test_a_retry_gets_the_first_answer_and_a_new_request_a_new_one() -> None:
    world = World()
    world.gate.set()
    first = await world.create()
    assert await world.create(retry=True) == first
    assert await world.create() != first
    assert await world.create(retry=True, digest="other") != first


async def test_a_retry_waits_for_the_first_try() -> None:
    world = World()
    first = asyncio.create_task(world.create())
    await world.clock.advance(0)
    second = asyncio.create_task(world.create(retry=True))
    await world.clock.advance(5)
    assert not second.done() and world.work == ["r0"]
    world.gate.set()
    await world.clock.advance(1)
    assert await first == await second == b"r0" and world.work == ["r0"]


async def test_a_try_that_nobody_finishes_is_repeated_under_its_id() -> None:
    world = World()
    world.gate.set()
    await world.rows.begin("key_1", "/p", "d")
    retry = asyncio.create_task(world.create(retry=True))
    await world.clock.advance(31)
    assert await retry == b"r0"


@pytest.mark.parametrize(("error", "ids"), [(Unavailable("x"), ["r0", "r0"]), (NotFound("x"), ["r0", "r0"])])
async def test_what_failed_is_done_again(error: Exception, ids: list[str]) -> None:
    world = World()
    world.gate.set()
    world.error = error
    with pytest.raises(type(error)):
        await world.create()
    assert bool(world.rows.rows) == isinstance(error, Unavailable)
    world.error = None
    assert await world.create(retry=True) == b"r0" and world.work == ids


def test_the_header() -> None:
    assert is_retry(Headers({"x-stainless-retry-count": "2"}))
    for value in ("0", "", "-1", "x", "²"):
        assert not is_retry(Headers({"x-stainless-retry-count": value}))
    assert not is_retry(Headers())
