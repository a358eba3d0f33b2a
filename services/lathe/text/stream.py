"""Incremental detokenisation: text as soon as it is whole, in time linear in the number of tokens."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_HELD_TOKENS = 8


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: a byte that prints is itself, others follow from 256."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


class TokenBytes:
    """The bytes that a token id stands for, where the decoder is one that works token by token.

    Two kinds do: ByteLevel (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece's with byte fallback (Llama 2,
    Mistral, Gemma). `exact` is false for any other; calling then gives None.
    """

    def __init__(
        self,
        decoder: Mapping[str, Any] | None,
        token_of: Callable[[int], str | None],
        added: Mapping[int, str],
    ) -> None:
        steps = _steps(decoder)
        kinds = [step.get("type") for step in steps]
        self._token_of = token_of
        self._added = dict(added)
        self._byte_level = kinds == ["ByteLevel"]
        pieces = (
            kinds and kinds[0] == "Replace" and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}
        )
        self._sentence_piece = bool(pieces) and "ByteFallback" in kinds and _replaces_underline(steps[0])
        self.strips_first_space = self._sentence_piece and "Strip" in kinds
        self.exact = self._byte_level or self._sentence_piece

    def __call__(self, token_id: int) -> bytes | None:
        if not self.exact:
            return None
        token = self._added.get(token_id)
        if token is not None:
            return self._plain(token)
        token = self._token_of(token_id)
        if token is None:
            return b""
        if self._byte_level:
            alphabet = _byte_alphabet()
            found = [alphabet.get(character) for character in token]
            return bytes(byte for byte in found if byte is not None) if None not in found else token.encode()
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else self._plain(token)

    def _plain(self, token: str) -> bytes:
        if self._sentence_piece:
            return token.replace("▁", " ").encode()
        alphabet = _byte_alphabet()
        found = [alphabet.get(character) for character in token]
        return token.encode() if None in found else bytes(byte for byte in found if byte is not None)


class StreamDecoder:
    """Turns one sequence's tokens into text as they come. What `push` and `flush` return, joined, is what
    decoding all tokens at once gives (bytes that are not UTF-8 become U+FFFD)."""

    def __init__(
        self, token_bytes: TokenBytes, skipped: frozenset[int], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._bytes = token_bytes
        self._skipped = skipped
        self._decode = decode
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = token_bytes.strips_first_space
        self._window: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is still open."""
        if token_id in self._skipped:
            return ""
        if not self._bytes.exact:
            return self._push_window(token_id)
        data = self._bytes(token_id) or b""
        if self._first and data:
            self._first = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        if self._bytes.exact:
            return self._utf8.decode(b"", final=True)
        rest = self._decode(self._window)[self._emitted :] if self._window else ""
        self._window, self._emitted = [], 0
        return rest

    def _push_window(self, token_id: int) -> str:
        """Any other decoder: decodes a short window of tokens again, of which the first are already out."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) <= _MAX_HELD_TOKENS:
            return ""
        fresh = text[self._emitted :]
        # The newest token stays as the context in which the next one is joined to it, unless it is half a character.
        self._window = [] if text.endswith("\ufffd") else [token_id]
        self._emitted = len(self._decode(self._window)) if self._window else 0
        return fresh


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder.get("decoders", ()) for step in _steps(inner)]
    return [decoder]


def _replaces_underline(step: Mapping[str, Any]) -> bool:
    return step.get("pattern") == {"String": "▁"} and step.get("content") == " "
