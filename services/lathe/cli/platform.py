"""`lathe up`, `lathe serve` and `lathe migrate`: running a platform, or a part of one."""

import asyncio
import json
import sys
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lathe.common.errors import LatheError

if TYPE_CHECKING:
    from lathe.embedded import Endpoints, UpOptions

DATA = Annotated[
    Path, typer.Option("--data", envvar="LATHE_DATA", help="Where the platform keeps everything.")
]
_NO_TORCH = (
    "torch is not installed here, so no engine can start: files and models can be kept, but nothing can be tuned or "
    "asked. Install lathe[engine]."
)
_MIGRATION_S = 1800.0
CONFIG = Annotated[Path | None, typer.Option("--config", help="A YAML file with settings.")]


class Service(StrEnum):
    """The control services."""

    accounts = "accounts"
    models = "models"
    datasets = "datasets"
    jobs = "jobs"
    gateway = "gateway"


def up(
    data: DATA = Path(".lathe"),
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="The OpenAI API; 0 picks a free port.")] = 8080,
    grpc_port: Annotated[int, typer.Option(help="gRPC; 0 picks a free port.")] = 7460,
    metrics_port: Annotated[int, typer.Option(help="/metrics; 0 picks a free port, -1 shows none.")] = 9090,
    engine_threads: Annotated[
        int | None, typer.Option(help="Threads of an engine; all cores if unset.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON when everything answers.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "WARNING",
) -> None:
    """Run the whole platform on this machine until Ctrl-C."""
    from lathe.common.log import configure
    from lathe.embedded import UpOptions

    configure(log_level)
    if find_spec("torch") is None:
        print(_NO_TORCH, file=sys.stderr, flush=True)
    options = UpOptions(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=None if metrics_port < 0 else metrics_port,
        engine_threads=engine_threads,
    )
    asyncio.run(_up(data, options, as_json))


async def _up(data: Path, options: "UpOptions", as_json: bool) -> None:
    from lathe.common.service import until_signal
    from lathe.datafolder import opened
    from lathe.embedded import running

    with opened(data) as folder:
        async with running(folder, options) as endpoints:
            print(_announcement(endpoints, as_json), flush=True)
            if as_json and not endpoints.key_works:
                print(f"The key in {folder.api_key_file} was revoked.", file=sys.stderr, flush=True)
            await until_signal()


def _announcement(endpoints: "Endpoints", as_json: bool) -> str:
    if as_json:
        return json.dumps({"http": endpoints.http, "grpc": endpoints.grpc, "api_key": endpoints.api_key})
    key = endpoints.api_key if endpoints.key_works else f"{endpoints.api_key} (revoked)"
    return "\n".join(
        (
            f"OpenAI API  {endpoints.http}/v1",
            f"gRPC        {endpoints.grpc}",
            f"metrics     {endpoints.metrics or 'not shown'}",
            f"API key     {key}",
        )
    )


def serve(service: Service, config: CONFIG = None) -> None:
    """Run one service, with its settings from LATHE_… variables or a YAML file."""
    from lathe.common.service import Running, run_service

    running: Running[Any] = import_module(f"lathe.{service.value}.main").running
    raise typer.Exit(run_service(running, _settings_class(service.value), config))


def _settings_class(service: str) -> Any:
    return getattr(import_module(f"lathe.{service}.settings"), f"{service.capitalize()}Settings")


def migrate(
    service: Annotated[
        Service | None, typer.Argument(help="Whose database; every service's if left out.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Change nothing: wait until the schema is as new as this version.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a database that is away.")] = 120.0,
    config: CONFIG = None,
) -> None:
    """Bring a service's database to this version's schema."""
    services = [service] if service is not None else list(Service)
    for one in services:
        asyncio.run(_migrate(one.value, wait, timeout, config))
        print(f"{one.value}: the schema is current", file=sys.stderr)


async def _migrate(service: str, wait: bool, timeout: float, config: Path | None) -> None:
    from lathe.common.clock import SystemClock
    from lathe.common.db import Database, check_schema, migrate

    clock = SystemClock()
    # A change of a large table takes long, and other replicas may be at it.
    url = _settings_class(service).load(config).db.url.get_secret_value()
    db = Database(url, answer_timeout_s=_MIGRATION_S)
    deadline = clock.monotonic() + timeout
    said = ""
    try:
        while True:
            try:
                await (check_schema if wait else migrate)(db, f"lathe.{service}")
                return
            except LatheError as error:
                # An older schema, or a database that is away, may come right; a newer schema never does.
                hopeless = error.reason == "DATABASE_NEWER" or (not wait and error.reason == "DATABASE_OLDER")
                if hopeless or clock.monotonic() >= deadline:
                    raise
                if error.message != said:
                    said = error.message
                    print(f"{service} waits: {said}", file=sys.stderr, flush=True)
                await clock.sleep(1.0)
    finally:
        await db.close()
