"""A long text in pieces that are tokenised one by one and give the tokens of the whole: a tokenizer takes hundreds of
bytes for each token of what it is given at once.

A text is cut between a letter or digit and a space, a line break, or a comma or full stop of Chinese and Japanese
behind it, and between a sign of ASCII and a space, where all of these are true of the tokenizer:

- it normalises nothing, or to NFC, in which those never join what stands before them; letters that NFC changes are
  passed over, since some become a letter and a mark (Hindi's U+095D), which belongs to a word with what is behind it;
- no added token reaches over such a place, or asks what stands on its other side;
- it splits the text into words by expressions of _ALTERNATIVES. None of them takes one of those behind a letter or a
  digit, takes a space behind a sign (but line breaks), looks behind, or looks ahead from elsewhere than white space: so
  there is an edge of words at that place, and on each side the words are the same whatever stands on the other. What
  comes after that works on one word at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from unicodedata import normalize

from tokenizers import AddedToken

SIZE = 1 << 18
"""Characters of a piece, about; what is tokenised at once."""
MAX_BYTES = 2 << 20
"""Of what may be tokenised as a whole, in UTF-8: a tokenizer takes up to 270 bytes for each (measured)."""

_EDGE = re.compile(r"[^\W_](?=[ \n\u3001\u3002\uff0c])|[!-/:-@\[-`{-~](?= )")
_SPACES, _OTHERS = r"\s+", r"[^\s\p{L}\p{N}]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_ENDING = f"(?i:{'|'.join(_ENDINGS)})"
# As they stand in the tokenizer.json of GPT-2, Llama 3, Qwen, Mistral's Tekken and OpenAI's o200k.
_ALTERNATIVES = (
    *_ENDINGS,
    _ENDING,
    *(
        rf"{before}{letters}"
        for before in (" ?", r"[^\r\n\p{L}\p{N}]?")
        for letters in (r"\p{L}+", r"[\p{L}\p{M}]+")
    ),
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?{word}{ending}"
        for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
        for ending in ("", f"{_ENDING}?")
    ),
    *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?\p{N}+"),
    *(f" ?{_OTHERS}{breaks}" for breaks in ("", r"[\r\n]*", r"[\r\n/]*")),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", _SPACES),
)
_ONE = f"(?:{'|'.join(map(re.escape, _ALTERNATIVES))})"
# Whatever else it has, white space and what is neither letter nor number belong to words in the end.
_SAFE = re.compile(rf"(?:{_ONE}\|)*{re.escape(_SPACES)}")


def cut(text: str, size: int = SIZE) -> Iterator[str]:
    """The text in pieces of at least so many characters, where it has places to cut."""
    begin = 0
    while len(text) - begin > size:
        end = _edge(text, begin + size - 1)
        if end is None:
            break
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _edge(text: str, begin: int) -> int | None:
    """The first place to cut from here on."""
    edges = (edge for edge in _EDGE.finditer(text, begin) if normalize("NFC", edge[0]) == edge[0])
    return next((edge.end() for edge in edges), None)


def longest(pieces: Iterable[str]) -> int:
    """The bytes of the longest one in UTF-8."""
    return max((len(piece.encode("utf-8", "surrogatepass")) for piece in pieces), default=0)


def grouped(owned: Iterable[tuple[int, str]], size: int = SIZE) -> Iterator[list[tuple[int, str]]]:
    """The pieces some at a time, each with the number of its text: groups end at so many characters."""
    group: list[tuple[int, str]] = []
    characters = 0
    for owner, piece in owned:
        group.append((owner, piece))
        characters += len(piece)
        if characters >= size:
            yield group
            group, characters = [], 0
    if group:
        yield group


def may_cut(tokenizer: Mapping[str, Any], added: Iterable[AddedToken]) -> bool:
    """Whether the tokens of a text are those of its pieces. tokenizer: the content of a tokenizer.json; added: all of
    its added tokens."""
    return (
        all(step.get("type") == "NFC" for step in _steps(tokenizer.get("normalizer"), "normalizers"))
        and _splits_at_spaces(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
        and not any(map(_reaches_over, added))
    )


def _splits_at_spaces(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first step but for digits makes the edge, and the others heed one word alone."""
    kinds = {step.get("type") for step in steps}
    first = next((step for step in steps if step.get("type") != "Digits"), {})
    if not kinds <= {"ByteLevel", "Split", "Digits"}:
        return False
    if first.get("type") == "ByteLevel":
        return bool(first.get("use_regex", True)) and first.get("add_prefix_space") is False
    expression = (first.get("pattern") or {}).get("Regex")
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    known = isinstance(expression, str) and _OTHERS in expression and _SAFE.fullmatch(expression) is not None
    return isolated and known


def _reaches_over(token: AddedToken) -> bool:
    return token.rstrip or token.single_word or _EDGE.search(normalize("NFC", token.content)) is not None


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A step, or those of a Sequence."""
    if not step:
        return []
    return list(step.get(key) or []) if step.get("type") == "Sequence" else [step]
