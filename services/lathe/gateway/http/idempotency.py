"""A retry of a create joins the first try: OpenAI's SDK repeats requests and sends no idempotency key."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.datastructures import Headers

from lathe.common.clock import Clock
from lathe.common.errors import LatheError
from lathe.common.rpc.principal import Principal
from lathe.gateway.http.errors import kind_of
from lathe.gateway.model import IdempotencyRow
from lathe.gateway.ports import IdempotencyStore

log = logging.getLogger(__name__)

RETRY_COUNT = "x-stainless-retry-count"
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Creates:
    """The creates of one principal at one path. retry: whether the request says that it is a repetition."""

    store: IdempotencyStore
    clock: Clock
    principal: Principal
    path: str
    retry: bool

    async def begin(self, digest: str, wait_s: float) -> Begun:
        """A row for this request, or the earlier one that a retry joins.

        An unfinished earlier try is waited for, `wait_s` seconds at most: its gateway may be gone.
        """
        if self.retry:
            row = await self.store.newest(self.principal.key_id, self.path, digest)
            if row is not None:
                row = await self._ended(row, wait_s)
            if row is not None:
                return Begun(row.id, _success(row))
        row = await self.store.begin(self.principal.key_id, self.path, digest)
        return Begun(row.id, None)

    async def _ended(self, row: IdempotencyRow, wait_s: float) -> IdempotencyRow | None:
        """None: the try was given up. A row that is still running has nobody working on it."""
        until = self.clock.monotonic() + wait_s
        current: IdempotencyRow | None = row
        while current is not None and current.state == "running" and self.clock.monotonic() < until:
            await self.clock.sleep(_POLL_S)
            current = await self.store.get(row.id)
        return current

    async def once(
        self, digest: str, work: Callable[[str], Awaitable[bytes]], *, wait_s: float = 30.0
    ) -> bytes:
        """The body of the answer. `work` gets a request id, which is the same when the work is repeated."""
        begun = await self.begin(digest, wait_s)
        if begun.body is not None:
            return begun.body
        try:
            body = await work(begun.row_id)
        except LatheError as error:
            await self.failed(begun, error)
            raise
        await self.done(begun, body)
        return body

    async def done(self, begun: Begun, body: bytes) -> None:
        """Keep the answer. That it cannot be kept is no reason not to give it: the work is done."""
        try:
            await self.store.finish(begun.row_id, 200, body)
        except LatheError as error:
            log.warning("The answer of %s was not kept for a retry: %s", self.path, error)

    async def failed(self, begun: Begun, error: LatheError) -> None:
        """What was refused is forgotten. What may have happened all the same keeps its id for the retry."""
        status = kind_of(error).status
        if status >= 500:
            await self.store.finish(begun.row_id, status, b"")
        else:
            await self.store.discard(begun.row_id)


@dataclass(frozen=True, slots=True)
class Begun:
    """row_id: also the request id towards the owner. body: the earlier answer, if there is one."""

    row_id: str
    body: bytes | None


def _success(row: IdempotencyRow) -> bytes | None:
    return row.body if row.state == "done" and row.status == 200 else None


def is_retry(headers: Headers) -> bool:
    """Whether the SDK says that it sent this request before."""
    count = headers.get(RETRY_COUNT, "0")
    return count.isascii() and count.isdigit() and int(count[:9]) > 0
