"""Adapters in sampling: r=16 on all linear layers, batch 8, on 8 distinct ones and on one, beside our own base, and
beside PEFT's mixed batch (`adapter_names`).

The three of ours run in one process, in turn. Beside the ratios: how many milliseconds a decode step takes longer, and
how long the adapters' bytes alone take to read at the bandwidth measured there.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch

from lathe.engine.lora_config import LoraSpec
from tests.benchmarks.engine import model
from tests.benchmarks.engine.rounds import Setting, Turns, alternate, median_ratio, timed
from tests.benchmarks.engine.sampling import NEW, hf_generate, sample

DISTINCT = 8
KEYS = {
    "base": [""] * model.BATCH,
    "one": ["a0"] * model.BATCH,
    "eight": [f"a{i % DISTINCT}" for i in range(model.BATCH)],
}


def measure(setting: Setting) -> dict[str, float]:
    here = "tests.benchmarks.engine.adapters"
    results = alternate({"ours": f"{here}:ours", "peft": f"{here}:peft"}, setting)
    warm = results["ours"].warm
    seconds = {name: [row.figures[f"{name}_s"] for row in warm] for name in KEYS}
    bandwidth = statistics.median(row.figures["bytes_per_s"] for row in warm)
    peft = [row.seconds for row in results["peft"].warm]
    tokens = model.BATCH * NEW
    figures = {
        f"adapters_{name}_tokens_per_s": tokens / statistics.median(row) for name, row in seconds.items()
    }
    for name, count in (("one", 1), ("eight", DISTINCT)):
        extra = statistics.median(a - b for a, b in zip(seconds[name], seconds["base"], strict=True)) / NEW
        figures[f"adapters_{name}_extra_ms_a_step"] = extra * 1e3
        figures[f"adapters_{name}_read_ms"] = count * warm[0].figures["adapter_bytes"] / bandwidth * 1e3
    return {
        **figures,
        "adapters_peft_tokens_per_s": tokens / statistics.median(peft),
        "read_gb_per_s": bandwidth / 1e9,
        "adapters8_vs_base": median_ratio(seconds["base"], seconds["eight"]),
        "adapter1_vs_base": median_ratio(seconds["base"], seconds["one"]),
        "adapters8_vs_peft": median_ratio(peft, seconds["eight"]),
    }


def ours(setting: Setting, turns: Turns) -> None:
    engine = model.load_engine(setting)
    for i in range(DISTINCT):
        engine.create_adapter(f"a{i}", LoraSpec(r=model.RANK, lora_alpha=model.ALPHA), seed=i)
    size = engine.memory().adapter_bytes / DISTINCT / 3  # of a trainable adapter's bytes a third are in bf16
    number = 0
    while turns.wait():
        figures: dict[str, float] = {}
        for name, keys in KEYS.items():
            number += 1
            figures[f"{name}_s"] = timed(
                setting.threads, lambda keys=keys, seed=number: sample(engine, keys, seed=seed)
            )  # type: ignore[misc]
        turns.report(**figures, bytes_per_s=read_rate(), adapter_bytes=size)


def read_rate() -> float:
    """Bytes a second that a sum over 256 MiB reads: the best of five."""
    data = torch.ones(2**25, dtype=torch.int64)
    return data.nbytes / min(timed(2, data.sum) for _ in range(5))


def peft(setting: Setting, turns: Turns) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory() as name:
        folders = _saved_adapters(setting, Path(name))
        base = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.bfloat16)
        mixed = PeftModel.from_pretrained(base, folders[0], adapter_name="a0")
        for i, folder in enumerate(folders[1:], 1):
            mixed.load_adapter(folder, adapter_name=f"a{i}")
    mixed = mixed.to(torch.bfloat16).eval()
    number = 0
    while turns.wait():
        number += 1
        turns.report(tokens=hf_generate(mixed, number, adapter_names=KEYS["eight"]))


def _saved_adapters(setting: Setting, folder: Path) -> list[str]:
    engine = model.load_engine(setting)
    for i in range(DISTINCT):
        engine.create_adapter(f"a{i}", LoraSpec(r=model.RANK, lora_alpha=model.ALPHA), seed=i)
        engine.save(f"a{i}", folder / f"a{i}", with_optimizer=False)
    return [str(folder / f"a{i}") for i in range(DISTINCT)]
