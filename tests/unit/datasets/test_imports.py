"""Files of other types, and under other names: converted when they are validated, stored as JSONL."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.datasets import conversion
from lathe.datasets.conversion import convert
from lathe.datasets.model import DatasetState, ImportOptions, blob_key
from lathe.datasets.validation import Validation
from lathe.text.filekinds import FileType
from lathe.text.formats import Layout, RowFormat
from tests.fixtures.worlds import Died, DyingRows, DyingStore
from tests.unit.datasets.conftest import GOOD, sha

FOLDER = Path(__file__).parents[2] / "fixtures" / "formats"
CSV = (FOLDER / "questions.csv").read_bytes()
AUTOTRAIN = {"prompt_text_column": "prompt", "text_column": "good", "rejected_text_column": "bad"}


@pytest.mark.parametrize(
    ("name", "columns", "found", "layout"),
    [
        ("questions.csv", {}, RowFormat.CHAT, Layout.QUESTION_ANSWER),
        ("questions.csv", {"prompt": "Question", "completion": "Answer"}, RowFormat.COMPLETION, Layout.TRL),
        ("autotrain_preference.csv", AUTOTRAIN, RowFormat.PREFERENCE, Layout.TRL),
        ("alpaca.csv", {}, RowFormat.CHAT, Layout.ALPACA),
        ("alpaca.json", {}, RowFormat.CHAT, Layout.ALPACA),
        ("chat.parquet", {}, RowFormat.CHAT, Layout.OPENAI),
        ("ultrachat.parquet", {}, RowFormat.CHAT, Layout.OPENAI),
        ("ultrachat.parquet", {"text_column": "messages"}, RowFormat.CHAT, Layout.OPENAI),
        ("question_answer.jsonl", {"prompt": "question", "completion": "answer"}, RowFormat.COMPLETION, Layout.TRL),
    ],
)  # fmt: skip
async def test_a_file_is_stored_as_jsonl(world, name, columns, found, layout):
    content = (FOLDER / name).read_bytes()
    file_type = FileType(name.rpartition(".")[2])
    dataset = await world.ready(content, name=name, options=ImportOptions(file_type, columns))
    assert dataset.state is DatasetState.READY, dataset.report
    assert (dataset.report.format, dataset.report.layout) == (found, layout)
    stored = await world.content(dataset)
    assert (dataset.sha256, dataset.size_bytes) == (sha(stored), len(stored))
    assert (dataset.source_sha256, dataset.source_size_bytes) == (sha(content), len(content))
    rows = [json.loads(line) for line in stored.splitlines()]
    assert len(rows) == dataset.report.example_count >= 10
    assert not columns or all(
        set(each) <= {"prompt", "completion", "chosen", "rejected", "messages"} for each in rows
    )
    assert world.objects.keys() == [blob_key(dataset.sha256)]


async def test_what_a_file_is_goes_by_its_name_and_by_its_purpose(world, service):
    assert (await world.ready(CSV, name="Q.CSV")).report.format is RowFormat.CHAT
    kept = await world.ready(CSV, name="q.csv", purpose="user_data")
    assert (kept.import_options, kept.sha256) == (None, sha(CSV))
    lines = await world.ready(GOOD, name="really-lines.json")
    assert lines.state is DatasetState.READY
    assert (await world.content(lines)).count(b"\n") == 12
    unknown = await world.ready(CSV, name="table.txt")
    assert (unknown.state, unknown.import_options) == (DatasetState.ERROR, None)


async def test_a_commit_is_repeated_with_what_was_uploaded(world, service):
    dataset = await world.ready(CSV, name="q.csv")
    staging = "staging/any"
    assert await service.commit_upload("acme", dataset.id, staging, len(CSV), sha(CSV)) == dataset
    with pytest.raises(FailedPrecondition):
        await service.commit_upload("acme", dataset.id, staging, dataset.size_bytes, dataset.sha256)


async def test_bad_rows_are_named_by_their_number_and_their_place(world, service):
    lines = ["prompt,completion", *(f'"a\n{n}",b' for n in range(10)), "c,", "d"]
    content = "\n".join(lines).encode()
    dataset = await world.ready(content, name="x.csv")
    assert (dataset.state, dataset.sha256, dataset.report.example_count) == (DatasetState.ERROR, "", 12)
    assert [(item.line, item.field, item.code) for item in dataset.report.findings] == [
        (11, "completion", "missing_content"),
        (12, "", "invalid_csv"),
    ]
    assert dataset.report.findings[0].message.endswith("(line 22 of the file)")
    assert world.objects.keys() == []
    assert (await service.commit_upload("acme", dataset.id, "x", len(content), sha(content))).id == dataset.id


@pytest.mark.parametrize(
    ("content", "name", "code", "place"),
    [
        (b"prompt,completion\na,b\n\nc,\xff\nd,e\n", "x.csv", "invalid_utf8", "line 4"),
        (b'prompt,completion\na,b\n"c,d\ne,f\n', "x.csv", "invalid_csv", "line 3"),
        (b'[{"text": "a"},\n\n{"text": NaN},\n{"text": "b"}]', "x.json", "invalid_json", "line 3"),
    ],
)
async def test_what_cannot_be_read_further_is_named_and_the_rest_not_judged(
    world, content, name, code, place
):
    """Least of all for having too few rows."""
    dataset = await world.ready(content, name=name)
    [finding] = dataset.report.findings
    assert (dataset.state, finding.line, finding.code) == (DatasetState.ERROR, 2, code)
    assert finding.message.endswith(f"({place} of the file)")
    assert dataset.report.example_count == 2


@pytest.mark.parametrize(
    ("content", "name", "code"),
    [
        (b"", "a.csv", "invalid_n_examples"),
        (b"\x1f\x8b\x08", "a.csv", "compressed_file"),
        (CSV, "a.parquet", "invalid_parquet"),
        (b"[1]", "a.json", "data_type"),
        (b"[{", "a.json", "invalid_json"),
        (b"\x1f\x8b\x08" * 300, "a.jsonl", "compressed_file"),
        (b"PK\x03\x04", "a.jsonl", "compressed_file"),
        ((FOLDER / "chat.parquet").read_bytes(), "a.jsonl", "wrong_file_type"),
        ((FOLDER / "alpaca.json").read_bytes(), "a.jsonl", "wrong_file_type"),
        ("﻿".encode("utf-16") + b"x", "a.jsonl", "wrong_file_type"),
    ],
)
async def test_a_file_that_is_something_else_gets_one_clear_word(world, content, name, code):
    dataset = await world.ready(content, name=name)
    assert dataset.state is DatasetState.ERROR
    assert code in {finding.code for finding in dataset.report.findings}
    assert len(dataset.report.findings) <= 2
    assert (await world.ready()).state is DatasetState.READY


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
async def test_bytes_that_are_not_those_announced_are_not_converted(world, service, name):
    dataset = await service.create("acme", name, "fine-tune", None, "")
    await world.objects.put(dataset.staging_key, CSV[:-5])
    await service.commit_upload("acme", dataset.id, dataset.staging_key, len(CSV), sha(CSV))
    await world.validate()
    dataset = await service.get("acme", dataset.id)
    assert (dataset.state, dataset.report.findings[0].code) == (DatasetState.ERROR, "digest_mismatch")
    assert world.objects.keys() == []


@pytest.mark.parametrize(
    ("purpose", "columns", "field"),
    [
        ("fine-tune", {"promt": "a"}, "dataset.import_options.columns[promt]"),
        ("fine-tune", {"prompt": "x" * 300}, "dataset.import_options.columns"),
        ("evals", {}, "dataset.import_options"),
    ],
)
async def test_options_that_cannot_be_are_refused_at_once(service, purpose, columns, field):
    with pytest.raises(InvalidArgument) as error:
        await service.create(
            "acme", "a.csv", purpose, None, "", import_options=ImportOptions(FileType.CSV, columns)
        )
    assert error.value.violations[0].field == field


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("calls", range(3))
async def test_a_conversion_interrupted_at_any_change_of_the_store_goes_on(world, service, calls, after):
    dataset = await world.upload(CSV, name="q.csv")
    with pytest.raises(Died):
        await world.validation(objects=DyingStore(world.objects, calls, after=after)).validate(dataset)
    await goes_on(world, service, dataset)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["note_conversion", "finish_validation", "clear_staging"])
async def test_a_conversion_interrupted_at_any_change_of_the_database_goes_on(world, service, method, after):
    dataset = await world.upload(CSV, name="q.csv")
    with pytest.raises(Died):
        await world.validation(store=DyingRows(world.store, method, after=after)).validate(dataset)
    await goes_on(world, service, dataset)


async def goes_on(world, service, dataset):
    await world.validate()
    await world.sweep()
    dataset = await service.get("acme", dataset.id)
    assert (dataset.state, dataset.source_sha256) == (DatasetState.READY, sha(CSV))
    assert world.objects.keys() == [blob_key(dataset.sha256)]


@pytest.mark.parametrize("calls", range(3))
async def test_deleted_while_it_is_converted_leaves_nothing(world, service, calls):
    dataset = await world.upload(CSV, name="q.csv")
    with pytest.raises(Died):
        await world.validation(objects=DyingStore(world.objects, calls, after=True)).validate(dataset)
    await service.delete("acme", dataset.id)
    await world.sweep()
    assert world.objects.keys() == []


def parquet(columns, **options):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def test_a_file_that_unpacks_to_far_too_much_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_SLACK_BYTES", 1 << 20)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), ["x" * 1000])
    source, target = tmp_path / "bomb", tmp_path / "rows"
    source.write_bytes(parquet({"text": text}, compression="zstd"))
    made = convert(source, target, ImportOptions(FileType.PARQUET))
    assert [finding.code for finding in made.report.findings] == ["too_large"]
    assert target.stat().st_size < 6 << 20


def test_a_decimal_is_a_number(tmp_path):
    source, target = tmp_path / "source", tmp_path / "rows"
    scores = pa.array(["0.50", "4"], pa.string()).cast(pa.decimal128(3, 2))
    source.write_bytes(parquet({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": scores}))
    convert(source, target, ImportOptions(FileType.PARQUET))
    assert [json.loads(line)["score"] for line in target.read_text().splitlines()] == [0.5, 4]


async def test_the_process_apart_says_the_same_and_has_no_secrets(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(CSV)
    options = ImportOptions(FileType.CSV, {"prompt": "Question", "completion": "Answer"})
    here = convert(source, tmp_path / "here", options)
    apart = await conversion.convert_apart(source, tmp_path / "apart", options)
    assert apart == here
    assert (tmp_path / "apart").read_bytes() == (tmp_path / "here").read_bytes()


async def test_a_value_that_takes_more_memory_than_there_may_be_is_an_error_of_the_file(tmp_path):
    source = tmp_path / "bomb.parquet"
    source.write_bytes(parquet({"text": ["x" * (100 << 20)]}, compression="zstd", use_dictionary=False))
    assert source.stat().st_size < 1 << 20
    options = ImportOptions(FileType.PARQUET)
    made = await conversion.convert_apart(source, tmp_path / "rows", options, memory=160 << 20)
    assert [finding.code for finding in made.report.findings if finding.code != "invalid_n_examples"] == [
        "too_large"
    ]


def program(path, lines: str) -> str:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("signal", ["INT", "TERM", "KILL"])
async def test_a_reader_that_is_ended_from_outside_is_no_error_of_the_file(tmp_path, monkeypatch, signal):
    monkeypatch.setattr(conversion.sys, "executable", program(tmp_path / "reader", f"kill -{signal} $$"))
    with pytest.raises(conversion.ReaderKilled):
        await conversion.convert_apart(tmp_path / "a", tmp_path / "b", ImportOptions(FileType.CSV))


async def test_a_reader_hears_nothing_of_ctrl_c(tmp_path, monkeypatch):
    made = conversion.unreadable("its session is its own")
    answer = conversion.msgspec.json.encode(made).decode()
    lines = f"read -r _ _ _ _ _ session _ < /proc/$$/stat; [ $session = $$ ] || exit 1; echo '{answer}'"
    monkeypatch.setattr(conversion.sys, "executable", program(tmp_path / "reader", lines))
    options = ImportOptions(FileType.CSV)
    assert await conversion.convert_apart(tmp_path / "a", tmp_path / "b", options) == made


@pytest.mark.parametrize(("kills", "state"), [(2, DatasetState.READY), (3, DatasetState.ERROR)])
async def test_a_file_whose_reader_was_killed_is_read_again(world, service, kills, state):
    left = iter([True] * kills)

    async def killed(source, target, options):
        if next(left, False):
            raise conversion.ReaderKilled("killed", retry_after=2)
        return convert(source, target, options)

    dataset = await world.upload(CSV, name="q.csv")
    validation = Validation(world.blobs(), convert=killed)
    for _ in range(2):
        with pytest.raises(conversion.ReaderKilled):
            await validation.step()
    await validation.step()
    assert (await service.get("acme", dataset.id)).state is state


async def test_a_reader_that_crashes_is_an_error_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.sys, "executable", "false")
    made = await conversion.convert_apart(tmp_path / "a", tmp_path / "b", ImportOptions(FileType.CSV))
    assert [finding.code for finding in made.report.findings] == ["unreadable_file"]


def test_rows_that_are_only_numbers_in_a_table_are_still_checked(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(parquet({"text": [1, 2], "when": pa.array([0, 1], pa.timestamp("s"))}))
    made = convert(source, tmp_path / "rows", ImportOptions(FileType.PARQUET))
    assert {finding.code for finding in made.report.findings} == {"data_type", "invalid_n_examples"}
