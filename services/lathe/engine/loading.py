"""An engine as its settings say."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from lathe.engine.engine import Engine
from lathe.engine.settings import EngineSettings

E = TypeVar("E", bound=Engine)


def load_engine(kind: type[E], settings: EngineSettings, folder: Path) -> E:
    """One of this kind, from a Hugging Face folder. Raises InvalidArgument."""
    return kind.load(
        folder,
        device=settings.device,
        dtype=settings.dtype,
        base_quantization=settings.base_quantization,
        threads=settings.model_threads(),
        kv_budget_bytes=settings.kv_budget_mb << 20,
    )
