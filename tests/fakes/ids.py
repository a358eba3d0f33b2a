"""Ids that count up, so that tests can name them."""

from __future__ import annotations

from collections import Counter

from lathe.common.ids import LENGTH, format_id


class FakeIds:
    """`new("ftjob")` gives `ftjob-000000000000000000000001`, then `…2`; each prefix counts by itself."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def new(self, prefix: str) -> str:
        self._counts[prefix] += 1
        return format_id(prefix, f"{self._counts[prefix]:0{LENGTH}d}")

    def token(self, length: int = 48) -> str:
        self._counts["token"] += 1
        return f"{self._counts['token']:0{length}d}"
