"""A Hugging Face tokenizer.json as llama.cpp's vocabulary.

llama.cpp has no general pre-tokenizer: it knows a list by name. Which one a tokenizer.json means is told from what it
says, not from the model's name; one that is not on the list is refused, because it would cut text elsewhere than the
training did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InvalidArgument

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The expression of a Split pre-tokenizer -> llama.cpp's name for it.
_SPLITS = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """kind: llama.cpp's tokenizer.ggml.model; pre: its name of the pre-tokenizer (byte-level BPE only); scores for
    SentencePiece only, merges for byte-level BPE only; tokens by id, as many as the embedding has rows."""

    kind: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    add_space_prefix: bool


def vocabulary(tokenizer_json: bytes, rows: int) -> Vocabulary:
    """rows: of the embedding; ids that the tokenizer does not use are filled up. Raises InvalidArgument."""
    content = json.loads(tokenizer_json)
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise InvalidArgument(
            f"The tokenizer is of the kind {model.get('type')!r}; only BPE can be written as GGUF."
        )
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(model["vocab"], content.get("added_tokens") or [], rows, sentencepiece)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
    if sentencepiece:
        return Vocabulary("llama", "", tokens, types, _scores(tokens, merges), (), _prepends(content))
    spelled = tuple(f"{left} {right}" for left, right in merges)
    return Vocabulary("gpt2", _pre_tokenizer(content), tokens, types, (), spelled, False)


def _tokens(
    vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int, sentencepiece: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    highest = max([*vocab.values(), *(int(token["id"]) for token in added)])
    if highest >= rows:
        raise InvalidArgument(f"The tokenizer has the id {highest}, the model's embedding only {rows} rows.")
    for token, id_ in vocab.items():
        byte = sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[id_], types[id_] = token, BYTE if byte else NORMAL
    for entry in added:
        id_, text = int(entry["id"]), str(entry["content"])
        # llama.cpp itself writes a space for the mark that SentencePiece has for one, not so in added tokens.
        tokens[id_] = text.replace(_SPACE, " ") if sentencepiece else text
        types[id_] = CONTROL if entry.get("special") else USER_DEFINED
        if text == "<unk>":
            types[id_] = UNKNOWN
    return tuple(tokens), tuple(types)


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> tuple[float, ...]:
    """SentencePiece joins the pair whose piece has the highest score: minus the rank of the first merge that gives
    the piece keeps tokenizer.json's order."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return tuple(-float(rank.get(token, len(merges))) for token in tokens)


def _prepends(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizer, pre = content.get("normalizer"), content.get("pre_tokenizer")
    return any(step.get("type") == "Prepend" for step in _steps(normalizer, "normalizers")) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(pre, "pretokenizers")
    )


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    kinds = [str(step.get("type")) for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        words = bool(steps[-1].get("use_regex", True))
        if kinds == ["ByteLevel"] and words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and words and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not words and not steps[0].get("invert"):
            pattern = steps[0].get("pattern") or {}
            named = _SPLITS.get(str(pattern.get("Regex")))
            if named is not None:
                return named
    raise InvalidArgument(
        f"The tokenizer cuts text in a way ({', '.join(kinds) or 'no pre-tokenizer'}) that llama.cpp has no name for, "
        "so a GGUF file would not read text as the training did. Export safetensors instead."
    )


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A step, or those of a Sequence."""
    if not step:
        return []
    return list(step.get(key) or []) if step.get("type") == "Sequence" else [step]
