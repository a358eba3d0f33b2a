"""models as a process: the wiring, in order."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lathe.common.background import in_background, repeat
from lathe.common.clock import Clock, SystemClock
from lathe.common.db import Database, check_schema
from lathe.common.dependencies import watch_dependencies
from lathe.common.ids import IdFactory, RandomIds
from lathe.common.metrics import Metrics
from lathe.common.objectstore.factory import open_store
from lathe.common.probes import database_probe, store_probe
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.diagnosis import diagnosis
from lathe.common.rpc.server import Registration, build_server
from lathe.common.service import RunningService, run_service, serving
from lathe.models.cleaner import Cleaner
from lathe.models.service import ModelsService
from lathe.models.servicer import ModelsInternalServicer, ModelsServicer
from lathe.models.settings import ModelsSettings
from lathe.models.store import SqlModelStore
from lathe.v1.models_pb2_grpc import (
    add_ModelsInternalServiceServicer_to_server,
    add_ModelsServiceServicer_to_server,
)

PACKAGE = "lathe.models"


@asynccontextmanager
async def running(
    settings: ModelsSettings, metrics: Metrics, *, clock: Clock | None = None, ids: IdFactory | None = None
) -> AsyncIterator[RunningService]:
    """models, answering. Raises FailedPrecondition for a database that is not this version's."""
    clock = clock or SystemClock()
    db = Database(settings.db.url.get_secret_value(), settings.db.pool_size)
    try:
        await check_schema(db, PACKAGE)
        objects = open_store(settings.store)
        store = SqlModelStore(db)
        ids = ids or RandomIds()
        service = ModelsService(store, objects, clock, ids)
        cleaner = Cleaner(store, objects, clock)
        registrations = [
            Registration(
                add_ModelsServiceServicer_to_server, ModelsServicer(service), "lathe.v1.ModelsService"
            ),
            Registration(
                add_ModelsInternalServiceServicer_to_server,
                ModelsInternalServicer(service),
                "lathe.v1.ModelsInternalService",
            ),
            diagnosis(
                "models",
                clock,
                database_probe(db, PACKAGE, clock),
                store_probe(objects, settings.store, ids),
            ),
        ]
        credentials = ServiceCredentials.from_files(
            settings.rpc.service_token_file, settings.rpc.engine_token_file
        )
        server = build_server(registrations, settings.rpc, ServiceAuthenticator(credentials), metrics)
        sweeping = repeat(
            "models' sweep",
            cleaner.sweep,
            clock=clock,
            wakeup=service.cleanup,
            interval=settings.sweep_interval_s,
        )
        checks = {"database": db.check, "store": objects.check}
        watching = watch_dependencies("models", checks, metrics, clock)
        async with in_background(sweeping, watching), serving(server, "models") as service_running:
            yield service_running
    finally:
        await db.close()


def main() -> int:
    """Run models until a signal; the exit code."""
    return run_service(running, ModelsSettings)


if __name__ == "__main__":
    sys.exit(main())
