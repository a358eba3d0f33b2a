"""What becomes of some lines of a dataset, and how chunks are put together."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest

from lathe.datasets import chunkwork
from lathe.datasets.chunkwork import BATCH_ROWS, Chunker, ChunkWork
from lathe.datasets.collecting import (
    Collector,
    distribution,
    few_answers,
    label_imbalance,
    other_languages,
)
from lathe.datasets.model import Distribution, Share
from lathe.text.arrow import TokenWriter, read_tokens
from lathe.text.render import RenderOptions
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import tiny_tokenizer_config, tiny_tokenizer_json
from tests.unit.datasets.conftest import jsonl

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OPTIONS = RenderOptions(context_limit=8192)


def tokenizer() -> Tokenizer:
    return Tokenizer.from_files(tiny_tokenizer_json().encode(), tiny_tokenizer_config())


def chunks(content: bytes, piece: int = 1 << 20) -> list[list[int]]:
    chunker = Chunker()
    cut = [
        [line.number for line in lines]
        for at in range(0, len(content), piece)
        for lines in chunker.feed(content[at : at + piece])
    ]
    return [*cut, *([line.number for line in lines] for lines in chunker.finish())]


@pytest.mark.parametrize(("size", "count", "together"), [(1024, 10, 4), (4096, 3, 1), (48, 150, BATCH_ROWS)])
def test_rows_are_done_together_up_to_so_many_bytes(monkeypatch, size, count, together):
    monkeypatch.setattr(chunkwork, "BATCH_BYTES", 4096)
    content = jsonl([{"text": "Hello how can I " * (size // 16)}] * count)
    whole = chunks(content)
    assert max(map(len, whole)) == together and sum(map(len, whole)) == count
    assert chunks(content, piece=37) == whole


def test_a_chunk_has_the_same_result_each_time_it_is_done(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
        {"text": 1},
    ]
    chunker = Chunker()
    lines = [*chunker.feed(jsonl(rows)), *chunker.finish()][0]
    work = ChunkWork(tokenizer(), OPTIONS, NOW)
    first = work.run(lines)
    assert work.run(lines) == first and first.examples == 1
    with TokenWriter(tmp_path / "x", {}) as writer:
        collector = Collector(writer)
        collector.add(first)
    outcome = collector.conclude([])
    assert len(read_tokens(tmp_path / "x")) == outcome.result.rows == 1
    assert [(finding.line, finding.code) for finding in outcome.report.findings] == [(2, "data_type")]


def test_quantiles_are_values_that_occur():
    assert distribution({}) == Distribution()
    assert distribution({7: 1}) == Distribution(1, 7, 7, 7, 7.0, 7, 7, 7)
    counts = dict.fromkeys(range(1, 101), 1)
    assert distribution(counts) == Distribution(100, 1, 10, 50, 50.5, 90, 99, 100)
    assert distribution({1: 99, 500: 1}).p99 == 1


def test_few_answers_are_shown_and_a_dominant_one_is_told():
    labels = Counter({"yes": 95, "no": 5})
    assert few_answers(labels) == (Share("yes", 95), Share("no", 5))
    finding = label_imbalance(few_answers(labels))
    assert finding is not None and "95 of 100 answers are 'yes'; there are 2 different" in finding.message
    alone = label_imbalance(few_answers(Counter({"yes": 60})))
    assert alone is not None and alone.message == "60 of 60 answers are 'yes'; there is no other one"
    assert label_imbalance(few_answers(Counter({"yes": 60, "no": 40}))) is None
    assert few_answers(Counter(map(str, range(40)))) == ()
    assert few_answers(Counter({"yes": 49})) == ()
    assert few_answers(Counter({"jo.doe@acme.org": 60})) == (Share("(an e-mail address)", 60),)


def test_rows_in_another_language_than_most_are_told():
    lines: dict[str, Any] = {"en": [1, 2, 4], "de": [3], "und": [5, 6, 7, 8, 9]}
    assert [(item.line, item.code) for item in other_languages(lines)] == [(3, "other_language")]
    assert list(other_languages({"en": [1], "de": [2]})) == []  # type: ignore[dict-item]
    assert list(other_languages({})) == []


def test_nothing_sensitive_is_in_a_report(tmp_path):
    secret = "AKIA" + "Z" * 16
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"key {secret}"},
                {"role": "assistant", "content": "ok then"},
            ]
        }
    ]
    chunker = Chunker()
    (lines,) = [*chunker.feed(jsonl(rows)), *chunker.finish()]
    result = ChunkWork(tokenizer(), OPTIONS, NOW).run(lines)
    assert [finding.code for finding in result.findings] == ["secret"]
    assert secret not in json.dumps([finding.message for finding in result.findings])
