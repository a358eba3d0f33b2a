"""`lathe keys`: the API keys of a project."""

from enum import StrEnum
from typing import Annotated

import typer

from lathe.cli.connection import client_of
from lathe.cli.output import JSON, note, plain, print_json, print_messages, print_table, state_word, when
from lathe.client.names import last_id

app = typer.Typer(no_args_is_help=True, help="API keys of your project.")


class KeyRole(StrEnum):
    """What a key may do."""

    viewer = "viewer"
    member = "member"
    admin = "admin"


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    role: Annotated[
        KeyRole, typer.Option(help="viewer reads; member also tunes; admin also manages.")
    ] = KeyRole.member,
    as_json: JSON = False,
) -> None:
    """Make a key. Its secret is shown now and never again."""
    with client_of(context) as client:
        key, secret = client.keys.create(name, role.value)
    if as_json:
        print_json({**plain(key), "secret": secret})
        return
    note(f"{last_id(key.name)} ({role.value}); this is shown only once:")
    print(secret)


@app.command(name="list")
def list_(context: typer.Context, as_json: JSON = False) -> None:
    """Every key, revoked ones too."""
    with client_of(context) as client:
        keys = list(client.keys.list())
    if as_json:
        print_messages(keys)
        return
    rows = (
        (
            last_id(key.name),
            key.display_name,
            state_word(key, "role"),
            f"…{key.hint}",
            when(key.create_time),
            f"revoked {when(key.revoke_time)}" if key.HasField("revoke_time") else "",
        )
        for key in keys
    )
    print_table(("id", "name", "role", "key", "created", ""), rows, "There are no keys.")


@app.command()
def revoke(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="key_…")],
    as_json: JSON = False,
) -> None:
    """Revoke a key for ever."""
    with client_of(context) as client:
        revoked = client.keys.revoke(key)
    if as_json:
        print_json(revoked)
    else:
        note(f"{key} is revoked; it stops working within seconds.")
