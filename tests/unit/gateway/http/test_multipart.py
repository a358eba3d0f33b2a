from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import InvalidArgument
from lathe.gateway.http.multipart import FileForm, file_bytes, parts, read_head

KIND = 'multipart/form-data; boundary="xyz"'


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file = f'; filename="{filename}"' if filename is not None else ""
    head = f'--xyz\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + content + b"\r\n"


PURPOSE = part("purpose", b"fine-tune")
END = b"--xyz--\r\n"


async def stream(body: bytes, size: int = 7) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def read(body: bytes, size: int = 7, kind: str = KIND) -> tuple[FileForm, bytes]:
    form = parts(kind, stream(body, size))
    head = await read_head(form)
    return head, b"".join([piece async for piece in file_bytes(form)])


async def refused(body: bytes, kind: str = KIND) -> str:
    with pytest.raises(InvalidArgument) as caught:
        await read(body, kind=kind)
    return caught.value.violations[0].field if caught.value.violations else caught.value.reason


@given(content=st.binary(max_size=300), size=st.integers(1, 400))
async def test_any_bytes_in_any_pieces(content: bytes, size: int) -> None:
    # What cannot be in a body is the boundary itself.
    content = content.replace(b"--xyz", b"")
    head, got = await read(PURPOSE + part("file", content, "a.jsonl") + END, size)
    assert head == FileForm("fine-tune", "a.jsonl", None) and got == content


WHOLE = PURPOSE + part("columns[prompt]", b"q") + part("file", b"{}\n" * 3, "a.jsonl") + END


@given(
    cuts=st.lists(
        st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 9), st.binary(max_size=4)), max_size=4
    ),
    size=st.integers(1, 90),
)
async def test_a_damaged_form_is_refused_or_read(cuts: list[tuple[int, int, bytes]], size: int) -> None:
    body = bytearray(WHOLE)
    for begin, length, put in cuts:
        body[begin : begin + length] = put
    try:
        _, content = await read(bytes(body), size)
    except InvalidArgument as error:
        assert error.message
    else:
        assert content in body


async def test_pieces_are_large_and_bounded() -> None:
    content = bytes(5_000_000)
    form = parts(KIND, stream(PURPOSE + part("file", content, "a") + END, 65_536))
    await read_head(form)
    sizes = [len(piece) async for piece in file_bytes(form)]
    assert sum(sizes) == len(content) and max(sizes) < 1_200_000 and len(sizes) < 6


async def test_expiry_and_file_names() -> None:
    life = part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"3600")
    head, _ = await read(PURPOSE + life + part("file", b"x", "größe.jsonl") + END)
    assert head == FileForm("fine-tune", "größe.jsonl", 3600)
    head, _ = await read(PURPOSE + part("file", b"x") + END)
    assert head.filename == "file"


async def test_how_the_file_is_read() -> None:
    own = (
        part("file_type", b"csv")
        + part("columns[prompt]", b"question")
        + part("columns[completion]", b"a[1]")
    )
    head, _ = await read(own + PURPOSE + part("file", b"x", "a") + END)
    assert (head.file_type, head.columns) == ("csv", {"prompt": "question", "completion": "a[1]"})
    for wrong in ("columns", "columns[]", "columns[a][b]", "columns[" + "a" * 65 + "]"):
        assert await refused(PURPOSE + part(wrong, b"x") + part("file", b"x") + END) == wrong
    assert await refused(PURPOSE + part("file", b"x") + part("columns[a]", b"x") + END) == "columns.a"


async def test_what_comes_after_the_file() -> None:
    file = part("file", b"x", "a")
    assert (await read(PURPOSE + file + part("note", b"harmless") + END))[1] == b"x"
    assert await refused(PURPOSE + file + PURPOSE + END) == "purpose"
    assert (
        await refused(PURPOSE + file + part("expires_after[seconds]", b"1") + END) == "expires_after.seconds"
    )
    assert await refused(PURPOSE + file + file + END) == "file"


async def test_refusals() -> None:
    file = part("file", b"x", "a")
    assert await refused(file + END) == "purpose"
    assert await refused(PURPOSE + END) == "file"
    assert await refused(PURPOSE + part("porpuse", b"x") + file + END) == "porpuse"
    assert await refused(PURPOSE + PURPOSE + file + END) == "purpose"
    for seconds in (b"3599", b"2592001", b"soon", b""):
        life = part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", seconds)
        assert await refused(PURPOSE + life + file + END) == "expires_after.seconds"
    assert await refused(PURPOSE + part("expires_after[anchor]", b"x") + file + END) == "expires_after.anchor"
    assert await refused(part("purpose", b"x" * 70_000) + file + END) == "purpose"


async def test_what_is_no_whole_form() -> None:
    whole = PURPOSE + part("file", b"x" * 50, "a") + END
    assert await refused(whole, "application/json") == "INVALID_CONTENT_TYPE"
    assert await refused(whole, "multipart/form-data") == "INVALID_CONTENT_TYPE"
    for cut in (len(PURPOSE) // 2, len(whole) - 30, len(whole) - len(END) - 2):
        assert await refused(whole[:cut]) in ("INVALID_FORM", "file")
    assert await refused(b"nonsense") == "INVALID_FORM"
