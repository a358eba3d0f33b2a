"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Cuts a stream of text before the first stop string, and holds back no more than could begin one.

    Where several stop strings end up in the text, the one that begins first wins, as if the whole text were
    searched after each piece.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stops = tuple(text for text in stop if text)
        self._held = ""
        self.stopped = False

    def push(self, delta: str) -> tuple[str, bool]:
        """The text that is safe to emit now, and whether a stop string was met (then nothing more comes)."""
        if self.stopped:
            return "", True
        text = self._held + delta
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when the sequence ended without a stop string."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, the whole of `stop` apart."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
