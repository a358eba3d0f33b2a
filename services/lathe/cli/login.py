"""`lathe login` and `lathe contexts`: the platforms that this machine's user talks to."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lathe.cli.connection import Target, client_for, read_local
from lathe.cli.connection import connection as connection_of
from lathe.cli.contexts import LOCAL, PlatformContext, contexts_file, read_contexts, write_contexts
from lathe.cli.output import JSON, enum_word, note, print_facts, print_json, print_table
from lathe.cli.outside import DEFAULT_GRPC_PORT, fetch_info, guessed_http, speaks_tls, split_address
from lathe.common.errors import FailedPrecondition, InvalidArgument, LatheError, Unauthenticated, Unavailable
from lathe.v1 import accounts_pb2

_LOOK_S = 3.0
_LOGIN_S = 10.0

app = typer.Typer(help="The platforms that `lathe login` stored.", invoke_without_command=True)


def login(
    context: typer.Context,
    address: Annotated[
        str, typer.Argument(help="host[:port] of the gRPC door (port 7460), or the URL of the OpenAI door.")
    ],
    api_key: Annotated[
        str | None,
        typer.Option(help="sk-lathe-…, or - to read it from standard input; asked for if left out."),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="The platform speaks TLS.")] = False,
    ca_file: Annotated[Path | None, typer.Option(help="Its authority, if not one the system knows.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call it; the host if left out.")] = None,
    http: Annotated[
        str | None, typer.Option(help="URL of the OpenAI door, if it is not on the host's port 8080.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Store a platform's address and a key for it, and use them from now on. The key is tried first."""
    given = connection_of(context)
    tls, ca_file = tls or given.tls, ca_file or given.ca_file
    place = _place(address, tls or ca_file is not None, ca_file, http)
    inherited = given.environment_of(place.address).api_key
    key = _key(api_key or given.api_key or inherited, place.address)
    target = replace(place, api_key=key)
    caller = _try(target)
    stored = name or split_address(target.address)[0]
    path = contexts_file()
    entry = PlatformContext(
        target.address, key, target.tls, str(target.ca_file) if target.ca_file else "", target.http
    )
    write_contexts(path, read_contexts(path).with_context(stored, entry))
    role = enum_word(accounts_pb2.Role.DESCRIPTOR, caller.role)
    if as_json:
        print_json({"context": stored, "address": target.address, "project": caller.project, "role": role})
        return
    note(
        f"The key works: {role} of {caller.project}. The context {stored!r} is stored in {path} and is the current one."
    )


def _place(address: str, tls: bool, ca_file: Path | None, http: str | None) -> Target:
    """Where to log in, without the key. Raises InvalidArgument and Unavailable."""
    absolute = ca_file.resolve() if ca_file is not None else None
    if "://" not in address:
        host, port = split_address(address)
        place = f"{host}:{port or DEFAULT_GRPC_PORT}"
        door = http or guessed_http(place, tls)
        if http is None and fetch_info(door, absolute, _LOOK_S).version == "":
            door = ""
        return Target(place, "", "", tls, absolute, door.rstrip("/"))
    info = fetch_info(address, absolute, _LOGIN_S)
    if not info.version or not info.grpc_port:
        raise Unavailable(
            f"{address} does not answer as a Lathe platform: {info.problem or 'it is something else'}."
        )
    secure = tls or address.startswith("https://")
    return Target(f"{info.host}:{info.grpc_port}", "", "", secure, absolute, address.rstrip("/"))


def _key(given: str | None, address: str) -> str:
    if given == "-" or (given is None and not sys.stdin.isatty()):
        key = sys.stdin.readline().strip()
    else:
        key = (given or typer.prompt(f"API key for {address}", hide_input=True, err=True)).strip()
    if not key:
        raise InvalidArgument("No key was given: give --api-key, or pipe it into --api-key -.")
    return key


def _try(target: Target) -> accounts_pb2.Caller:
    """Who the key is. Raises LatheErrors that say what to do."""
    try:
        with client_for(target, _LOGIN_S) as client:
            return client.caller()
    except Unauthenticated as error:
        raise Unauthenticated(f"{target.address} refuses the key: {error.message}") from error
    except LatheError as error:
        raise Unavailable(
            f"{target.address} cannot be reached: {error.message}{_tls_hint(target)}"
        ) from error


def _tls_hint(target: Target) -> str:
    spoken = speaks_tls(target.address, _LOOK_S)
    if spoken and not target.tls:
        return " It speaks TLS: add --tls."
    if spoken is False and target.tls:
        return " It does not speak TLS there: leave out --tls and --ca-file."
    return ""


@app.callback()
def contexts(context: typer.Context, as_json: JSON = False) -> None:
    """The platforms that `lathe login` stored; alone: list them."""
    if context.invoked_subcommand is None:
        list_(context, as_json)


@app.command(name="list")
def list_(context: typer.Context, as_json: JSON = False) -> None:
    """Every stored platform, and which is the current one."""
    found = read_contexts(contexts_file())
    local = read_local(connection_of(context).data_folder)
    rows = [(LOCAL, local.address if local else "not running", False), *_rows(found.known)]
    current = found.current or LOCAL
    if as_json:
        print_json(
            [
                {"name": name, "address": address, "tls": tls, "current": name == current}
                for name, address, tls in rows
            ]
        )
        return
    print_table(
        ("", "name", "address", ""),
        (
            ("*" if name == current else "", name, address, "TLS" if tls else "")
            for name, address, tls in rows
        ),
        "",
    )


def _rows(known: Mapping[str, PlatformContext]) -> list[tuple[str, str, bool]]:
    return [(name, entry.address, entry.tls) for name, entry in sorted(known.items())]


NAME = Annotated[str, typer.Argument(help="A context's name, or local.")]


@app.command()
def use(name: NAME, as_json: JSON = False) -> None:
    """Talk to this platform from now on; `local` is the `lathe up` on this machine."""
    path = contexts_file()
    write_contexts(path, read_contexts(path).using(name))
    if as_json:
        print_json({"current": name})
    else:
        note(f"Commands talk to {name} from now on.")


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="A context's name; the current one if left out.")] = None,
    as_json: JSON = False,
) -> None:
    """One stored platform. Of its key only the end is shown."""
    found = read_contexts(contexts_file())
    wanted = name or found.current
    if not wanted or wanted == LOCAL:
        raise FailedPrecondition(
            "The current context is the local platform, which is not stored. Name another."
        )
    entry = found.get(wanted)
    facts = {
        "name": wanted,
        "address": entry.address,
        "http": entry.http,
        "tls": entry.tls,
        "ca_file": entry.ca_file,
        "api_key": f"…{entry.api_key[-4:]}",
    }
    if as_json:
        print_json(facts)
    else:
        print_facts((key, str(value) if value else "") for key, value in facts.items())


@app.command()
def delete(name: NAME, as_json: JSON = False) -> None:
    """Forget a platform and its key. The key itself goes on working: see `lathe keys revoke`."""
    path = contexts_file()
    write_contexts(path, read_contexts(path).without(name))
    if as_json:
        print_json({"deleted": name})
    else:
        note(f"{name} is forgotten.")
