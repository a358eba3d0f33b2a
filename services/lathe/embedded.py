"""Every control service in one process on one event loop, engines as child processes: `lathe up`.

SQLite and a folder are all it stores in. Services call each other over loopback gRPC here too, so that nothing behaves
differently from a cluster.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

import lathe.accounts.main
import lathe.datasets.main
import lathe.gateway.main
import lathe.jobs.main
import lathe.models.main
from lathe import __version__
from lathe.accounts.settings import AccountsSettings
from lathe.common.db import Database, migrate
from lathe.common.errors import FailedPrecondition, Unauthenticated
from lathe.common.metrics import Metrics
from lathe.common.rpc.channel import call, connect
from lathe.common.rpc.tokens import read_token
from lathe.common.service import metrics_endpoint
from lathe.common.settings import DatabaseSettings, MetricsSettings, RpcSettings, StoreSettings
from lathe.datafolder import DataFolder, write_endpoint
from lathe.datasets.settings import DatasetsSettings
from lathe.gateway.settings import GatewaySettings
from lathe.jobs.settings import JobsSettings, LauncherSettings
from lathe.models.settings import ModelsSettings
from lathe.v1.accounts_pb2 import AuthenticateRequest
from lathe.v1.accounts_pb2_grpc import AccountsInternalServiceStub

SERVICES = ("accounts", "models", "datasets", "jobs", "gateway")


@dataclass(frozen=True, slots=True)
class UpOptions:
    """Where a platform listens. Port 0 picks a free one; metrics_port None shows no metrics."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 7460
    metrics_port: int | None = 9090
    reflection: bool = True
    engine_threads: int | None = None


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a running platform answers."""

    http: str
    grpc: str
    metrics: str | None
    api_key: str
    key_works: bool


@asynccontextmanager
async def running(folder: DataFolder, options: UpOptions) -> AsyncIterator[Endpoints]:
    """The whole platform, answering.

    Raises FailedPrecondition for a port in use or a database of a newer version, InvalidArgument for a wrong setting.
    """
    _check_ports(options)
    for name in SERVICES:
        await _migrate(folder, name)
    metrics = Metrics(__version__)
    settings = MetricsSettings(host=options.host, port=options.metrics_port)
    with metrics_endpoint(metrics, settings) as metrics_port:
        async with AsyncExitStack() as stack:
            addresses: dict[str, Any] = {}
            accounts = AccountsSettings.load(
                **_common(folder, "accounts"), bootstrap_key=SecretStr(read_token(folder.api_key_file))
            )
            models = ModelsSettings.load(**_common(folder, "models"), store=_store(folder))
            for module, its_settings in ((lathe.accounts.main, accounts), (lathe.models.main, models)):
                service = await stack.enter_async_context(module.running(its_settings, metrics))
                addresses[f"{service.name}_address"] = f"127.0.0.1:{service.port}"
            datasets = DatasetsSettings.load(
                **_common(folder, "datasets"),
                store=_store(folder),
                cache_folder=folder.root / "cache",
                models_address=addresses["models_address"],
                # A mapping: the environment adds the rest.
                imports={"enabled": True},
            )
            service = await stack.enter_async_context(lathe.datasets.main.running(datasets, metrics))
            addresses["datasets_address"] = f"127.0.0.1:{service.port}"
            jobs = _jobs_settings(folder, options, addresses)
            service = await stack.enter_async_context(lathe.jobs.main.running(jobs, metrics))
            addresses["jobs_address"] = f"127.0.0.1:{service.port}"
            gateway = await stack.enter_async_context(
                lathe.gateway.main.running(_gateway_settings(folder, options, addresses), metrics)
            )
            endpoints = Endpoints(
                http=f"http://{options.host}:{gateway.http_port}",
                grpc=f"{options.host}:{gateway.port}",
                metrics=f"http://{options.host}:{metrics_port}/metrics" if metrics_port else None,
                api_key=read_token(folder.api_key_file),
                key_works=await _key_works(folder, addresses["accounts_address"]),
            )
            write_endpoint(folder, endpoints.http, endpoints.grpc)
            yield endpoints


def _check_ports(options: UpOptions) -> None:
    """Raise FailedPrecondition naming the option of a port that is taken, before anything is started."""
    wanted = {
        "--http-port": options.http_port,
        "--grpc-port": options.grpc_port,
        "--metrics-port": options.metrics_port,
    }
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    for option, port in wanted.items():
        if not port:
            continue
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Only for what lingers after a close: a listener still excludes another.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, port))
            except OSError as error:
                why = error.strerror or str(error)
                raise FailedPrecondition(
                    f"Port {port} on {options.host} cannot be had ({why}); choose another with {option}, or 0 for a "
                    "free one.",
                    reason="PORT_IN_USE",
                    metadata={"port": str(port)},
                ) from error


async def _key_works(folder: DataFolder, accounts: str) -> bool:
    async with connect(accounts, read_token(folder.service_token_file)) as channel:
        request = AuthenticateRequest(secret=read_token(folder.api_key_file))
        try:
            await call(AccountsInternalServiceStub(channel).Authenticate, request)
        except Unauthenticated:
            return False
    return True


async def _migrate(folder: DataFolder, service: str) -> None:
    db = Database(folder.database_url(service))
    try:
        await migrate(db, f"lathe.{service}")
    finally:
        await db.close()


def _common(folder: DataFolder, service: str, port: int = 0, host: str = "127.0.0.1") -> dict[str, Any]:
    return {
        "rpc": RpcSettings(
            host=host,
            port=port,
            health_port=None,
            service_token_file=folder.service_token_file,
            engine_token_file=folder.engine_token_file,
            grace_s=2.0,
        ),
        "db": DatabaseSettings(url=SecretStr(folder.database_url(service))),
    }


def _store(folder: DataFolder) -> StoreSettings:
    return StoreSettings(kind="folder", folder=folder.root / "store")


def _jobs_settings(folder: DataFolder, options: UpOptions, addresses: dict[str, Any]) -> JobsSettings:
    engine = {
        "LATHE_ENGINE_STORE__KIND": "folder",
        "LATHE_ENGINE_STORE__FOLDER": str(folder.root / "store"),
        "LATHE_ENGINE_CACHE_FOLDER": str(folder.root / "cache" / "engine"),
        "LATHE_ENGINE_RPC__SERVICE_TOKEN_FILE": str(folder.service_token_file),
        "LATHE_ENGINE_RPC__ENGINE_TOKEN_FILE": str(folder.engine_token_file),
        # The control services share the machine's cores with it and must keep answering.
        "LATHE_ENGINE_NICE": "5",
    }
    if options.engine_threads is not None:
        engine["LATHE_ENGINE_THREADS"] = str(options.engine_threads)
    launcher = LauncherSettings(kind="subprocess", folder=folder.root, engine_env=engine)
    return JobsSettings.load(**_common(folder, "jobs"), **addresses, launcher=launcher)


def _gateway_settings(folder: DataFolder, options: UpOptions, addresses: dict[str, Any]) -> GatewaySettings:
    common = _common(folder, "gateway", options.grpc_port, options.host)
    common["rpc"] = common["rpc"].model_copy(update={"reflection": options.reflection})
    return GatewaySettings.load(
        **common,
        **addresses,
        store=_store(folder),
        cache_folder=folder.root / "cache",
        http_host=options.host,
        http_port=options.http_port,
    )
