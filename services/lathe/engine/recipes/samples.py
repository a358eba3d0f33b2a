"""Answers to held-out prompts at a checkpoint, so that a person sees the model change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lathe.common.errors import LatheError
from lathe.engine.batch import TrainRow
from lathe.engine.model import Note
from lathe.engine.recipes.turns import Turns, generate
from lathe.text.formats import Role

ANSWER_TOKENS = 64
# Of a prompt an event shows its end.
_PROMPT_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Speech:
    """The base model's tokenizer, as far as a sample needs it. stop_ids: the ids that end a turn."""

    decode: Callable[[Sequence[int]], str]
    stop_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A prompt of the validation file: the line it stands in, and what comes before its first trained token."""

    line: int
    tokens: tuple[int, ...]


def held_out(rows: Sequence[TrainRow], count: int) -> list[HeldOut]:
    """The first `count` prompts of the rows, each once: of a pair there is one."""
    prompts: dict[tuple[int, ...], HeldOut] = {}
    for row in rows:
        if len(prompts) >= count:
            break
        first = next((place for place, trained in enumerate(row.mask) if trained), 0)
        prompt = tuple(int(token) for token in row.tokens[:first])
        if prompt and row.role is not Role.REJECTED:
            prompts.setdefault(prompt, HeldOut(row.line, prompt))
    return list(prompts.values())[:count]


def sampled(key: str, step: int, prompts: Sequence[HeldOut], speech: Speech) -> Turns[None]:
    """Tells the adapter's greedy answers, a note each; what cannot be sampled is told, and stops no training."""
    if not prompts:
        return
    try:
        answers = yield from generate(
            key, [prompt.tokens for prompt in prompts], ANSWER_TOKENS, speech.stop_ids
        )
    except LatheError as error:
        yield Note(step, "generation", f"The held-out prompts could not be answered: {error.message}")
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        asked, text = speech.decode(prompt.tokens), speech.decode(answer)
        shown = asked if len(asked) <= _PROMPT_CHARACTERS else "…" + asked[-_PROMPT_CHARACTERS:]
        yield Note(
            step,
            "generation",
            f"After step {step}, line {prompt.line} of the validation file is answered: {text}",
            {"line": str(prompt.line), "prompt": shown, "text": text},
        )
