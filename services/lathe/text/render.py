"""A row as the tokens and the loss mask that a model is trained on; a request as the tokens that it is
prompted with.

Trained are exactly the tokens that the assistant's turns of weight 1 produce: content or tool calls, and the
token that ends the turn; never a header, another role, or the newline after the end of the turn. Of a text outside
any chat the completion is trained, with the end of text that is put behind it; the model's bos is put before it
where its tokenizer does so. The first token of all is never a target: nothing precedes it.

Characters are mapped to tokens by the offsets of one tokenisation of the whole text. That tokenisation can
differ from inference where a prompt ends and an answer begins: at inference the prompt is tokenised alone, so
no token reaches over the edge, and a pattern that looks ahead does not see the answer (a header's last
newline and an answer that begins with one would be a single token in the whole text). Where it differs,
`Example.boundary_stable` is false and the text is cut at the last such edge: the tokens are ids(prompt) +
ids(answer and what follows it), so that what is trained is what is sampled. Only the last one is cut: what
precedes it is then, token for token, the prompt at inference. At an earlier such edge the tokens that start
before it are not trained; turns after the cut see it in their history.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, ParamSpec, TypeVar

from tokenizers import Encoding

from lathe.text.align import aligned_ranges
from lathe.text.chat import Chat
from lathe.text.errors import RowError
from lathe.text.mask import Piece, Rendered, Source, Span, render_spans, token_start, trained_range
from lathe.text.pieces import MAX_BYTES
from lathe.text.rows import Plain
from lathe.text.template import ChatTemplate
from lathe.text.tokenizer import Tokenizer

NO_TEMPLATE = (
    "the base model has no chat template, which messages are rendered with; give texts (text, or prompt and "
    "completion), or tune a base model that was imported with a chat_template.jinja"
)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """context_limit: most tokens of an example. truncation: `end` cuts what is over, `error` refuses the row.
    weights: `message` trains the turns whose weight is 1, `last_turn` only the last of them."""

    context_limit: int
    truncation: Literal["end", "error"] = "end"
    weights: Literal["message", "last_turn"] = "message"

    def canonical(self) -> str:
        """Equal for equal options, for ever: part of a token object's key."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Example:
    """tokens: ids. mask: one byte per token, 1 where it is a target of the loss. truncated: tokens cut off
    the end.
    trained_tokens: ones in the mask. boundary_stable: see the module's docstring. lost: how many of the truncated
    ones would have been trained."""

    tokens: list[int]
    mask: bytes
    truncated: int
    trained_tokens: int
    boundary_stable: bool
    lost: int = 0


def render_whole(
    tokenizer: Tokenizer,
    rows: Sequence[Chat | Plain],
    options: RenderOptions,
    *,
    now: datetime | None = None,
) -> list[Example | RowError]:
    """Rows tokenised together, none of them cut (`cut` does that); one that cannot be used gives its error in its
    place: template_error, too_many_turns, turn_not_maskable, text_too_long. now: what a template that writes the date
    reads; one moment for all rows."""
    moment = now if now is not None or not tokenizer.has_template else tokenizer.template.now()
    rendered = [_or_error(_render, tokenizer, row, options, moment) for row in rows]
    good = [item for item in rendered if isinstance(item, Rendered)]
    ids = iter(tokenizer.encode_batch([item.text for item in good]))
    return [
        item if isinstance(item, RowError) else _or_error(_example, tokenizer, item, next(ids))
        for item in rendered
    ]


def cut(example: Example, options: RenderOptions) -> Example:
    """The example within the context limit. Raises RowError: context_exceeded, nothing_trained."""
    limit, size = options.context_limit, len(example.tokens)
    over = max(size - limit, 0)
    if over and options.truncation == "error":
        raise RowError(
            "messages",
            "context_exceeded",
            f"the row has {size} tokens, the limit is {limit}; shorten it by {over}",
        )
    kept = example.mask[:limit]
    if 1 not in kept:
        cause = f"all that would be trained lies after token {limit}" if over else "no token is left"
        raise RowError("messages", "nothing_trained", f"the row has nothing to train: {cause}")
    if not over:
        return example
    trained = kept.count(1)
    lost = example.trained_tokens - trained
    return Example(example.tokens[:limit], kept, over, trained, example.boundary_stable, lost)


def _or_error(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | RowError:
    try:
        return function(*args, **kwargs)
    except RowError as error:
        return error


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    now: datetime | None = None,
) -> list[int]:
    """The ids that a model is prompted with, its turn opened. `messages` and `tools` as parse_messages gives
    them. Raises TemplateError."""
    prepared = prepare(messages, tokenizer.template)
    return tokenizer.encode(tokenizer.template.render(prepared, tools, add_generation_prompt=True, now=now))


def prepare(messages: Sequence[Mapping[str, Any]], template: ChatTemplate) -> list[Mapping[str, Any]]:
    """`developer` is the newer name of `system`: templates that do not know it get the older one."""
    if template.knows_developer:
        return list(messages)
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


