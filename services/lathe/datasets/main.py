"""datasets as a process: the wiring, in order."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from lathe.common.background import Wakeup, in_background, repeat
from lathe.common.clock import Clock, SystemClock
from lathe.common.db import Database, check_schema
from lathe.common.dependencies import watch_dependencies
from lathe.common.ids import IdFactory, RandomIds
from lathe.common.metrics import Metrics
from lathe.common.objectstore.factory import open_store
from lathe.common.probes import database_probe, store_probe
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.diagnosis import diagnosis
from lathe.common.rpc.dialer import Dialer
from lathe.common.rpc.server import Registration, build_server
from lathe.common.service import RunningService, run_service, serving
from lathe.datasets.addresses import networks
from lathe.datasets.auditing import Auditor
from lathe.datasets.blobs import Blobs
from lathe.datasets.cleaner import Cleaner
from lathe.datasets.fetching import Fetcher, Secret
from lathe.datasets.import_store import SqlImportStore
from lathe.datasets.importing import Importing
from lathe.datasets.peers import RpcBaseModels
from lathe.datasets.preparation import PreparationService
from lathe.datasets.preparing import Preparing
from lathe.datasets.preview import Previews
from lathe.datasets.rowindexes import RowIndexes
from lathe.datasets.service import DatasetsService
from lathe.datasets.servicer import DatasetsInternalServicer, DatasetsServicer
from lathe.datasets.settings import DatasetsSettings
from lathe.datasets.sources import Sources
from lathe.datasets.store import SqlDatasetStore
from lathe.datasets.tokenizers import TokenizerCache
from lathe.datasets.truncation import Truncations
from lathe.datasets.upload_service import UploadService
from lathe.datasets.upload_store import SqlUploadStore
from lathe.datasets.validation import Validation
from lathe.datasets.workers import usual_count
from lathe.v1.datasets_pb2_grpc import (
    add_DatasetsInternalServiceServicer_to_server,
    add_DatasetsServiceServicer_to_server,
)
from lathe.v1.models_pb2_grpc import ModelsInternalServiceStub

PACKAGE = "lathe.datasets"
# What was left by a process that died is found at its start; this is for what another replica left.
_LOOK_EVERY_S = 30.0
_COUNT_EVERY_S = 15.0
_IMPORTS_EVERY_S = 5.0
# It lists the whole store.
_ORPHANS_EVERY_S = 6 * 3600.0


@asynccontextmanager
async def running(
    settings: DatasetsSettings, metrics: Metrics, *, clock: Clock | None = None, ids: IdFactory | None = None
) -> AsyncIterator[RunningService]:
    """datasets, answering. Raises FailedPrecondition for a database that is not this version's."""
    clock = clock or SystemClock()
    db = Database(settings.db.url.get_secret_value(), settings.db.pool_size)
    channel = Dialer.of_service(settings.rpc).connect(settings.models_address)
    files = ExitStack()
    try:
        await check_schema(db, PACKAGE)
        objects = open_store(settings.store)
        store = SqlDatasetStore(db)
        base_models = RpcBaseModels(ModelsInternalServiceStub(channel))
        ids = ids or RandomIds()
        service = DatasetsService(store, objects, base_models, clock, ids)
        session_store = SqlUploadStore(db)
        uploads = UploadService(service, session_store)
        imports = Importing(service, SqlImportStore(db), _sources(settings))
        folder = files.enter_context(_folder(settings.cache_folder))
        indexes = RowIndexes(store, objects, folder / "rows", clock, service.indexing)
        await indexes.start()
        tokenizers = TokenizerCache(objects, folder)
        previews = Previews(service, objects, tokenizers, folder)
        await previews.start()
        truncations = Truncations(indexes, tokenizers)
        preparation = PreparationService(service, indexes, truncations)
        busy: set[str] = set()
        indexed = (service.comparing, service.preparing)
        preparing = Preparing(store, objects, indexes, truncations, busy, service.validation, indexed)
        blobs = Blobs(store, objects, clock, ids)
        validation = Validation(blobs, busy, folder=folder / "conversions")
        await validation.start()
        cleaner = Cleaner(blobs, session_store, busy, service.token_use)
        registrations = [
            Registration(
                add_DatasetsServiceServicer_to_server,
                DatasetsServicer(service, uploads, imports, preparation, previews),
                "lathe.v1.DatasetsService",
            ),
            Registration(
                add_DatasetsInternalServiceServicer_to_server,
                DatasetsInternalServicer(service, uploads),
                "lathe.v1.DatasetsInternalService",
            ),
            diagnosis(
                "datasets",
                clock,
                database_probe(db, PACKAGE, clock),
                store_probe(objects, settings.store, ids),
            ),
        ]
        credentials = ServiceCredentials.from_files(
            settings.rpc.service_token_file, settings.rpc.engine_token_file
        )
        server = build_server(registrations, settings.rpc, ServiceAuthenticator(credentials), metrics)
        auditor = Auditor(store, objects, folder, tokenizers, workers=settings.audit_workers or usual_count())
        await auditor.start()
        work = _loops(
            settings=settings,
            clock=clock,
            service=service,
            store=store,
            metrics=metrics,
            validation=validation,
            preparing=preparing,
            auditor=auditor,
            cleaner=cleaner,
            imports=imports,
        )
        checks = {"database": db.check, "store": objects.check}
        work.append(watch_dependencies("datasets", checks, metrics, clock))
        async with in_background(*work), serving(server, "datasets") as service_running:
            yield service_running
    finally:
        await channel.close()
        await db.close()
        files.close()


