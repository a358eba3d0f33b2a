"""Chat templates, tokenizers, rendering, the loss mask: shared by datasets, engine and gateway. No torch."""

from __future__ import annotations

VERSION = "5"
"""Version of the parsing, rendering and mask rules: raised whenever the same row could give other tokens,
or another finding."""
