"""`lathe doctor`: what works and what does not, from outside and from inside, and what to do about it."""

import typer

from lathe.cli.connection import client_of
from lathe.cli.output import JSON, print_json


def doctor(context: typer.Context, as_json: JSON = False) -> None:
    """Examine a platform."""
    with client_of(context) as client:
        print_json(client.diagnose())
