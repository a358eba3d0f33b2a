"""`lathe engine`: what is asked of the engine in the same container or on the same machine."""

import asyncio
import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The engine that runs in this container or on this machine.")


@app.callback()
def engine() -> None:
    """The engine that runs here, found by the variables that it was started with (LATHE_ENGINE_…, LATHE_…)."""


@app.command()
def drain(
    grace: Annotated[
        float | None,
        typer.Option(
            min=0, help="Seconds for checkpoints and open streams; the engine's own setting if unset."
        ),
    ] = None,
) -> None:
    """Have the engine checkpoint, give its work back, finish its streams and end; return when it has ended.

    Meant for a container's preStop. When no engine runs here, there is nothing to do, and that is no error.
    """
    from lathe.common.clock import SystemClock
    from lathe.common.errors import InvalidArgument
    from lathe.engine.draining import drain as drain_engine
    from lathe.engine.settings import EngineDoor

    door = EngineDoor.load()
    rpc = door.rpc
    if rpc.port == 0:
        raise InvalidArgument(
            "The engine chose its own port: set LATHE_ENGINE_RPC__PORT to the one that it has."
        )
    found = asyncio.run(drain_engine(rpc, door.drain_grace_s if grace is None else grace, SystemClock()))
    print("The engine is drained." if found else f"No engine answers on port {rpc.port}.", file=sys.stderr)
