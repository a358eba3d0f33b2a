"""Rows as TRL names them: `prompt`, `completion`, `chosen`, `rejected`, `label`; each as texts (TRL's standard form) or
as lists of messages (its conversational form).

Without a `prompt`, `chosen` and `rejected` begin with it: it is what both have in common at their beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from os.path import commonprefix
from typing import Any

from lathe.text.chat import Chat, Message
from lathe.text.decoding import check_depth
from lathe.text.errors import RowError
from lathe.text.formats import Layout, Role, RowFormat
from lathe.text.openai_rows import reinforcement, verdict
from lathe.text.parts import (
    TOOL_KEYS,
    Part,
    Plain,
    TrainingRow,
    answered,
    check_answer,
    check_different,
    check_outcomes,
    check_prompt,
    one_answer,
    pair,
    text_of,
    unused_keys,
    unweighted,
)

_NAMES = ("chosen", "rejected")
_HH_ANSWER = "\n\nAssistant:"


def prompted_row(data: Mapping[str, Any]) -> TrainingRow:
    """`prompt` and `completion`; a prompt alone is one for reinforcement."""
    if "completions" in data:
        raise RowError(
            "completions",
            "unsupported_format",
            "rows with a label for each step are for process reward models, which no method trains",
        )
    if "completion" not in data and isinstance(data.get("prompt"), list | str):
        return _prompt_only(data)
    unused = unused_keys(data, {"prompt", "completion", *TOOL_KEYS})
    return TrainingRow(RowFormat.COMPLETION, (Part(Role.EXAMPLE, _prompted(data)),), Layout.TRL, None, unused)


def _prompt_only(data: Mapping[str, Any]) -> TrainingRow:
    if isinstance(data["prompt"], list):
        free = {key: value for key, value in data.items() if key != "prompt" and key not in TOOL_KEYS}
        return reinforcement(unweighted(data["prompt"], "prompt"), "prompt", free, data, Layout.TRL)
    # Beside a text an `answer` or `output` is rather what was meant to be trained.
    free = {key: data[key] for key in unused_keys(data, {"prompt", "completion"})}
    check_depth(free, "")
    part = Part(Role.EXAMPLE, Plain(text_of(data, "prompt"), ""))
    return TrainingRow(RowFormat.REINFORCEMENT, (part,), Layout.TRL, free)


def labelled_row(data: Mapping[str, Any]) -> TrainingRow:
    """`prompt`, `completion` and whether it is a good one."""
    role = verdict(data)
    unused = unused_keys(data, {"prompt", "completion", "label", *TOOL_KEYS})
    part = Part(role, _prompted(data))
    return TrainingRow(RowFormat.UNPAIRED_PREFERENCE, (part,), Layout.TRL, None, unused)


def _prompted(data: Mapping[str, Any]) -> Chat | Plain:
    if not isinstance(data.get("prompt"), list):
        _refuse_tools(data)
        return Plain(text_of(data, "prompt", optional=True), text_of(data, "completion"))
    prompt = unweighted(data["prompt"], "prompt")
    check_prompt(prompt, "prompt")
    return answered(prompt, one_answer(data.get("completion"), "completion"), data)


def _refuse_tools(data: Mapping[str, Any]) -> None:
    for key in data.keys() & TOOL_KEYS:
        if data[key] is not None:
            raise RowError(key, "invalid_tools", "only a prompt that is a list of messages can have tools")


def pair_row(data: Mapping[str, Any]) -> TrainingRow:
    """`chosen` and `rejected`, with a `prompt` or beginning with it."""
    unused = unused_keys(data, {"prompt", *_NAMES, *TOOL_KEYS}, repeated=_repeated(data))
    check_outcomes(data)
    texts = [isinstance(data[name], str) for name in _NAMES]
    if texts[0] != texts[1]:
        raise RowError(
            "rejected", "data_type", "must be what chosen is: a text like it, or a list of messages"
        )
    chosen, rejected = _texts(data) if texts[0] else _conversations(data)
    if isinstance(chosen, Chat) and isinstance(prompt := data.get("prompt"), str):
        # Where they have a prompt of their own, it mostly is a message of theirs.
        repeated_by = {message.get("content") for message in chosen.messages}
        unused = unused if prompt in repeated_by else (*unused, "prompt")
    return pair(chosen, rejected, Layout.TRL, unused)


def _repeated(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys under which a row says its conversations again, as published sets do: whole, for supervised tuning, or
    what one of their messages says."""
    chosen = data.get("chosen")
    if not isinstance(chosen, list):
        return ()
    said = [turn.get("content") for turn in chosen if isinstance(turn, dict)]
    return ("messages", *(key for key, value in data.items() if isinstance(value, str) and value in said))


def _texts(data: Mapping[str, Any]) -> tuple[Chat, Chat] | tuple[Plain, Plain]:
    chosen, rejected = text_of(data, "chosen"), text_of(data, "rejected")
    check_different(chosen, rejected, _NAMES)
    prompt = data.get("prompt")
    if isinstance(prompt, list):
        turns = unweighted(prompt, "prompt")
        check_prompt(turns, "prompt")
        first, second = ({"role": "assistant", "content": text} for text in (chosen, rejected))
        return answered(turns, first, data), answered(turns, second, data)
    _refuse_tools(data)
    if prompt is not None:
        given = text_of(data, "prompt", optional=True)
        return Plain(given, chosen), Plain(given, rejected)
    edge = _edge(chosen, rejected)
    if edge in (len(chosen), len(rejected)):
        raise RowError("rejected", "missing_output", "one output is but the beginning of the other")
    return Plain(chosen[:edge], chosen[edge:]), Plain(rejected[:edge], rejected[edge:])


def _edge(chosen: str, rejected: str) -> int:
    """Where the common prompt of two texts ends: behind the last turn's heading if they are transcripts of Anthropic's
    HH-RLHF, else before the first difference and the space before it (TRL's extract_prompt)."""
    common = commonprefix([chosen, rejected])  # noqa: RUF071 (of texts, not of paths)
    heading = common.rfind(_HH_ANSWER)
    if heading >= 0:
        return heading + len(_HH_ANSWER)
    return len(common) - common.endswith(" ")


def _conversations(data: Mapping[str, Any]) -> tuple[Chat, Chat]:
    chosen, rejected = (unweighted(data[name], name) for name in _NAMES)
    check_different(chosen, rejected, _NAMES)
    prompt, path = _prompt_of(data, chosen, rejected)
    check_prompt(prompt, path)
    ends = []
    for name, turns in zip(_NAMES, (chosen, rejected), strict=True):
        rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
        check_answer(rest, name)
        ends.append(answered(prompt, rest[0], data))
    return ends[0], ends[1]


def _prompt_of(
    data: Mapping[str, Any], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], str]:
    """The prompt of two conversations and where it stands."""
    prompt = data.get("prompt")
    if isinstance(prompt, list):
        return unweighted(prompt, "prompt"), "prompt"
    if prompt is not None and len(chosen) == 1:
        return [{"role": "user", "content": text_of(data, "prompt")}], "prompt"
    common = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        common += 1
    return chosen[:common], "chosen"
