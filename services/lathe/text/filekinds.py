"""What kinds of files training data comes in, and what a file is instead, told by its first bytes."""

from __future__ import annotations

import codecs
from enum import StrEnum
from pathlib import PurePosixPath

from lathe.text.errors import RowError


class FileType(StrEnum):
    """What a training file is uploaded as. JSON: an array of objects."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


_ENDINGS = {
    ".jsonl": FileType.JSONL,
    ".ndjson": FileType.JSONL,
    ".json": FileType.JSON,
    ".csv": FileType.CSV,
    ".tsv": FileType.CSV,
    ".parquet": FileType.PARQUET,
}

SNIFFED_BYTES = 512
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
# What a zip archive's first entry is called where it is a spreadsheet or another document.
_OFFICE_NAME_AT = 30
_OFFICE_NAMES = (
    b"[Content_Types].xml",
    b"_rels/",
    b"docProps/",
    b"xl/",
    b"mimetypeapplication/vnd.oasis.opendocument",
)
_OFFICE = "an Excel workbook or another office document; save its sheet as CSV UTF-8"
_OTHERS = {
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": _OFFICE,
    b"PAR1": "Parquet; let its name end in .parquet, or give file_type parquet",
    b"ARROW1": "an Arrow file; write it as Parquet or as JSONL",
    b"SQLite format 3": "an SQLite database; write its rows as JSONL",
    codecs.BOM_UTF16_LE: "UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; save it as UTF-8",
}


def file_type_of(*names: str) -> FileType:
    """By the ending of the first of a file's names whose ending is known; JSONL if none is."""
    found = (_ENDINGS.get(PurePosixPath(name).suffix.lower()) for name in names)
    return next(filter(None, found), FileType.JSONL)


def foreign(begin: bytes, file_type: FileType = FileType.JSONL) -> RowError | None:
    """What is wrong with a file that begins with these bytes (SNIFFED_BYTES, or all there are); None for what may be
    of that type."""
    if begin.startswith(b"PK\x03\x04") and begin[_OFFICE_NAME_AT:].startswith(_OFFICE_NAMES):
        return RowError("", "wrong_file_type", f"The file is {_OFFICE}")
    for magic, kind in _COMPRESSED.items():
        if begin.startswith(magic):
            return RowError(
                "", "compressed_file", f"The file is {kind}-compressed; unpack it before the upload"
            )
    for magic, kind in _OTHERS.items():
        if begin.startswith(magic) and file_type is not FileType.PARQUET:
            return RowError("", "wrong_file_type", f"The file is {kind}")
    if file_type is FileType.JSONL and begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return RowError(
            "",
            "wrong_file_type",
            "The file is a JSON array, not one object a line; let its name end in .json, or give file_type json",
        )
    return None
