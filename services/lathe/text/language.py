"""The language of a text, by py3langid's naive Bayes model (Lui & Baldwin, langid.py, ACL 2012)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

UNKNOWN = "und"
"""ISO 639-2 for undetermined: too short, too little language in it, or the model is not sure."""

# The beginning tells it; the model's time grows with the text.
_CHARACTERS = 160
_LEAST_LETTERS = 30
_LEAST_CONFIDENCE = 0.5


def language_of(text: str) -> str:
    """ISO 639-1, or UNKNOWN."""
    begin = text[:_CHARACTERS]
    if sum(map(str.isalpha, begin)) < _LEAST_LETTERS:
        return UNKNOWN
    language, _ = _model().classify(begin)
    return str(language)


@lru_cache(maxsize=1)
def _model() -> Any:
    """Reading it takes a second, so it is read when first needed."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=_LEAST_CONFIDENCE)
