"""A line of a training file, in any of the layouts that are known (docs/data.md), as the texts that a model reads."""

from __future__ import annotations

from collections.abc import KeysView, Mapping
from typing import Any

from lathe.text.decoding import decode_json, type_name
from lathe.text.errors import RowError
from lathe.text.formats import Layout, Role, RowFormat
from lathe.text.instruction_rows import (
    ANSWER_KEYS,
    CONVERSATION_KEYS,
    QUESTION_KEYS,
    alpaca_row,
    compared_row,
    question_row,
    sharegpt_row,
)
from lathe.text.openai_rows import NON_PREFERRED, PREFERRED, chat_row, labelled_messages_row, preference_row
from lathe.text.parts import Part, Plain, TrainingRow, text_of, unused_keys
from lathe.text.sentence_rows import sentence_row
from lathe.text.trl_rows import labelled_row, pair_row, prompted_row

__all__ = ["Part", "Plain", "TrainingRow", "parse_line", "parse_row"]

_CONVERSATIONS = frozenset(CONVERSATION_KEYS)
_OUTCOMES = frozenset({"chosen", "rejected"})
_PREFERENCE = frozenset({"input", *PREFERRED, *NON_PREFERRED})
_QUESTIONS = frozenset(QUESTION_KEYS)
_ASKED = _QUESTIONS | {"instruction"}
_ANSWERS = frozenset(ANSWER_KEYS)
_PROMPTED = frozenset({"prompt", "completion"})


def parse_line(line: bytes) -> TrainingRow:
    """Parses one line of a training file, in the layout that its keys say.

    Raises RowError, which names the field and the code.
    """
    return parse_row(decode_json(line))


def parse_row(data: object) -> TrainingRow:
    """The same for a row that is decoded already, as decode_json does it. Raises RowError."""
    if not isinstance(data, dict):
        raise RowError("", "data_type", f"a line must be one JSON object, not {type_name(data)}")
    if _has(data, _CONVERSATIONS):
        return sharegpt_row(data)
    if _has(data, _OUTCOMES):
        return compared_row(data) if _answers_a_question(data) else pair_row(data)
    if "label" in data:
        return _labelled(data)
    if data.get("messages") is not None:
        return chat_row(data)
    return _other(data)


def _has(data: Mapping[str, Any], names: frozenset[str]) -> bool:
    """Whether one of these keys says something: sets that were joined have the keys of both, null where they were not
    known."""
    return not data.keys().isdisjoint(names) and any(data.get(name) is not None for name in names)


def _answers_a_question(data: Mapping[str, Any]) -> bool:
    """Whether the better answer is a text whose prompt stands under other names than TRL's."""
    asked = data.get("prompt") is None and _has(data, _ASKED)
    return asked and isinstance(data.get("chosen"), str)


def _labelled(data: Mapping[str, Any]) -> TrainingRow:
    if "messages" not in data:
        if not data.keys().isdisjoint(_PROMPTED):
            return labelled_row(data)
        found = sentence_row(data)
        if found is not None:
            return found
    return labelled_messages_row(data)


def _other(data: Mapping[str, Any]) -> TrainingRow:
    found = sentence_row(data)
    if found is not None:
        return found
    if data.get("instruction") is not None:
        return alpaca_row(data)
    if _has(data, _PREFERENCE):
        return preference_row(data)
    if _is_question(data.keys()):
        return question_row(data)
    if _has(data, _PROMPTED):
        return prompted_row(data)
    if "text" not in data:
        raise _unknown(data)
    part = Part(Role.EXAMPLE, Plain("", text_of(data, "text")))
    return TrainingRow(RowFormat.TEXT, (part,), Layout.TEXT, None, unused_keys(data, {"text"}))


def _is_question(keys: KeysView[str]) -> bool:
    if "prompt" in keys:
        return "response" in keys and "completion" not in keys
    return not keys.isdisjoint(_QUESTIONS) and not keys.isdisjoint(_ANSWERS)


def _unknown(data: Mapping[str, Any]) -> RowError:
    named = [repr(key[:40]) + " (null)" * (value is None) for key, value in list(data.items())[:10]]
    keys = ", ".join(named) or "none"
    return RowError(
        "messages",
        "missing_messages_list",
        f"the row has no list of messages, and its keys ({keys}) are those of no other format; docs/data.md shows "
        "them all. A mapping of columns can rename keys",
    )
