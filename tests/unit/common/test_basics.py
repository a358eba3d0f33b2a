from __future__ import annotations

import asyncio
import io
import json
import logging
from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common import log, names
from lathe.common.clock import SystemClock
from lathe.common.errors import InvalidArgument, LatheError, Unavailable
from lathe.common.ids import RandomIds
from lathe.common.pages import coerce_page_size, decode_page_token, encode_page_token
from tests.fakes.clock import FakeClock
from tests.fakes.ids import FakeIds


def test_errors_have_a_default_reason() -> None:
    assert Unavailable("away", retry_after=2).reason == "UNAVAILABLE"
    assert Unavailable("away", reason="DISK_FULL").reason == "DISK_FULL"
    assert str(LatheError("hello")) == "hello"


def test_names_parse_what_they_format() -> None:
    name = names.CHECKPOINT.format("acme", "ftjob-1", "ftckpt_2")
    assert name == "projects/acme/jobs/ftjob-1/checkpoints/ftckpt_2"
    assert names.CHECKPOINT.parse(name) == ("acme", "ftjob-1", "ftckpt_2")
    assert names.project_of(name) == "acme"
    assert names.last_id(name) == "ftckpt_2"
    assert names.BASE_MODEL.matches("baseModels/SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    "name",
    ["", "projects/a", "projects/A/jobs/b", "projects/a/jobs/", "projects/a/jobs/..", "projects/a/jobs/b/c"],
)
def test_a_wrong_name_names_its_field(name: str) -> None:
    with pytest.raises(InvalidArgument, match="parent") as caught:
        names.JOB.parse(name, field="parent")
    assert caught.value.violations[0].field == "parent"


@given(st.lists(st.one_of(st.text(), st.integers()), max_size=4), st.text())
def test_page_tokens_come_back(cursor: list[str | int], filter_: str) -> None:
    token = encode_page_token(cursor, {"filter": filter_})
    assert decode_page_token(token, {"filter": filter_}) == tuple(cursor)
    with pytest.raises(InvalidArgument):
        decode_page_token(token, {"filter": filter_ + "x"})


@given(st.text(min_size=1))
def test_a_strange_page_token_is_an_invalid_argument(token: str) -> None:
    with pytest.raises(InvalidArgument, match="page_token"):
        decode_page_token(token)


def test_page_sizes_are_coerced() -> None:
    assert decode_page_token("") is None
    assert [coerce_page_size(size) for size in (0, 7, 5000)] == [50, 7, 1000]
    with pytest.raises(InvalidArgument):
        coerce_page_size(-1)


def test_ids() -> None:
    assert RandomIds().new("ftjob").startswith("ftjob-")
    assert len(RandomIds().new("ftckpt")) == len("ftckpt_") + 24
    assert RandomIds().new("file") != RandomIds().new("file")
    ids = FakeIds()
    assert [ids.new("key")[-1], ids.new("key")[-1], ids.new("file")[-1]] == ["1", "2", "1"]


async def test_clocks() -> None:
    assert SystemClock().now().tzinfo is UTC
    clock, woken = FakeClock(), []

    async def sleeper() -> None:
        for _ in range(3):
            await clock.sleep(10)
            woken.append(clock.monotonic())

    task = asyncio.create_task(sleeper())
    await clock.advance(25)
    assert woken == [10, 20]
    await clock.advance(5)
    await task
    assert (clock.now() - FakeClock().now()).total_seconds() == 30


SECRETS = [
    "key sk-lathe-AbCd1234 given",
    "authorization: Bearer abc.DEF-123",
    "postgresql+psycopg://me:s3cr3t@host/db",
    "LATHE_STORE__SECRET_KEY=s3cr3t",
    '{"secret_key": "s3cr3t"}',
]


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize("formatter", [log.JsonFormatter(), log.ConsoleFormatter()])
def test_no_secret_is_logged(text: str, formatter: logging.Formatter) -> None:
    record = logging.LogRecord("lathe", logging.INFO, "", 0, "saw %s", (text,), None)
    record.api_key = "s3cr3t"
    line = formatter.format(record)
    assert not any(secret in line for secret in ("AbCd1234", "DEF-123", "s3cr3t"))
    assert "***" in line


def test_json_lines_hold_extra_and_traceback() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        log.configure("INFO", "json", stream)
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("lathe.test").exception("it failed", extra={"job": "ftjob-1"})
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    entry = json.loads(stream.getvalue())
    assert (entry["message"], entry["job"], entry["level"]) == ("it failed", "ftjob-1", "error")
    assert "ValueError: broken" in entry["exception"]
