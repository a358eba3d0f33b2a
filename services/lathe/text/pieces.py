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

Tokenizers that write spaces as U+2581 (those of Llama 2, Mistral, Gemma and Phi-3) may take the whole text as one word.
For them it is cut between a letter or digit and a space with another behind it, where these are true:

- nothing but spaces is normalised, and no added token reaches over such a place, begins with a letter or digit, or ends
  with one: on both sides stands what the model is given;
- the model is BPE, of which no merge joins U+2581 to something else before it: what is merged on one side does not
  depend on the other;
- where U+2581 is put before every text, it stands for the space, which the piece then lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Places:
    """Where texts may be cut: behind each match of edge. left_out: characters behind it that the next piece lacks."""

    edge: re.Pattern[str]
    left_out: int = 0

    def cut(self, text: str, size: int = SIZE) -> Iterator[str]:
        """The text in pieces of at least so many characters, where it has places."""
        begin = left_out = 0
        while len(text) - begin > size:
            end = self._next(text, begin + size - 1)
            if end is None:
                break
            yield text[begin + left_out : end]
            begin, left_out = end, self.left_out
        yield text[begin + left_out :]

    def _next(self, text: str, begin: int) -> int | None:
        edges = (edge for edge in self.edge.finditer(text, begin) if normalize("NFC", edge[0]) == edge[0])
        return next((edge.end() for edge in edges), None)


_SPACE = "\u2581"
_SPACE_EDGE = re.compile(r"[^\W_](?= [^\W_])")
WORDS = Places(_EDGE)
SPACES = Places(_SPACE_EDGE)
PREPENDED = Places(_SPACE_EDGE, left_out=1)


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


def places_of(tokenizer: Mapping[str, Any], added: Iterable[AddedToken]) -> Places | None:
    """Where the tokens of a text are those of its pieces; None if that is not known. tokenizer: the content of a
    tokenizer.json; added: all of its added tokens."""
    tokens = list(added)
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    splits = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if all(step.get("type") == "NFC" for step in normalizers) and _splits_at_spaces(splits):
        return None if any(map(_reaches_over, tokens)) else WORDS
    places = _between_words(normalizers, splits)
    apart = places is not None and _merges_words_apart(tokenizer.get("model") or {})
    return places if apart and not any(map(_touches_words, tokens)) else None


def _between_words(
    normalizers: Sequence[Mapping[str, Any]], splits: Sequence[Mapping[str, Any]]
) -> Places | None:
    """Where nothing is done but that spaces are written as U+2581, and one is put before a text."""
    if not normalizers:
        spaced = [step.get("type") for step in splits] == ["Metaspace"]
        return SPACES if spaced and splits[0].get("replacement") == _SPACE else None
    *before, replaced = normalizers
    if replaced != {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
        return None
    # Gemma's splits at spaces, of which there are none any more.
    if any(step.get("type") != "Split" or step.get("pattern") != {"String": " "} for step in splits):
        return None
    if not before:
        return SPACES
    return PREPENDED if before == [{"type": "Prepend", "prepend": _SPACE}] else None


def _merges_words_apart(model: Mapping[str, Any]) -> bool:
    heeds_ends = any(
        model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    if model.get("type") != "BPE" or heeds_ends or _SPACE not in (model.get("vocab") or ()):
        return False
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ())
    return not any(last.startswith(_SPACE) and not first.endswith(_SPACE) for first, last in pairs)


def _touches_words(token: AddedToken) -> bool:
    text = str(token.content).replace(_SPACE, " ").strip()
    ends = bool(re.match(r"[^\W_]", text) or re.search(r"[^\W_]\Z", text))
    return token.rstrip or token.single_word or ends or _SPACE_EDGE.search(text) is not None


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
