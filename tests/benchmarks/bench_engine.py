"""The engine beside a plain PEFT + transformers loop, at SmolLM2-135M's shape with random weights.

    python tests/benchmarks/bench_engine.py [--threads 2] [--skip-reference]

Both sides of training take turns, step by step, in one process: on a shared machine compare ratios, not figures.
Sampling has no reference here. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice, trained_tokens
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import choose_dtype, random_weights

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
LENGTHS = (92, 105, 99, 110, 88, 101, 97, 100)


def rows() -> tuple[TrainRow, ...]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 49152, (n,), generator=generator).tolist() for n in LENGTHS]
    return tuple(TrainRow(row, [i >= len(row) - 47 for i in range(len(row))]) for row in made)


def alternately(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn so that a change of the machine's load meets all of them alike.

    One round warms up. With one thread the CPU's time is taken, else the wall's.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if i:
                seconds[name].append(clock() - start)
    return seconds


def our_training(engine: Engine) -> Callable[[], object]:
    batch = rows()
    piece = TrainSlice("train", batch, CrossEntropy(sum(trained_tokens(row) for row in batch)))

    def step() -> None:
        engine.forward_backward([piece])
        engine.optim_step("train", 1e-4)

    return step


def reference_training() -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {k: v for k, v in CONFIG.items() if k != "architectures"}
    base = LlamaForCausalLM(LlamaConfig(**settings))
    model: Any = get_peft_model(
        base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch, width = rows(), max(LENGTHS)
    ids = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in batch])
    attention = torch.tensor([[1] * n + [0] * (width - n) for n in LENGTHS])
    chosen = torch.tensor([[*row.mask[1:], False, *[False] * (width - len(row.mask))] for row in batch])
    targets = torch.roll(ids, -1, 1)[chosen]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model.model(input_ids=ids, attention_mask=attention).last_hidden_state
            logits = model.model.lm_head(hidden[chosen])
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_sampling(
    engine: Engine, batch: int, keys: list[str], repeats: int, *, prompt: int = 128, new: int = 64
) -> dict[str, float]:
    """Output tokens a second with the prompts' computation, and without it."""
    generator = torch.Generator().manual_seed(1)
    best = {"with_prefill": 0.0, "decode": 0.0}
    for _ in range(repeats):
        prompts = [torch.randint(0, 49152, (prompt,), generator=generator).tolist() for _ in range(batch)]
        params = SamplingParams(max_tokens=new, temperature=0)
        states = [engine.open_sequence(keys[i % len(keys)], p, params) for i, p in enumerate(prompts)]
        start = time.perf_counter()
        while any(not state.tokens for state in states):
            engine.step([state for state in states if not state.tokens], prefill_tokens=1024)
        middle = time.perf_counter()
        first = sum(len(state.tokens) for state in states)
        while any(state.finished is None for state in states):
            engine.step(states)
        end = time.perf_counter()
        for state in states:
            engine.close_sequence(state)
        best["with_prefill"] = max(best["with_prefill"], batch * new / (end - start))
        best["decode"] = max(best["decode"], (batch * new - first) / (end - middle))
    return {name: round(value, 1) for name, value in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--skip-reference", action="store_true")
    parser.add_argument("--skip-sampling", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    spec = DecoderSpec.from_config(CONFIG)
    engine = Engine(
        Decoder(spec, random_weights(spec, device=device, dtype=choose_dtype(options.dtype, device)))
    )
    result: dict[str, Any] = {"threads": options.threads, "dtype": str(engine.dtype).removeprefix("torch.")}
    for i in range(8):
        engine.create_adapter(f"a{i}", LoraSpec(), seed=i)
    for batch in () if options.skip_sampling else (1, 8, 16):
        result[f"sample_base_{batch}"] = our_sampling(engine, batch, [""], options.repeats)
    for distinct in () if options.skip_sampling else (1, 4, 8):
        keys = [f"a{i}" for i in range(distinct)]
        result[f"sample_8_adapters_{distinct}"] = our_sampling(engine, 8, keys, options.repeats)
    for i in range(8):
        engine.drop_adapter(f"a{i}")
    engine.create_adapter("train", LoraSpec(), seed=0)
    runs = {"train": our_training(engine)}
    if not options.skip_reference:
        runs["reference"] = reference_training()
    seconds = alternately(runs, options.repeats)
    for name, times in seconds.items():
        ordered = sorted(times)
        result[f"{name}_tokens_per_s"] = {
            "best": round(sum(LENGTHS) / ordered[0], 1),
            "median": round(sum(LENGTHS) / statistics.median(ordered), 1),
        }
    if "reference" in seconds:
        pairs = [r / o for o, r in zip(seconds["train"], seconds["reference"], strict=True)]
        result["train_ratio"] = {
            "best": round(min(seconds["reference"]) / min(seconds["train"]), 2),
            "median_of_pairs": round(statistics.median(pairs), 2),
        }
    result["memory"] = {
        k: getattr(engine.memory(), k) >> 20
        for k in ("base_bytes", "adapter_bytes", "optimizer_bytes", "kv_bytes")
    }
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    for name, value in result.items():
        print(f"{name}: {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
