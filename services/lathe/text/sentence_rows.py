"""Texts for an encoder, under the names of the sentence-transformers library and of the sets it is trained on.

They are recognised and stored; no method trains on them yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lathe.text.decoding import type_name
from lathe.text.errors import RowError
from lathe.text.formats import Layout, Role, RowFormat
from lathe.text.parts import Part, Plain, TrainingRow, text_of, unused_keys

_ANCHORS = (("anchor", "positive"), ("query", "positive"))
_SIDES = (
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
)
_SCORES = ("score", "label", "similarity")
_LABELLED = ("text", "sentence")


def sentence_row(data: Mapping[str, Any]) -> TrainingRow | None:
    """The row, if it is one for an encoder; None if not. Raises RowError."""
    for names in _ANCHORS:
        if data.keys() >= set(names):
            negative = ("negative",) if "negative" in data else ()
            found = RowFormat.TRIPLET if negative else RowFormat.PAIR
            return _row(data, found, (*names, *negative), None)
    for names in _SIDES:
        if data.keys() >= set(names):
            score = next((name for name in _SCORES if name in data), None)
            return _row(data, RowFormat.SCORED_PAIR if score else RowFormat.PAIR, names, score)
    name = next((name for name in _LABELLED if name in data), None)
    return _row(data, RowFormat.LABELLED_TEXT, (name,), "label") if name and "label" in data else None


def _row(data: Mapping[str, Any], found: RowFormat, names: tuple[str, ...], label: str | None) -> TrainingRow:
    unused = unused_keys(data, (*names, label) if label else names)
    parts = tuple(Part(Role.EXAMPLE, Plain("", text_of(data, name))) for name in names)
    extra = {"label": _label(data, label)} if label else None
    return TrainingRow(found, parts, Layout.SENTENCES, extra, unused)


def _label(data: Mapping[str, Any], name: str) -> object:
    value = data[name]
    if not isinstance(value, str | int | float) or value == "":
        raise RowError(name, "invalid_label", f"must be a number or a text, not {type_name(value)}")
    return value
