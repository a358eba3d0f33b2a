"""What an engine installs is enough for what nobody here imports by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[3] / "requirements"


@pytest.mark.parametrize("lock", ["engine.txt", "engine-image.txt"])
def test_a_gguf_file_can_be_loaded(lock: str) -> None:
    """transformers asks for accelerate and gguf only when it meets such a file: the quickstart's base is one."""
    names = set(re.findall(r"^([\w.-]+)==", (REQUIREMENTS / lock).read_text(), re.MULTILINE))
    assert {"transformers", "accelerate", "gguf"} <= names
