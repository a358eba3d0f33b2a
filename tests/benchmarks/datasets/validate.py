"""Parse and validate a training file: Lathe's validator, the OpenAI cookbook's checker, Hugging Face's `datasets`.

CPU seconds of one process, so that another's load counts little; `datasets` is given one process too.
validate_mb_s: 10^6 bytes a second, the median round. validate_vs_…: the median over the rounds of the ratio of rates.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from lathe.text.jsonl import Validator
from tests.benchmarks.datasets.corpus import Setting, chat_file

_CHUNK = 1 << 20


def measure(setting: Setting) -> dict[str, float]:
    path = chat_file(setting, setting.megabytes)
    contenders: dict[str, Callable[[Path], int]] = {
        "lathe": validated,
        "cookbook": checked_as_in_the_cookbook,
        "hf_datasets": loaded_by_hf_datasets,
    }
    rates: dict[str, list[float]] = defaultdict(list)
    counts = {name: contender(path) for name, contender in contenders.items()}
    assert len(set(counts.values())) == 1, f"the contenders read different files: {counts}"
    for _ in range(setting.rounds):
        for name, contender in contenders.items():
            gc.collect()
            began = time.process_time()
            contender(path)
            rates[name].append(path.stat().st_size / 1e6 / (time.process_time() - began))
    figures = {"validate_mb_s": statistics.median(rates["lathe"])}
    for name in ("cookbook", "hf_datasets"):
        figures[f"{name}_mb_s"] = statistics.median(rates[name])
        pairs = zip(rates["lathe"], rates[name], strict=True)
        figures[f"validate_vs_{name}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return figures


def validated(path: Path) -> int:
    """Rows of a good file."""
    validator = Validator()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            validator.feed(chunk)
    report = validator.finish()
    assert report.valid, report.findings
    return report.examples


def checked_as_in_the_cookbook(path: Path) -> int:
    """OpenAI cookbook, "Data preparation and analysis for chat model fine-tuning": its format checks as published."""
    with path.open(encoding="utf-8") as file:
        dataset = [json.loads(line) for line in file]
    format_errors: dict[str, int] = defaultdict(int)
    for ex in dataset:
        if not isinstance(ex, dict):
            format_errors["data_type"] += 1
            continue
        messages = ex.get("messages", None)
        if not messages:
            format_errors["missing_messages_list"] += 1
            continue
        for message in messages:
            if "role" not in message or "content" not in message:
                format_errors["message_missing_key"] += 1
            if any(k not in ("role", "content", "name", "function_call", "weight") for k in message):
                format_errors["message_unrecognized_key"] += 1
            if message.get("role", None) not in ("system", "user", "assistant", "function"):
                format_errors["unrecognized_role"] += 1
            content = message.get("content", None)
            function_call = message.get("function_call", None)
            if (not content and not function_call) or not isinstance(content, str):
                format_errors["missing_content"] += 1
        if not any(message.get("role", None) == "assistant" for message in messages):
            format_errors["example_missing_assistant_message"] += 1
    assert not format_errors, format_errors
    return len(dataset)


def loaded_by_hf_datasets(path: Path) -> int:
    """`load_dataset("json")` into an empty cache: parsed and written as Arrow, nothing checked."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        loaded = datasets.load_dataset("json", data_files=str(path), cache_dir=cache, split="train")
        return len(loaded)
