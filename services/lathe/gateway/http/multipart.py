"""multipart/form-data as it comes in: parts in order, nothing kept but the piece at hand. And files.create's form."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lathe.common.errors import InvalidArgument
from lathe.gateway.http.errors import invalid

MAX_FIELD_BYTES = 64 * 1024
MAX_FIELDS = 32
MIN_LIFE_S = 3600
MAX_LIFE_S = 2_592_000
# Small pieces cost a store one step each.
_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class PartBegin:
    """A part's head. filename is None for a field that is no file."""

    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class PartData:
    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnd:
    """The part is whole."""


@dataclass(frozen=True, slots=True)
class FormEnd:
    """The closing boundary was there: nothing is missing."""


Event = PartBegin | PartData | PartEnd | FormEnd


@dataclass(slots=True)
class _Collector:
    """What the parser calls back, as events."""

    events: list[Event] = field(default_factory=list)
    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""

    def on_part_begin(self) -> None:
        self.disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def on_header_end(self) -> None:
        if bytes(self.header).lower() == b"content-disposition":
            self.disposition = bytes(self.value)
        self.header.clear()
        self.value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self.disposition)
        if b"name" not in options:
            raise _broken("a part has no name")
        filename = options.get(b"filename")
        self.events.append(
            PartBegin(
                options[b"name"].decode(errors="replace"),
                filename.decode(errors="replace") if filename is not None else None,
            )
        )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.events.append(PartData(bytes(data[start:end])))

    def on_part_end(self) -> None:
        self.events.append(PartEnd())

    def on_end(self) -> None:
        self.events.append(FormEnd())


async def parts(content_type: str, source: AsyncIterator[bytes]) -> AsyncGenerator[Event, None]:
    """The form's events; the last one is FormEnd. Raises InvalidArgument for what is no whole form."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidArgument(
            "The request's content-type must be multipart/form-data with a boundary.",
            reason="INVALID_CONTENT_TYPE",
        )
    collector = _Collector()
    ended = False
    try:
        parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": collector.on_part_begin,
                "on_header_field": collector.on_header_field,
                "on_header_value": collector.on_header_value,
                "on_header_end": collector.on_header_end,
                "on_headers_finished": collector.on_headers_finished,
                "on_part_data": collector.on_part_data,
                "on_part_end": collector.on_part_end,
                "on_end": collector.on_end,
            },
        )
        async for chunk in source:
            parser.write(chunk)
            found, collector.events = collector.events, []
            for event in found:
                ended = ended or isinstance(event, FormEnd)
                yield event
    except FormParserError as error:
        raise _broken(str(error).rstrip(".")) from error
    if not ended:
        raise _broken("it ends before its closing boundary")


def _broken(why: str) -> InvalidArgument:
    return InvalidArgument(f"The multipart form cannot be read: {why}.", reason="INVALID_FORM")


@dataclass(frozen=True, slots=True)
class FileForm:
    """What files.create says of a file before its bytes. expires_after_s: seconds, None for never. file_type, columns:
    Lathe's own, see `ConversionBody`."""

    purpose: str
    filename: str
    expires_after_s: int | None
    file_type: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


async def read_head(form: AsyncIterator[Event]) -> FileForm:
    """Everything up to the file's first byte. Raises InvalidArgument, naming the field."""
    fields: dict[str, str] = {}
    async for event in form:
        if isinstance(event, FormEnd):
            break
        if not isinstance(event, PartBegin):
            continue
        if event.name == "file":
            return _file_form(fields, event.filename or "file")
        if len(fields) >= MAX_FIELDS:
            raise _broken(f"it has more than {MAX_FIELDS} fields")
        if not _is_field(event.name):
            raise invalid(event.name, f"Unknown parameter: '{event.name[:100]}'.", "UNKNOWN_PARAMETER")
        if event.name in fields:
            raise invalid(event.name, f"'{event.name}' is given twice.")
        fields[event.name] = await _value(form, event.name)
    raise invalid("file", "Missing required parameter: 'file'.", "MISSING_REQUIRED_PARAMETER")


async def read_to_data(form: AsyncIterator[Event]) -> None:
    """Everything up to the first byte of `data`, the one field of a part's form. Raises InvalidArgument."""
    async for event in form:
        if isinstance(event, PartBegin):
            if event.name == "data":
                return
            raise invalid(event.name, f"Unknown parameter: '{event.name[:100]}'.", "UNKNOWN_PARAMETER")
    raise invalid("data", "Missing required parameter: 'data'.", "MISSING_REQUIRED_PARAMETER")


_FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]", "file_type"})
_COLUMN = re.compile(r"columns\[([^\[\]]{1,64})\]")


def _is_field(name: str) -> bool:
    return name in _FIELDS or _COLUMN.fullmatch(name) is not None


async def _value(form: AsyncIterator[Event], name: str) -> str:
    value = bytearray()
    async for event in form:
        if not isinstance(event, PartData):
            break
        value += event.data
        if len(value) > MAX_FIELD_BYTES:
            raise invalid(name, f"'{name}' is longer than {MAX_FIELD_BYTES} bytes.")
    return value.decode(errors="replace")


def _file_form(fields: dict[str, str], filename: str) -> FileForm:
    if "purpose" not in fields:
        raise invalid(
            "purpose",
            "Missing required parameter: 'purpose'. It must come before 'file' in the form.",
            "MISSING_REQUIRED_PARAMETER",
        )
    columns = {found[1]: value for name, value in fields.items() if (found := _COLUMN.fullmatch(name))}
    return FileForm(fields["purpose"], filename, _life(fields), fields.get("file_type", ""), columns)


def _life(fields: dict[str, str]) -> int | None:
    anchor, text = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and text is None:
        return None
    if anchor != "created_at":
        raise invalid("expires_after.anchor", "expires_after[anchor] must be 'created_at'.")
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise invalid("expires_after.seconds", "expires_after[seconds] must be a whole number of seconds.")
    if not MIN_LIFE_S <= int(text) <= MAX_LIFE_S:
        raise invalid(
            "expires_after.seconds",
            f"expires_after[seconds] is {text}; it must be {MIN_LIFE_S} to {MAX_LIFE_S}.",
        )
    return int(text)


async def file_bytes(form: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    """The file's bytes in pieces of about 1 MiB. Ends only when the whole form was there.

    Raises InvalidArgument for a field after the file that would have mattered before it, and for a second file.
    """
    held: list[bytes] = []
    size = 0
    in_file = True
    async for event in form:
        if isinstance(event, PartData) and in_file:
            held.append(event.data)
            size += len(event.data)
            if size >= _PIECE_BYTES:
                yield b"".join(held)
                held, size = [], 0
        elif isinstance(event, PartEnd):
            in_file = False
        elif isinstance(event, PartBegin):
            _check_trailing(event.name)
    if held:
        yield b"".join(held)


def _check_trailing(name: str) -> None:
    if name in ("file", "data"):
        raise invalid(name, f"A request takes one {name}; send the others by themselves.")
    if _is_field(name):
        raise invalid(
            name.replace("[", ".").rstrip("]"), f"'{name}' comes after 'file'; it must come before it."
        )
