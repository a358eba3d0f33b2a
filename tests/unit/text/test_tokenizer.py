from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from lathe.text.errors import TemplateError, TokenizerError
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import CHATML, build_tiny_tokenizer, tiny_tokenizer_config, tiny_tokenizer_json
from tests.unit.text.conftest import MakeTokenizer

TINY = Tokenizer.from_files(tiny_tokenizer_json().encode(), tiny_tokenizer_config())


def sentence_piece() -> Tokenizer:
    """Llama 2's pipeline: Prepend and Replace, BPE with byte fallback."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for letter in "▁abcdefghij.":
        vocab[letter] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return Tokenizer.from_files(backend.to_str().encode(), {})


SENTENCE_PIECE = sentence_piece()


@given(st.text(max_size=40), st.booleans())
def test_streamed_text_equals_decoded_text(text: str, skip: bool) -> None:
    for tokenizer in (TINY, SENTENCE_PIECE):
        ids = tokenizer.encode(text + "<|im_end|>x")
        decoder = tokenizer.stream_decoder(skip)
        pieces = [decoder.push(id_) for id_ in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, skip)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, TINY.vocab_size - 1), max_size=30))
def test_any_tokens_stream_as_they_decode(ids: list[int]) -> None:
    decoder = TINY.stream_decoder()
    assert "".join(decoder.push(id_) for id_ in ids) + decoder.flush() == TINY.decode(ids)


def test_another_decoder_is_streamed_too() -> None:
    content = json.loads(tiny_tokenizer_json())
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], {"type": "Fuse"}]}
    tokenizer = Tokenizer.from_files(json.dumps(content).encode(), {})
    for text in ("Hello 你好 🙂!", "\ufffd" * 30 + "a"):
        ids, decoder = tokenizer.encode(text), tokenizer.stream_decoder()
        pieces = [decoder.push(id_) for id_ in ids]
        assert "".join(pieces) + decoder.flush() == text


def test_from_folder(tmp_path: Path) -> None:
    folder = build_tiny_tokenizer(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (0, 1, 2), 640)
    assert tokenizer.template.source == CHATML
    (folder / "chat_template.jinja").write_text("other")
    assert Tokenizer.from_folder(folder).template.source == "other"


def test_the_end_of_turn_stops_whatever_eos_is_called(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|endoftext|>")
    assert tokenizer.eos_ids == (0, 2)


def test_digests_are_of_the_content(make_tokenizer: MakeTokenizer) -> None:
    content = json.loads(tiny_tokenizer_json())
    spaced = Tokenizer.from_files(json.dumps(content, indent=3).encode(), tiny_tokenizer_config())
    assert (spaced.digest, spaced.template_digest) == (TINY.digest, TINY.template_digest)
    other = Tokenizer.from_files(tiny_tokenizer_json().encode(), tiny_tokenizer_config("x"))
    assert other.template_digest != TINY.template_digest
    assert make_tokenizer().digest != TINY.digest


def test_truncation_and_padding_of_the_file_do_not_apply() -> None:
    backend = Backend.from_str(tiny_tokenizer_json())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_files(backend.to_str().encode(), {})
    assert tokenizer.decode(tokenizer.encode("Hello, how are you?")) == "Hello, how are you?"


def test_token_bytes() -> None:
    ids = TINY.encode("é<|im_end|>")
    assert b"".join(TINY.token_bytes(id_) for id_ in ids) == "é<|im_end|>".encode()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_files(b"{}", {})
    with pytest.raises(TemplateError, match="no chat template"):
        _ = Tokenizer.from_files(tiny_tokenizer_json().encode(), {}).template
    with pytest.raises(TokenizerError, match="agreeing"):
        Tokenizer.from_files(
            tiny_tokenizer_json().encode(), {"added_tokens_decoder": {"9000": {"content": "<|new|>"}}}
        )
