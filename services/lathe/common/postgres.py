"""A PostgreSQL connection that does not wait for ever. psycopg comes with an extra, so only `common.db` imports this,
and only for a PostgreSQL URL."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

T = TypeVar("T")
Connect = Callable[..., Awaitable[psycopg.AsyncConnection[Any]]]


def connector(answer_timeout_s: float) -> Connect:
    """What opens connections on which the server has `answer_timeout_s` seconds for each answer.

    A server that stands still (a paused machine, a disk that hangs) keeps its connections alive: no keepalive and no
    statement_timeout of its own ends such a wait. The connection is closed then, and OperationalError raised.
    """

    class Connection(psycopg.AsyncConnection[Any]):
        async def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
            limit = answer_timeout_s if timeout is None else min(timeout, answer_timeout_s)
            try:
                return await super().wait(gen, interval, limit)
            except psycopg.OperationalError:
                # Still active: the server owes an answer, which must not be taken for that of the next statement.
                if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    self.pgconn.finish()
                raise

    return Connection.connect
