"""The gateway as a process: the wiring, in order."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import grpc

from lathe import __version__
from lathe.common.background import Wakeup, in_background, repeat
from lathe.common.clock import Clock, SystemClock
from lathe.common.db import Database, check_schema
from lathe.common.dependencies import watch_dependencies
from lathe.common.ids import IdFactory, RandomIds
from lathe.common.metrics import Metrics
from lathe.common.objectstore.base import ObjectStore
from lathe.common.objectstore.factory import open_store
from lathe.common.probes import database_probe, store_probe
from lathe.common.rpc.dialer import Dialer
from lathe.common.rpc.server import Registration, RpcServer, build_server
from lathe.common.service import RunningService, run_service
from lathe.gateway.auth import Authenticator, MetadataAuthenticator
from lathe.gateway.diagnosis import PlatformDoctor
from lathe.gateway.doctor import PlatformServicer, peers_of
from lathe.gateway.engine_client import EngineClients
from lathe.gateway.engines import EngineDirectory
from lathe.gateway.forward import Forwarder, methods_of
from lathe.gateway.gateway import Gateway
from lathe.gateway.http.app import create_app
from lathe.gateway.inference import Inference
from lathe.gateway.model_downloads import ModelDownloads
from lathe.gateway.model_uploads import ModelUploads
from lathe.gateway.peers import AccountsKeys, JobsEngines, PeerChannels, PeerDatasets, PeerModels, Peers
from lathe.gateway.ports import IdempotencyStore
from lathe.gateway.resolve import ModelDirectory
from lathe.gateway.service import DeploymentService
from lathe.gateway.servicer import DatasetStreams, DeploymentsServicer, InferenceServicer, ModelStreams
from lathe.gateway.settings import GatewaySettings
from lathe.gateway.store import SqlDeploymentStore, SqlIdempotencyStore
from lathe.gateway.tokenizers import TokenizerCache
from lathe.gateway.uploads import DatasetUploads
from lathe.gateway.webserver import HttpOptions, HttpServer
from lathe.v1 import accounts_pb2, datasets_pb2, jobs_pb2, models_pb2
from lathe.v1.deployments_pb2_grpc import add_DeploymentsServiceServicer_to_server
from lathe.v1.diagnosis_pb2_grpc import add_PlatformServiceServicer_to_server
from lathe.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server

PACKAGE = "lathe.gateway"
_SWEEP_EVERY_S = 600.0
_KEEP_IDEMPOTENCY_S = 3600.0


@asynccontextmanager
async def running(
    settings: GatewaySettings, metrics: Metrics, *, clock: Clock | None = None, ids: IdFactory | None = None
) -> AsyncIterator[RunningService]:
    """The gateway, answering on both doors. Raises FailedPrecondition for a port in use or a database that is
    not this version's."""
    clock, ids = clock or SystemClock(), ids or RandomIds()
    async with AsyncExitStack() as stack:
        db = Database(settings.db.url.get_secret_value(), settings.db.pool_size)
        stack.push_async_callback(db.close)
        await check_schema(db, PACKAGE)
        dialer = Dialer.of_service(settings.rpc)
        channels = _channels(settings, dialer)
        stack.push_async_callback(channels.close)
        connector = EngineClients(dialer)
        stack.push_async_callback(connector.close)

        objects = open_store(settings.store)
        gateway = _gateway(
            settings,
            metrics,
            clock=clock,
            ids=ids,
            db=db,
            store=objects,
            peers=Peers(channels),
            connector=connector,
        )
        sweep = repeat(
            "The sweep of old creates",
            _Sweep(gateway.idempotency).step,
            clock=clock,
            wakeup=Wakeup(),
            interval=_SWEEP_EVERY_S,
        )
        checks = {"database": db.check, "store": objects.check}
        watching = watch_dependencies("gateway", checks, metrics, clock)
        await stack.enter_async_context(in_background(gateway.engines.run(), sweep, watching))
        probes = [database_probe(db, PACKAGE, clock), store_probe(objects, settings.store, ids)]
        doctor = PlatformDoctor(
            peers=peers_of(channels.by_name(), settings.addresses()),
            own=probes,
            engines=lambda: gateway.engines.engines,
            reach=connector.reach,
            clock=clock,
            version=__version__,
        )
        server = _server(gateway, channels, PlatformServicer(doctor, clock, settings.http_port))
        await server.start()
        app = create_app(replace(gateway, grpc_port=server.port, draining=lambda: server.draining))
        web = HttpServer(app, _http_options(settings))
        stack.push_async_callback(_stop, server, web)
        http_port = await web.start()
        yield RunningService("gateway", server.port, server.health_port, http_port)


