"""jobs as a process: the wiring, in order."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from lathe.common.background import Wakeup, in_background, repeat
from lathe.common.clock import Clock, SystemClock
from lathe.common.db import Database, check_schema
from lathe.common.dependencies import watch_dependencies
from lathe.common.ids import IdFactory, RandomIds
from lathe.common.metrics import Metrics
from lathe.common.probes import database_probe
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.diagnosis import diagnosis
from lathe.common.rpc.dialer import Dialer
from lathe.common.rpc.server import Registration, build_server
from lathe.common.service import RunningService, run_service, serving
from lathe.jobs.changes import Changes
from lathe.jobs.contact import Contact
from lathe.jobs.diagnosis import EngineProbe
from lathe.jobs.directory import EngineDirectory
from lathe.jobs.estimating import EstimatesService, Estimator
from lathe.jobs.figures import Prices
from lathe.jobs.gangs import Gangs
from lathe.jobs.launchers.processes import ENGINE_MODULE
from lathe.jobs.launchers.ray import RayLauncher
from lathe.jobs.launchers.subprocess import SubprocessLauncher
from lathe.jobs.leftovers import Leftovers
from lathe.jobs.machine import has_bfloat16
from lathe.jobs.peers import RpcAccounts, RpcDatasets, RpcModels
from lathe.jobs.policy import Limits
from lathe.jobs.ports import JobStore, Launcher
from lathe.jobs.quotas import Quotas
from lathe.jobs.reconciler import Reconciler
from lathe.jobs.reports import ReportsService
from lathe.jobs.service import JobsService
from lathe.jobs.servicer import JobsInternalServicer, JobsServicer, WorkerServicer
from lathe.jobs.settings import JobsSettings, KubernetesSettings
from lathe.jobs.sharedclock import SharedClock
from lathe.jobs.steps import JobSteps
from lathe.jobs.store import SqlJobStore
from lathe.jobs.tokens import TokenKeeper
from lathe.jobs.workers import LeaseTerms, WorkersService
from lathe.v1.accounts_pb2_grpc import AccountsInternalServiceStub
from lathe.v1.datasets_pb2_grpc import DatasetsInternalServiceStub, DatasetsServiceStub
from lathe.v1.jobs_pb2_grpc import (
    add_JobsInternalServiceServicer_to_server,
    add_JobsServiceServicer_to_server,
)
from lathe.v1.models_pb2_grpc import ModelsInternalServiceStub
from lathe.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server

PACKAGE = "lathe.jobs"
# datasets wants to hear it once a day.
_KEEP_TOKENS_EVERY_S = 6 * 3600.0
# Nobody waits for it.
_SWEEP_EVERY_S = 60.0


@asynccontextmanager
async def running(
    settings: JobsSettings, metrics: Metrics, *, clock: Clock | None = None, ids: IdFactory | None = None
) -> AsyncIterator[RunningService]:
    """jobs, answering and reconciling. Leaving ends the engines that it started as child processes.

    Raises FailedPrecondition for a database that is not this version's, a port in use, a missing token file.
    """
    machine_clock = clock or SystemClock()
    # On several machines, the database's clock judges the leases.
    clock = SharedClock(machine_clock)
    ids = ids or RandomIds()
    async with AsyncExitStack() as stack:
        db = Database(settings.db.url.get_secret_value(), settings.db.pool_size)
        stack.push_async_callback(db.close)
        await check_schema(db, PACKAGE)
        store = SqlJobStore(db, clock, ids)
        dialer = Dialer.of_service(settings.rpc)
        accounts_channel = await stack.enter_async_context(dialer.connect(settings.accounts_address))
        models_channel = await stack.enter_async_context(dialer.connect(settings.models_address))
        datasets_channel = await stack.enter_async_context(dialer.connect(settings.datasets_address))
        accounts = RpcAccounts(AccountsInternalServiceStub(accounts_channel))
        models = RpcModels(ModelsInternalServiceStub(models_channel))
        datasets = RpcDatasets(
            DatasetsServiceStub(datasets_channel), DatasetsInternalServiceStub(datasets_channel)
        )

        changes = Changes(clock)
        contact = Contact(clock, settings.lease_term_s)
        quotas = Quotas(accounts, clock)
        limits = _limits(settings)
        terms = LeaseTerms(settings.lease_term_s, settings.heartbeat_s)
        classes = settings.classes
        gangs = Gangs(settings.max_workers, starts_engines=limits.can_launch)
        service = JobsService(store, accounts, models, datasets, changes, clock, ids, classes, gangs)
        workers = WorkersService(store, quotas, changes, contact, clock, ids, metrics, terms, classes)
        reports = ReportsService(store, changes, clock, ids)
        estimator = _estimator(settings, store, quotas, clock)
        estimates = EstimatesService(service, estimator)
        directory = EngineDirectory(store, models, changes, contact, clock, limits, classes)

        engines = EngineProbe(store, clock)
        registrations = [
            Registration(
                add_JobsServiceServicer_to_server, JobsServicer(service, estimates), "lathe.v1.JobsService"
            ),
            Registration(
                add_JobsInternalServiceServicer_to_server,
                JobsInternalServicer(directory),
                "lathe.v1.JobsInternalService",
            ),
            Registration(
                add_WorkerServiceServicer_to_server,
                WorkerServicer(workers, reports),
                "lathe.v1.WorkerService",
            ),
            diagnosis("jobs", machine_clock, database_probe(db, PACKAGE, machine_clock), engines.probe),
        ]
        credentials = ServiceCredentials.from_files(
            settings.rpc.service_token_file, settings.rpc.engine_token_file
        )
        server = build_server(registrations, settings.rpc, ServiceAuthenticator(credentials), metrics)
        answering = await stack.enter_async_context(serving(server, "jobs"))

        address = settings.jobs_address or f"{settings.rpc.host}:{answering.port}"
        launcher = _launcher(settings, address, clock)
        if launcher is not None:
            # Engines end before the server does, so that they can still say how far they came.
            stack.push_async_callback(launcher.close)
        engines.launcher = gangs.launcher = launcher
        pace = settings.reconcile_interval_s
        reconciler = Reconciler(
            store, launcher, quotas, changes, contact, clock, ids, metrics, limits, pace, classes
        )
        steps = JobSteps(store, datasets, models, changes, clock, estimator, pace)
        watching = watch_dependencies("jobs", {"database": db.check}, metrics, clock)
        housekeeping = _housekeeping(TokenKeeper(store, datasets), Leftovers(store, models, clock), clock)
        working = in_background(reconciler.run(), steps.run(), watching, *housekeeping)
        await stack.enter_async_context(working)
        yield answering


def _housekeeping(
    tokens: TokenKeeper, leftovers: Leftovers, clock: Clock
) -> Iterator[Coroutine[object, object, None]]:
    keep, sweep = _KEEP_TOKENS_EVERY_S, _SWEEP_EVERY_S
    yield repeat("Keeping tokens", tokens.step, clock=clock, wakeup=Wakeup(), interval=keep, retry=60.0)
    yield repeat("Sweeping files", leftovers.sweep, clock=clock, wakeup=Wakeup(), interval=sweep, retry=60.0)


def _limits(settings: JobsSettings) -> Limits:
    return Limits(
        engine_idle_timeout_s=settings.engine_idle_timeout_s,
        engine_start_timeout_s=settings.engine_start_timeout_s,
        engine_stop_timeout_s=settings.engine_stop_timeout_s,
        engine_silence_s=settings.lease_term_s,
        min_engines=settings.min_engines,
        max_engines_per_base=settings.max_engines_per_base,
        max_engines=settings.max_engines,
        can_launch=settings.launcher.kind != "none",
    )


def _estimator(settings: JobsSettings, store: JobStore, quotas: Quotas, clock: Clock) -> Estimator:
    prices, launcher = settings.prices, settings.launcher
    # On Kubernetes each class has its own, which its engines say when they register.
    local = launcher.engine_env if launcher.kind in ("subprocess", "ray") else None
    return Estimator(
        store,
        quotas,
        clock,
        Prices(prices.currency, prices.engine_hour, prices.hosting_hour),
        settings.classes,
        device=local.get("LATHE_ENGINE_DEVICE", "cpu") if local is not None else "",
        threads=int(local.get("LATHE_ENGINE_THREADS", os.cpu_count() or 1)) if local is not None else 0,
        bfloat16=has_bfloat16() if launcher.kind == "subprocess" else None,
    )


def _launcher(settings: JobsSettings, jobs_address: str, clock: Clock) -> Launcher | None:
    chosen = settings.launcher
    if chosen.kind == "subprocess" and chosen.folder is not None:
        command = (sys.executable, "-m", ENGINE_MODULE)
        return SubprocessLauncher(chosen.folder, command, jobs_address, chosen.engine_env)
    if chosen.kind == "ray" and chosen.ray_address is not None:
        return RayLauncher(
            chosen.ray_address,
            chosen.ray_entrypoint,
            jobs_address,
            chosen.engine_env,
            chosen.ray_num_cpus,
            chosen.ray_num_gpus,
        )
    if chosen.kind == "kubernetes" and chosen.kubernetes is not None:
        return _on_kubernetes(chosen.kubernetes, jobs_address, chosen.engine_env, clock)
    return None


def _on_kubernetes(
    chosen: KubernetesSettings, jobs_address: str, engine_env: Mapping[str, str], clock: Clock
) -> Launcher:
    # The client is an extra that only a cluster needs.
    from lathe.jobs.launchers.kube_api import connect as connect_to_kubernetes
    from lathe.jobs.launchers.kuberay import KubernetesLauncher
    from lathe.jobs.launchers.manifests import Frame

    frame = Frame(
        prefix=chosen.name_prefix or chosen.release,
        release=chosen.release,
        jobs_address=jobs_address,
        ray_version=chosen.ray_version,
        engine_env=engine_env,
        expiry_s=chosen.expiry_s,
        stop_wait_s=chosen.stop_wait_s,
    )
    return KubernetesLauncher(
        connect_to_kubernetes(chosen.namespace, chosen.kubeconfig),
        frame,
        chosen.templates_folder,
        clock,
        owner_deployment=chosen.owner_deployment,
        engines=chosen.engines,
    )


def main() -> int:
    """Run jobs until a signal; the exit code."""
    return run_service(running, JobsSettings)


if __name__ == "__main__":
    sys.exit(main())
