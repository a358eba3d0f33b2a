from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lathe.text.tokenizer import Tokenizer
from tests.fixtures.templates import SPECIAL
from tests.fixtures.tiny import CHATML, tiny_tokenizer_json

MakeTokenizer = Callable[..., Tokenizer]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """A tiny tokenizer with the special tokens of every template, around one template."""
    backend = Backend.from_str(tiny_tokenizer_json())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    content = backend.to_str()

    def make(
        template: str = CHATML, *, bos: str = "<|im_start|>", eos: str = "<|im_end|>", **json_parts: Any
    ) -> Tokenizer:
        merged = json.dumps(json.loads(content) | json_parts).encode()
        return Tokenizer.from_files(merged, {"bos_token": bos, "eos_token": eos}, template)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer()