def _loops(
    *,
    settings: DatasetsSettings,
    clock: Clock,
    service: DatasetsService,
    store: SqlDatasetStore,
    metrics: Metrics,
    validation: Validation,
    preparing: Preparing,
    auditor: Auditor,
    cleaner: Cleaner,
    imports: Importing,
) -> list[Coroutine[Any, Any, None]]:
    """What runs beside the server."""

    async def count() -> None:
        for state, number in (await store.count()).items():
            metrics.datasets.labels(state=state.value).set(number)
        for audited, number in (await store.count_audits()).items():
            metrics.audits.labels(state=audited.value).set(number)
        now = clock.now()
        for task, since in (await store.waiting_since()).items():
            wait = 0.0 if since is None else (now - since).total_seconds()
            metrics.dataset_oldest_wait_seconds.labels(task=task).set(wait)

    async def validate() -> None:
        try:
            await validation.step()
        finally:
            # Files that are READY now have rows to index.
            service.indexing.set()

    def loop(
        name: str, step: Callable[[], Awaitable[None]], wakeup: Wakeup, interval: float
    ) -> Coroutine[Any, Any, None]:
        return repeat(name, step, clock=clock, wakeup=wakeup, interval=interval)

    validations = [
        loop("Validation", validate, service.validation, _LOOK_EVERY_S)
        for _ in range(settings.validation_workers)
    ]
    return [
        *validations,
        loop("Indexing", preparing.index_all, service.indexing, _LOOK_EVERY_S),
        loop("Comparing", preparing.compare_all, service.comparing, _LOOK_EVERY_S),
        loop("Preparation", preparing.write_all, service.preparing, _LOOK_EVERY_S),
        loop("The audit", auditor.step, service.auditing, _LOOK_EVERY_S),
        *(
            loop("An import", imports.step, imports.due, _IMPORTS_EVERY_S)
            for _ in range(settings.imports.workers if settings.imports.enabled else 1)
        ),
        loop("The sweep", cleaner.sweep, service.cleanup, settings.sweep_interval_s),
        loop("The sweep of orphans", cleaner.sweep_orphans, Wakeup(), _ORPHANS_EVERY_S),
        loop("Counting", count, Wakeup(), _COUNT_EVERY_S),
    ]


def _sources(settings: DatasetsSettings) -> Sources | None:
    """What may be imported; None where nothing is."""
    given = settings.imports
    if not given.enabled:
        return None
    buckets = {}
    if given.s3 is not None:
        buckets = {
            name: open_store(given.s3.model_copy(update={"bucket": name})) for name in given.s3_buckets
        }
    fetcher = Fetcher(networks(given.allow_networks), given.max_bytes, given.max_seconds)
    secret = None
    if given.hub_token is not None:
        secret = Secret(given.hub, f"Bearer {given.hub_token.get_secret_value()}")
    return Sources(fetcher, given.hub, buckets, secret)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="lathe-datasets-") as temporary:
        yield Path(temporary)


def main() -> int:
    """Run datasets until a signal; the exit code."""
    return run_service(running, DatasetsSettings)


if __name__ == "__main__":
    sys.exit(main())
