"""Chat templates, tokenizers, rendering and the loss mask; datasets, engine and gateway share it. No torch."""

from __future__ import annotations

VERSION = "1"
"""Version of the parsing, rendering and mask rules: raise it whenever the same row could give other tokens."""
