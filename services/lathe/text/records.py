"""One row of a file that is converted, as its reader gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from lathe.text.decoding import unreadable_value
from lathe.text.errors import RowError

CHUNK_BYTES = 1 << 20
"""So much of a file is read at once."""
_MAX_COLUMNS = 10_000

Read = TypeVar("Read")


class Record(Struct, frozen=True):
    """One row of the file. place: where it stands there ("line 7"). row: None where `error` says why. last: nothing
    behind it can be read."""

    place: str
    row: Mapping[str, Any] | None = None
    error: RowError | None = None
    last: bool = False


def record_of(place: str, make: Callable[[Read], Mapping[str, Any]], read: Read) -> Record:
    """The record of what a reader read there. make: the row of it; where it raises RowError, or RecursionError, the
    record says so."""
    try:
        return Record(place, make(read))
    except RowError as error:
        return Record(place, error=error)
    except RecursionError as error:
        return Record(place, error=RowError("", "invalid_json", unreadable_value(error)))


def check_names(names: Sequence[str], code: str) -> None:
    """Raises RowError with this code for too many columns, and for two of one name."""
    if len(names) > _MAX_COLUMNS:
        raise RowError("", code, f"the file has {len(names)} columns; at most {_MAX_COLUMNS} are read")
    named = Counter(name for name in names if name.strip())
    for name, count in named.most_common(1):
        if count > 1:
            raise RowError("", code, f"the file has more than one column {name[:100]!r}")
