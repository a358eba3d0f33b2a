"""The rows of a file that is not JSONL: CSV, Parquet, a JSON array; or JSONL under other names.

Memory is bounded by the longest row that may be (MAX_LINE_BYTES), but for what Parquet's reader takes to unpack a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lathe.text.columns import Columns
from lathe.text.csv_reader import read_csv
from lathe.text.filekinds import SNIFFED_BYTES, FileType, foreign
from lathe.text.json_reader import read_json, read_jsonl
from lathe.text.parquet_reader import read_parquet
from lathe.text.records import Record


def read_records(path: Path, file_type: FileType, columns: Mapping[str, str]) -> Iterator[Record]:
    """The file's rows in order. Raises RowError where none can be read, or none any further."""
    names = Columns(columns)
    with path.open("rb") as file:
        problem = foreign(file.read(SNIFFED_BYTES), file_type)
    if problem is not None:
        raise problem
    match file_type:
        case FileType.CSV:
            return read_csv(path, names)
        case FileType.PARQUET:
            return read_parquet(path, names)
        case FileType.JSON:
            return read_json(path, names)
        case FileType.JSONL:
            return read_jsonl(path, names)
