"""`lathe`: every command.

Commands import what they need when they run, so that those a user of a remote platform needs stay light.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lathe import __version__
from lathe.cli import (
    chat,
    compare,
    datasets,
    doctor,
    engine,
    exits,
    export,
    jobs,
    keys,
    lineage,
    login,
    models,
    platform,
    quickstart,
)
from lathe.cli.connection import CHOICE, Connection, Environment, stored_contexts
from lathe.cli.optionwords import option_names
from lathe.cli.output import JSON
from lathe.common.errors import FailedPrecondition, InvalidArgument, LatheError
from lathe.common.fieldwords import renamed

app = typer.Typer(
    name="lathe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=f"The open fine-tuning platform that you run yourself.\n\n{CHOICE}\n\n{exits.MEANING}",
)
_USE = "Use a platform"
_RUN = "Run a platform"
# How protobuf begins what it says of such a number.
_OUT_OF_RANGE = "Value out of range: "
models.app.command()(export.export)
app.add_typer(models.app, name="models", rich_help_panel=_USE)
app.add_typer(datasets.app, name="datasets", rich_help_panel=_USE)
app.add_typer(lineage.app, name="lineage", rich_help_panel=_USE)
app.add_typer(jobs.app, name="jobs", rich_help_panel=_USE)
app.add_typer(keys.app, name="keys", rich_help_panel=_USE)
app.command(rich_help_panel=_USE)(login.login)
app.add_typer(login.app, name="contexts", rich_help_panel=_USE)
app.command(rich_help_panel=_USE)(chat.chat)
app.command(rich_help_panel=_USE)(compare.compare)
app.command(rich_help_panel=_RUN)(quickstart.quickstart)
app.command(rich_help_panel=_RUN)(platform.up)
app.command(rich_help_panel=_RUN)(platform.serve)
app.command(rich_help_panel=_RUN)(platform.migrate)
app.add_typer(engine.app, name="engine", rich_help_panel=_RUN)
app.command(rich_help_panel=_RUN)(doctor.doctor)


@app.callback()
def options(
    context: typer.Context,
    address: Annotated[
        str | None, typer.Option(envvar="LATHE_ADDRESS", help="host:port of a platform's gRPC door.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LATHE_API_KEY", help="sk-lathe-…; the variable is for LATHE_ADDRESS only."),
    ] = None,
    named: Annotated[
        str | None,
        typer.Option(
            "--context", envvar="LATHE_CONTEXT", help="A platform that `lathe login` stored, or local."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", envvar="LATHE_DATA", help="The folder of a local `lathe up`.", show_default=".lathe"
        ),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", envvar="LATHE_TLS", help="The platform speaks TLS.")] = False,
    ca_file: Annotated[
        Path | None, typer.Option(envvar="LATHE_CA_FILE", help="Its authority, if not one the system knows.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one call, its retries included.")] = 30.0,
) -> None:
    """Which platform the commands talk to."""
    values: dict[str, Any] = {
        "address": address,
        "api_key": api_key,
        "context": named,
        "data": data,
        "tls": tls,
        "ca_file": ca_file,
    }
    typed = {key: value for key, value in values.items() if _source(context, key) == "COMMANDLINE"}
    context.obj = Connection(
        **typed, timeout=timeout, environment=Environment.of(os.environ), contexts=stored_contexts
    )


def _source(context: typer.Context, key: str) -> str:
    source = context.get_parameter_source("named" if key == "context" else key)
    return source.name if source is not None else ""


@app.command(rich_help_panel=_USE)
def version(as_json: JSON = False) -> None:
    """The version of this command."""
    print(json.dumps({"version": __version__}) if as_json else __version__)


def main() -> None:
    """The console script. What went wrong is one sentence on stderr and an exit code that says what kind it was."""
    try:
        app()
    except (LatheError, OSError, ValueError) as error:
        known = as_lathe_error(error)
        if known is None:
            raise
        print(known.message, file=sys.stderr)
        sys.exit(exits.exit_code(known))


def as_lathe_error(error: Exception) -> LatheError | None:
    """The error in words for users; None for what is a fault of ours.

    A file that cannot be read or written is one that the command line names. A number from there may be larger than
    the contract's type: protobuf refuses it when the request is made.
    """
    if isinstance(error, LatheError):
        return renamed(error, option_names())
    if isinstance(error, OSError) and error.filename is not None:
        return FailedPrecondition(f"{error.filename} cannot be used: {error.strerror}.")
    if isinstance(error, ValueError) and str(error).startswith(_OUT_OF_RANGE):
        return InvalidArgument(
            f"{str(error).removeprefix(_OUT_OF_RANGE)} is out of range; give another number."
        )
    return None


if __name__ == "__main__":
    main()
