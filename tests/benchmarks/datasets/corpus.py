"""The files that are measured with: chat rows of 1 to 2 kB, of invented words, the same on every machine."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_WORDS = 5000


@dataclass(frozen=True, slots=True)
class Setting:
    """What every measure is given. data: where files are kept between runs. megabytes: of a file read for a rate."""

    data: Path
    rounds: int
    megabytes: int


def chat_file(setting: Setting, megabytes: int) -> Path:
    """A training file of this size (10^6 bytes each), written the first time."""
    path = setting.data / f"chat-{megabytes}mb.jsonl"
    if not path.is_file():
        setting.data.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        left = megabytes * 1_000_000
        with part.open("wb") as file:
            for line in chat_lines():
                file.write(line)
                left -= len(line)
                if left <= 0:
                    break
        part.replace(path)
    return path


def chat_lines(seed: int = 0) -> Iterator[bytes]:
    """Endless rows: a system message, one or two exchanges, some quotes, line breaks and letters beyond ASCII."""
    chance = random.Random(seed)
    letters = "aaabcdeeefghiiklmnnooprsttuuvwzéß"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(_WORDS)]

    def text(length: int) -> str:
        drawn = chance.choices(words, k=length)
        drawn[length // 2] = f'"{drawn[length // 2]}"\n'
        return " ".join(drawn)

    while True:
        turns = chance.randint(1, 2)
        messages = [{"role": "system", "content": text(12)}]
        for _ in range(turns):
            messages += [
                {"role": "user", "content": text(chance.randint(20, 90) // turns)},
                {"role": "assistant", "content": text(chance.randint(90, 180) // turns)},
            ]
        yield json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
