"""Any bytes as a training file give a report: python -m tests.fuzz.training_files [FOLDER …] [libFuzzer's options]

The first byte says how the file is read, the others are the file, or the form that it is sent in. A crash is kept by
libFuzzer as a file, which the same command with its path runs again. The files of tests/fixtures/formats are what it
begins with.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lathe.text", "lathe.gateway.http.multipart", "python_multipart"]):
    from lathe.common.errors import InvalidArgument
    from lathe.gateway.http.multipart import file_bytes, parts, read_head
    from lathe.text.errors import RowError
    from lathe.text.filekinds import FileType
    from lathe.text.findings import KINDS
    from lathe.text.jsonl import Validator
    from lathe.text.readers import read_records
    from lathe.text.rows import parse_row

SEEDS = Path(__file__).parents[1] / "fixtures" / "formats"
_HOW = {b"j": FileType.JSON, b"c": FileType.CSV, b"p": FileType.PARQUET, b"m": FileType.JSONL}
_SCRATCH = Path(tempfile.mkdtemp()) / "file"


def one_file(data: bytes) -> None:
    how, content = data[:1], data[1:]
    if how in _HOW:
        _read(content, _HOW[how])
    elif how == b"f":
        asyncio.run(_receive(content))
    else:
        _validate(content, max(1, how[0] if how else 1))


def _validate(content: bytes, chunk: int) -> None:
    validator = Validator(max_line_bytes=4096)
    for begin in range(0, len(content), chunk):
        validator.feed(content[begin : begin + chunk])
    report = validator.finish()
    assert report.valid or report.findings
    for finding in report.findings:
        assert finding.code in KINDS, finding
        assert 0 <= finding.line <= content.count(b"\n") + 1, finding
        finding.message.encode()


def _read(content: bytes, file_type: FileType) -> None:
    _SCRATCH.write_bytes(content)
    columns = {"prompt": "question", "completion": "answer"} if file_type is FileType.JSONL else {}
    try:
        ended = False
        for record in read_records(_SCRATCH, file_type, columns):
            assert not ended
            assert record.place
            assert (record.row is None) == (record.error is not None)
            assert record.error is None or record.error.code in KINDS, record
            ended = record.last
            if record.row is not None:
                parse_row(dict(record.row))
    except RowError as error:
        assert error.code in KINDS, error


async def _receive(content: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(content), 100):
            yield content[begin : begin + 100]

    form = parts("multipart/form-data; boundary=xyz", pieces())
    try:
        await read_head(form)
        async for piece in file_bytes(form):
            assert piece in content
    except InvalidArgument as error:
        error.message.encode()


def seeds(folder: Path) -> None:
    """The fixtures with their first byte, as a corpus."""
    kinds = {".json": b"j", ".csv": b"c", ".parquet": b"p"}
    for path in SEEDS.iterdir():
        begin = kinds.get(path.suffix, b"\xff")
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            content = b"".join(content.splitlines(keepends=True)[:2])
        (folder / path.name).write_bytes(begin + content)
    (folder / "form").write_bytes(
        b'f--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--xyz\r\nContent-Disposition: form-data; name="columns[prompt]"\r\n\r\nquestion\r\n'
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\r\n--xyz--\r\n'
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        atheris.Setup([*sys.argv, corpus, "-max_len=8192"], one_file)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
