"""What one pass over a file holds in memory."""

from datetime import UTC, datetime

import pytest

from lathe.datasets import tokenpass
from lathe.datasets.tokenpass import BATCH_ROWS, TokenPass
from lathe.text.arrow import TokenWriter, read_tokens
from lathe.text.render import RenderOptions
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import tiny_tokenizer_config, tiny_tokenizer_json
from tests.unit.datasets.conftest import jsonl


class CountingTokenizer(Tokenizer):
    """Remembers how much text each call was given."""

    def encode_batch(self, texts, add_special_tokens=False):
        self.__dict__.setdefault("calls", []).append((len(texts), sum(map(len, texts))))
        return super().encode_batch(texts, add_special_tokens)


@pytest.mark.parametrize(("size", "count", "together"), [(1024, 10, 4), (4096, 3, 1), (48, 150, BATCH_ROWS)])
def test_rows_are_tokenised_together_up_to_so_many_bytes(tmp_path, monkeypatch, size, count, together):
    monkeypatch.setattr(tokenpass, "BATCH_BYTES", 4096)
    tokenizer = CountingTokenizer.from_files(tiny_tokenizer_json().encode(), tiny_tokenizer_config())
    options, now = RenderOptions(context_limit=8192), datetime(2026, 1, 1, tzinfo=UTC)
    with TokenWriter(tmp_path / "x", {}) as writer:
        work = TokenPass(tokenizer, options, writer, now)
        work.feed(jsonl([{"text": "Hello how can I " * (size // 16)}] * count))
        outcome = work.finish()
    assert max(texts for texts, _ in tokenizer.calls) == together
    assert max(characters for _, characters in tokenizer.calls) <= 4096 + size
    assert outcome.result.rows == len(read_tokens(tmp_path / "x")) == count
