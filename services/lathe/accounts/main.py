"""accounts as a process: the wiring, in order."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lathe.accounts.service import AccountsService
from lathe.accounts.servicer import AccountsInternalServicer, AccountsServicer
from lathe.accounts.settings import AccountsSettings
from lathe.accounts.store import SqlAccountStore
from lathe.common.background import in_background
from lathe.common.clock import Clock, SystemClock
from lathe.common.db import Database, check_schema
from lathe.common.dependencies import watch_dependencies
from lathe.common.ids import IdFactory, RandomIds
from lathe.common.metrics import Metrics
from lathe.common.probes import database_probe
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.diagnosis import diagnosis
from lathe.common.rpc.server import Registration, build_server
from lathe.common.service import RunningService, run_service, serving
from lathe.v1.accounts_pb2_grpc import (
    add_AccountsInternalServiceServicer_to_server,
    add_AccountsServiceServicer_to_server,
)

PACKAGE = "lathe.accounts"


@asynccontextmanager
async def running(
    settings: AccountsSettings, metrics: Metrics, *, clock: Clock | None = None, ids: IdFactory | None = None
) -> AsyncIterator[RunningService]:
    """accounts, answering. Raises FailedPrecondition for a database that is not this version's."""
    clock = clock or SystemClock()
    db = Database(settings.db.url.get_secret_value(), settings.db.pool_size)
    try:
        await check_schema(db, PACKAGE)
        service = AccountsService(SqlAccountStore(db), clock, ids or RandomIds())
        bootstrap = settings.bootstrap_key
        await service.bootstrap(bootstrap.get_secret_value() if bootstrap else None)
        registrations = [
            Registration(
                add_AccountsServiceServicer_to_server, AccountsServicer(service), "lathe.v1.AccountsService"
            ),
            Registration(
                add_AccountsInternalServiceServicer_to_server,
                AccountsInternalServicer(service),
                "lathe.v1.AccountsInternalService",
            ),
            diagnosis("accounts", clock, database_probe(db, PACKAGE, clock)),
        ]
        credentials = ServiceCredentials.from_files(
            settings.rpc.service_token_file, settings.rpc.engine_token_file
        )
        server = build_server(registrations, settings.rpc, ServiceAuthenticator(credentials), metrics)
        watching = watch_dependencies("accounts", {"database": db.check}, metrics, clock)
        async with in_background(watching), serving(server, "accounts") as service_running:
            yield service_running
    finally:
        await db.close()


def main() -> int:
    """Run accounts until a signal; the exit code."""
    return run_service(running, AccountsSettings)


if __name__ == "__main__":
    sys.exit(main())