def _render(
    tokenizer: Tokenizer, row: Chat | Plain, options: RenderOptions, now: datetime | None
) -> Rendered:
    rendered = _spans(tokenizer, row, options, now)
    _check_size(tokenizer.whole_bytes(rendered.text))
    return rendered


def _check_size(size: int) -> None:
    """size: bytes of a text that has to be tokenised at once. Raises RowError."""
    if size > MAX_BYTES:
        raise RowError(
            "messages",
            "text_too_long",
            f"{size} bytes of its text can only be tokenised as a whole, and at most {MAX_BYTES} may be; split it, or "
            "put spaces or line breaks into it",
        )


def _spans(tokenizer: Tokenizer, row: Chat | Plain, options: RenderOptions, now: datetime | None) -> Rendered:
    if isinstance(row, Plain):
        text, edge = row.prompt + row.completion, len(row.prompt)
        return Rendered(text, (Span(edge, len(text), 0, follows_prompt=True),), document=True)
    weights = list(row.weights)
    turns = [index for index, weight in enumerate(weights) if weight]
    if options.weights == "last_turn":
        weights = [int(bool(turns) and index == turns[-1]) for index in range(len(weights))]
    if not turns:
        raise RowError("messages", "nothing_trained", "every message of the assistant has weight 0")
    if not tokenizer.has_template or now is None:
        raise RowError("messages", "template_error", NO_TEMPLATE)
    template = tokenizer.template
    messages = prepare(row.messages, template)
    return render_spans(Source(template, messages, row.tools, weights, now, tokenizer.end_texts))


def _example(tokenizer: Tokenizer, item: Rendered, ids: list[int]) -> Example:
    tokens, ranges, stable = _ranges(tokenizer, item, ids)
    mask = bytearray(len(tokens))
    for start, end in ranges:
        mask[start:end] = b"\1" * (end - start)
    if item.document:
        tokens, mask = _as_document(tokenizer, tokens, mask)
    mask[:1] = b"\0" * bool(mask)
    return Example(tokens, bytes(mask), 0, mask.count(1), stable)


def _ranges(
    tokenizer: Tokenizer, item: Rendered, ids: list[int]
) -> tuple[list[int], list[tuple[int, int]], bool]:
    """The text's tokens, the half-open ranges of its spans among them, and whether its edges are stable.

    ids: of the whole text. Its offsets are made only where the ranges cannot be told without.
    """
    stops = frozenset() if item.document else frozenset(tokenizer.eos_ids)
    if item.document or tokenizer.plain_added is not None:
        found = aligned_ranges(item, ids, tokenizer.plain_added or {}, stops, tokenizer.encode_short)
        if found is not None:
            return ids, found, True
    _check_size(len(item.text.encode("utf-8", "surrogatepass")))
    pieces, stable = _pieces(tokenizer, item, tokenizer.encode_spans([item.text])[0])
    tokens = [token for piece in pieces for token in piece.ids()]
    return tokens, [trained_range(pieces, tokens, span, len(item.text), stops) for span in item.spans], stable


def _as_document(tokenizer: Tokenizer, tokens: list[int], mask: bytearray) -> tuple[list[int], bytearray]:
    """With what the tokenizer puts before a text, and the end of text, which is trained."""
    prefix = tokenizer.document_prefix
    ends = tokenizer.eos_id is None or tokens[-1:] == [tokenizer.eos_id]
    end = [] if ends or tokenizer.eos_id is None else [tokenizer.eos_id]
    return [*prefix, *tokens, *end], bytearray(len(prefix)) + mask + b"\1" * len(end)


def _pieces(tokenizer: Tokenizer, item: Rendered, encoding: Encoding) -> tuple[tuple[Piece, ...], bool]:
    """The tokenisation of the text, cut at the last edge where the whole text's differs from inference's."""
    whole = Piece(encoding, 0, 0, 0)
    ids = encoding.ids
    for span in reversed(item.spans):
        if span.follows_prompt and not _stable(tokenizer, item.text, encoding, ids, span.start):
            break
    else:
        return (whole,), True
    anchor = tokenizer.anchor
    head, tail = tokenizer.encode_spans([item.text[: span.start], anchor + item.text[span.start :]])
    return (
        Piece(head, 0, 0, 0),
        Piece(tail, span.start, span.start - len(anchor), 1 if anchor else 0),
    ), False


def _stable(tokenizer: Tokenizer, text: str, encoding: Encoding, ids: Sequence[int], edge: int) -> bool:
    """Whether the tokens of text[:edge], tokenised alone, are how the whole text's tokens begin.

    Only the stretch from the last added token before the edge is compared: text is split there before all
    else.
    """
    if edge == 0:
        return True
    last = next((t for c in range(edge - 1, -1, -1) if (t := encoding.char_to_token(c)) is not None), None)
    if last is None:
        return False
    anchors = tokenizer.anchor_ids
    first = next((index for index in range(last, -1, -1) if ids[index] in anchors), None)
    begin = 0 if first is None else token_start(encoding, first)
    first = first or 0
    alone = tokenizer.encode_short(text[begin:edge])
    return tuple(ids[first : first + len(alone)]) == alone
