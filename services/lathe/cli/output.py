"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON values: field names as in the contract, enums in lower case without their prefix, times in
    RFC 3339, absent messages and optional fields as null."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            return {str(key): _value(entry.fields_by_name["value"], item) for key, item in value.items()}
        return [_value(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def enum_word(enum: Any, number: int) -> str:
    """`JOB_STATE_RUNNING` of JobState as `running`."""
    names = [value.name for value in enum.values]
    prefix = names[0].removesuffix("UNSPECIFIED")
    name = enum.values_by_number[number].name if number in enum.values_by_number else str(number)
    return str(name).removeprefix(prefix).lower()


def state_word(message: Message, field: str = "state") -> str:
    """The enum field of a message as people read it."""
    return enum_word(message.DESCRIPTOR.fields_by_name[field].enum_type, getattr(message, field)).replace(
        "_", " "
    )


def print_json(value: Any) -> None:
    """One document on one line, at once."""
    print(json.dumps(plain(value) if isinstance(value, Message) else value, ensure_ascii=False), flush=True)


def print_messages(messages: Iterable[Message]) -> None:
    """A list as one JSON document."""
    print_json([plain(message) for message in messages])


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> None:
    """Rows under headings; `empty` says that there are none. Ids are never cut: they are there to be copied."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    if not table.row_count:
        note(empty)
        return
    _print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values of one thing; empty values are left out."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(name, value)
    _print(table)


def _print(table: Table) -> None:
    """A table; where it is piped on, without the spaces that make its lines equally long."""
    out = console()
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as drawn:
        out.print(table)
    for line in drawn.get().splitlines():
        print(line.rstrip())


def console() -> Console:
    """Standard output. What is piped on is not folded at some width."""
    from rich.console import Console

    out = Console()
    return out if out.is_terminal else Console(width=1000)


def note(text: str) -> None:
    """For people, on standard error, so that standard output stays what was asked for."""
    print(text, file=sys.stderr, flush=True)


def when(time: Timestamp) -> str:
    """`2026-01-31 17:05` in local time; empty when unset."""
    if not time.seconds:
        return ""
    return datetime.fromtimestamp(time.seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def size(count: int) -> str:
    """`12.3 MB`"""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""
