"""`lathe`: every command.

Command modules import what they need when they run, so that `lathe jobs list` stays light.
"""

import sys

import typer

from lathe.cli import platform
from lathe.common.errors import LatheError

app = typer.Typer(
    name="lathe", no_args_is_help=True, help="The open fine-tuning platform that you run yourself."
)
app.command()(platform.up)
app.command()(platform.serve)
app.command()(platform.migrate)


def main() -> None:
    """The console script. A LatheError is one sentence on stderr and an exit code that says what kind it was."""
    try:
        app()
    except LatheError as error:
        print(error.message, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