async def _stop(server: RpcServer, web: HttpServer) -> None:
    """Both doors stay open until nobody is sent here any more; then what runs behind both gets the same grace."""
    await server.drain()
    await asyncio.gather(server.stop(), web.stop())


def _http_options(settings: GatewaySettings) -> HttpOptions:
    return HttpOptions(
        settings.http_host,
        settings.http_port,
        settings.rpc.grace_s,
        settings.http_tls_cert_file,
        settings.http_tls_key_file,
    )


def _channels(settings: GatewaySettings, dialer: Dialer) -> PeerChannels:
    return PeerChannels(
        accounts=dialer.connect(settings.accounts_address),
        datasets=dialer.connect(settings.datasets_address),
        models=dialer.connect(settings.models_address),
        jobs=dialer.connect(settings.jobs_address),
    )


def _gateway(
    settings: GatewaySettings,
    metrics: Metrics,
    *,
    clock: Clock,
    ids: IdFactory,
    db: Database,
    store: ObjectStore,
    peers: Peers,
    connector: EngineClients,
) -> Gateway:
    models = PeerModels(peers)
    deployments = SqlDeploymentStore(db)
    engines = EngineDirectory(JobsEngines(peers), connector, clock)
    return Gateway(
        settings=settings,
        clock=clock,
        ids=ids,
        metrics=metrics,
        authenticator=Authenticator(AccountsKeys(peers), clock, settings.auth_cache_s),
        peers=peers,
        datasets=DatasetUploads(PeerDatasets(peers), store, clock, metrics),
        models=ModelUploads(models, store, ids, metrics),
        model_downloads=ModelDownloads(models, store),
        inference=Inference(
            ModelDirectory(models, deployments, clock, settings.model_cache_s),
            TokenizerCache(store, settings.cache_folder),
            engines,
            clock=clock,
            ids=ids,
            metrics=metrics,
            version=__version__,
            engine_start_timeout_s=settings.engine_start_timeout_s,
        ),
        deployments=DeploymentService(deployments, models, clock),
        idempotency=SqlIdempotencyStore(db, clock, ids),
        engines=engines,
        grpc_port=0,
        version=__version__,
    )


def _server(gateway: Gateway, channels: PeerChannels, platform: PlatformServicer) -> RpcServer:
    registrations = [
        Registration(
            add_InferenceServiceServicer_to_server,
            InferenceServicer(gateway.inference),
            "lathe.v1.InferenceService",
        ),
        Registration(
            add_DeploymentsServiceServicer_to_server,
            DeploymentsServicer(gateway.deployments),
            "lathe.v1.DeploymentsService",
        ),
        Registration(add_PlatformServiceServicer_to_server, platform, "lathe.v1.PlatformService"),
    ]
    methods = [
        *methods_of(accounts_pb2.DESCRIPTOR, "AccountsService"),
        *methods_of(datasets_pb2.DESCRIPTOR, "DatasetsService"),
        *methods_of(models_pb2.DESCRIPTOR, "ModelsService"),
        *methods_of(jobs_pb2.DESCRIPTOR, "JobsService"),
    ]
    local = (
        DatasetStreams(gateway.datasets).handlers()
        | ModelStreams(gateway.models, gateway.model_downloads).handlers()
    )
    forwarder = Forwarder(
        channels.by_service(), methods, local, default_timeout_s=gateway.settings.forward_timeout_s
    )
    # Registered like services, so that health and reflection name them; one handler serves them all.
    registrations += [Registration(_add_forwarder, forwarder, service) for service in channels.by_service()]
    keys = MetadataAuthenticator(gateway.authenticator)
    return build_server(registrations, gateway.settings.rpc, keys, gateway.metrics)


def _add_forwarder(forwarder: Forwarder, server: grpc.aio.Server) -> None:
    server.add_generic_rpc_handlers((forwarder,))


@dataclass(frozen=True, slots=True)
class _Sweep:
    """Forgets creates of the HTTP door that no retry can join any more."""

    idempotency: IdempotencyStore

    async def step(self) -> None:
        await self.idempotency.sweep(_KEEP_IDEMPOTENCY_S)


def main() -> int:
    """Run the gateway until a signal; the exit code."""
    return run_service(running, GatewaySettings)


if __name__ == "__main__":
    sys.exit(main())
