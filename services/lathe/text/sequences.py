"""A row of a training file, whatever its format, as the sequences of tokens that a model is trained on.

What is longer than the context limit:
- a chat or completion row, and an answer with a label, is cut at its end;
- of a preference pair both sequences are cut at the same limit. Their prompts are equal, so it is the answers that
  lose their ends; a pair of which nothing, or no difference, is left is refused;
- a text is split into rows of the limit's size, none of it lost: each begins with the last token of the one before,
  so that every token but the very first is trained exactly once.
With the truncation `error` such a row is refused instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from lathe.text.errors import RowError
from lathe.text.formats import Layout, Role, RowFormat
from lathe.text.render import Example, RenderOptions, cut, render_whole
from lathe.text.rows import TrainingRow
from lathe.text.tokenizer import Tokenizer

_FIELDS = {
    RowFormat.COMPLETION: ("completion",),
    RowFormat.TEXT: ("text",),
    RowFormat.UNPAIRED_PREFERENCE: ("",),
}
"""Where a finding about the n-th sequence of a row stands; in chat rows the finding itself knows."""
_OPENAI_OUTPUTS = ("preferred_output", "non_preferred_output")
_OUTPUTS = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One row's sequences with their roles, in the order in which they are stored.

    rows: how many rows of a batch they are: 1, also for a pair; the pieces of a text that was split.
    truncated: tokens cut off, of all its sequences.
    """

    sequences: tuple[tuple[Role, Example], ...]
    rows: int
    truncated: int

    @property
    def was_split(self) -> bool:
        """Whether a text became several rows."""
        return self.rows > 1


def tokenise_rows(
    tokenizer: Tokenizer, rows: Sequence[TrainingRow], options: RenderOptions, *, now: datetime | None = None
) -> list[Tokenised | RowError]:
    """The rows, tokenised together; one that cannot be used gives its error in its place. now: what a template that
    writes the date reads; one moment for all rows."""
    contents = [part.content for row in rows for part in row.parts]
    wholes = iter(render_whole(tokenizer, contents, options, now=now))
    return [_tokenised(row, [next(wholes) for _ in row.parts], options) for row in rows]


def _tokenised(
    row: TrainingRow, wholes: Sequence[Example | RowError], options: RenderOptions
) -> Tokenised | RowError:
    try:
        fitted = [_fitted(whole, row, index, options) for index, whole in enumerate(wholes)]
        if row.format is RowFormat.PREFERENCE:
            ((chosen,), (rejected,)) = fitted
            _check_pair(chosen, rejected, row.layout, options)
    except RowError as error:
        return error
    return Tokenised(
        tuple(
            (part.role, example)
            for part, examples in zip(row.parts, fitted, strict=True)
            for example in examples
        ),
        rows=len(fitted[0]),
        truncated=sum(example.truncated for examples in fitted for example in examples),
    )


def _fitted(whole: Example | RowError, row: TrainingRow, index: int, options: RenderOptions) -> list[Example]:
    """The sequence within the limit. Raises RowError, placed where the sequence stands in its row."""
    try:
        if isinstance(whole, RowError):
            raise whole
        if row.format is RowFormat.TEXT and options.truncation == "end":
            return list(split(whole, options.context_limit))
        return [cut(whole, options)]
    except RowError as error:
        if row.format is RowFormat.CHAT:
            raise
        fields = _outputs(row.layout) if row.format is RowFormat.PREFERENCE else _FIELDS[row.format]
        raise RowError(fields[index], error.code, error.detail) from None


def split(whole: Example, limit: int) -> Iterator[Example]:
    """A text in rows of at most `limit` tokens. Raises RowError where nothing of it can be trained."""
    if not whole.trained_tokens or limit < 2:
        raise RowError(
            "text", "nothing_trained", "the row has nothing to train: a single token follows nothing"
        )
    for begin in range(0, len(whole.tokens) - 1, limit - 1):
        tokens = whole.tokens[begin : begin + limit]
        mask = b"\0" + whole.mask[begin + 1 : begin + limit]
        yield Example(tokens, mask, 0, mask.count(1), whole.boundary_stable)


def _outputs(layout: Layout) -> tuple[str, str]:
    return _OPENAI_OUTPUTS if layout is Layout.OPENAI else _OUTPUTS


def _check_pair(chosen: Example, rejected: Example, layout: Layout, options: RenderOptions) -> None:
    """Raises RowError where the two do not answer the same prompt, or are the same within the limit."""
    edge = chosen.mask.index(1)
    if rejected.mask.index(1) != edge or rejected.tokens[:edge] != chosen.tokens[:edge]:
        raise RowError(
            "input" if layout is Layout.OPENAI else "prompt",
            "turn_not_maskable",
            "with this base model's chat template the prompt differs between the two outputs, so it cannot be told "
            "which tokens to compare",
        )
    if chosen.tokens == rejected.tokens:
        raise RowError(
            _outputs(layout)[1],
            "identical_outputs",
            f"is the same as {_outputs(layout)[0]} within the limit of {options.context_limit} tokens",
        )
