"""Errors in the words of a door: gRPC's path of a field is a name of OpenAI's over HTTP, an option of a command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from lathe.common.errors import FieldViolation, LatheError

E = TypeVar("E", bound=LatheError)
# (path, what a door calls it) each; the first that fits is taken.
Renames = Sequence[tuple[str, str]]


def renamed(error: E, renames: Renames) -> E:
    """The same error with every field path replaced, in its message and its violations."""
    # Some subclasses are built from other arguments than these attributes.
    changed = type(error).__new__(type(error))
    changed.__dict__.update(error.__dict__)
    changed.args = error.args
    changed.violations = tuple(
        FieldViolation(_renamed_path(item.field, renames), renamed_text(item.description, renames))
        for item in error.violations
    )
    changed.message = renamed_text(error.message, renames)
    return changed


def renamed_text(text: str, renames: Renames) -> str:
    """A text with every field path in it replaced."""
    for old, new in renames:
        text = re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", new, text)
    return text


def _renamed_path(path: str, renames: Renames) -> str:
    for old, new in renames:
        if path == old or path.startswith((f"{old}.", f"{old}[")):
            return new + path[len(old) :]
    return path
