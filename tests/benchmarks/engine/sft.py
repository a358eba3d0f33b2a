"""Supervised LoRA beside TRL's SFTTrainer: tokens a second, peak memory, and the FLOP utilisation of ours.

TRL runs twice: at its best setting for a CPU like this one (bf16 autocast), and in fp32. Both without gradient
checkpointing, TRL's default, which only makes it slower here: the harder reference. All train the same rows in the
same order, and padding counts for nobody.

Utilisation: useful FLOP a second over the bf16 GEMM rate at the model's own shapes, measured before and after in our
process. Useful FLOP of a token: 4 for each parameter of the body (forward, and the gradient of the activations; a
frozen weight has no gradient of its own), 4 for each of the head where the position is trained, 6 for LoRA's, and
attention's two products thrice over the keys that a causal token sees.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from lathe.engine.batch import TrainRow, trained_tokens
from lathe.engine.lora_config import LoraSpec
from lathe.engine.spec import DecoderSpec
from tests.benchmarks.engine import model
from tests.benchmarks.engine.rounds import Result, Setting, Turns, alternate, clock, median_ratio, timed
from tests.benchmarks.engine.verbs import train_step

STEPS = 3  # of a round
LEARNING_RATE = 1e-4
GEMM_ROWS = 800  # the tokens of a batch


def measure(setting: Setting) -> dict[str, float]:
    here = "tests.benchmarks.engine.sft"
    results = alternate(
        {"ours": f"{here}:ours", "trl_best": f"{here}:trl_best", "trl_fp32": f"{here}:trl_fp32"}, setting
    )
    ours, best, plain = results["ours"], results["trl_best"], results["trl_fp32"]
    speeds = {name: one.speed("tokens") for name, one in results.items()}
    return {
        **{f"sft_{name}_tokens_per_s": statistics.median(values) for name, values in speeds.items()},
        **{f"sft_{name}_peak_mib": one.peak_mib for name, one in results.items()},
        **{f"sft_{name}_first_loss": one.rounds[0].figures["loss"] for name, one in results.items()},
        "sft_vs_trl_best": median_ratio(speeds["ours"], speeds["trl_best"]),
        "sft_vs_trl_fp32": median_ratio(speeds["ours"], speeds["trl_fp32"]),
        "sft_memory_vs_trl_best": ours.peak_mib / best.peak_mib,
        "sft_memory_vs_trl_fp32": ours.peak_mib / plain.peak_mib,
        **utilisation(ours),
    }


def utilisation(ours: Result) -> dict[str, float]:
    """mfu: the median over rounds of useful FLOP/s over the GEMM rate around that round."""
    shares = [row.figures["flop"] / row.seconds / row.figures["gemm_flop_per_s"] for row in ours.warm]
    return {
        "mfu": statistics.median(shares),
        "gemm_gflop_per_s": statistics.median(row.figures["gemm_flop_per_s"] for row in ours.warm) / 1e9,
        "mflop_per_token": statistics.median(row.figures["flop"] / row.figures["tokens"] for row in ours.warm)
        / 1e6,
    }


def batches(setting: Setting) -> list[list[TrainRow]]:
    rows = model.chat_rows(setting.folder, model.BATCH * STEPS)
    return [rows[i : i + model.BATCH] for i in range(0, len(rows), model.BATCH)]


def ours(setting: Setting, turns: Turns) -> None:
    engine = model.load_engine(setting)
    engine.create_adapter("train", LoraSpec(r=model.RANK, lora_alpha=model.ALPHA), seed=0)
    work = batches(setting)
    tokens = sum(len(row.tokens) for batch in work for row in batch)
    flop = sum(useful_flop(engine.spec, LoraSpec(r=model.RANK), row) for batch in work for row in batch)
    gemm = gemm_rate(engine.spec, engine.dtype, setting.threads)
    while turns.wait():
        began = clock(setting.threads)
        losses = [train_step(engine, "train", batch, LEARNING_RATE) for batch in work]
        seconds = clock(setting.threads) - began
        before, gemm = gemm, gemm_rate(engine.spec, engine.dtype, setting.threads)
        turns.report(
            seconds=seconds, tokens=tokens, loss=losses[0], flop=flop, gemm_flop_per_s=(before + gemm) / 2
        )


def useful_flop(spec: DecoderSpec, lora: LoraSpec, row: TrainRow) -> float:
    """Of one row's training pass (see the module's text)."""
    n = len(row.tokens)
    sizes = [(shape.in_features, shape.out_stop - shape.out_start) for shape in spec.module_shapes()]
    body = spec.layers * sum(a * b for a, b in sizes)
    thin = spec.layers * sum(lora.r * (a + b) for a, b in sizes)
    seen = n * (n + 1) / 2
    attention = spec.layers * 3 * 2 * 2 * spec.q_size * seen
    return (
        4.0 * body * n
        + 4.0 * spec.hidden_size * spec.vocab_size * trained_tokens(row)
        + 6.0 * thin * n
        + attention
    )


def gemm_rate(spec: DecoderSpec, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of plain products at the shapes of a layer's four fused linears, each with weights of several layers."""
    hidden, inter = spec.hidden_size, spec.intermediate_size
    shapes = [
        (hidden, spec.q_size + 2 * spec.kv_size),
        (spec.q_size, hidden),
        (hidden, 2 * inter),
        (inter, hidden),
    ]
    flop, seconds = 0.0, 0.0
    with torch.inference_mode():
        for a, b in shapes:
            x, weights = torch.randn(GEMM_ROWS, a).to(dtype), [torch.randn(a, b).to(dtype) for _ in range(4)]
            times = [timed(threads, lambda w=w: torch.mm(x, w)) for w in weights * 3]  # type: ignore[misc]  # noqa: B023
            flop += 2.0 * GEMM_ROWS * a * b
            seconds += statistics.median(times[len(weights) :])
    return flop / seconds


def trl_best(setting: Setting, turns: Turns) -> None:
    _trl(setting, turns, bf16=True)


def trl_fp32(setting: Setting, turns: Turns) -> None:
    _trl(setting, turns, bf16=False)


def _trl(setting: Setting, turns: Turns, *, bf16: bool) -> None:
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(setting.threads)
    rows = [row for batch in batches(setting) for row in batch]
    losses: list[float] = []

    class RoundByRound(TrainerCallback):  # type: ignore[misc]
        """Holds the trainer between two rounds."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.go(control)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            if logs is not None and "loss" in logs:
                losses.append(float(logs["loss"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % STEPS == 0:
                turns.report(tokens=sum(len(row.tokens) for row in rows), loss=losses[0] if losses else 0.0)
                self.go(control)

        def go(self, control: Any) -> None:
            if not turns.wait():
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(setting.folder),
            args=SFTConfig(
                output_dir=folder, per_device_train_batch_size=model.BATCH, max_steps=1_000_000, use_cpu=True,
                bf16=bf16, gradient_checkpointing=False, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
                logging_steps=1, save_strategy="no", report_to="none", train_sampling_strategy="sequential",
                disable_tqdm=True, seed=0,
            ),
            train_dataset=Dataset.from_list([{"input_ids": list(row.tokens), "labels": _labels(row)} for row in rows]),
            peft_config=LoraConfig(
                r=model.RANK, lora_alpha=model.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[RoundByRound()],
        )  # fmt: skip
        trainer.train()


def _labels(row: TrainRow) -> list[int]:
    return [token if kept else -100 for token, kept in zip(row.tokens, row.mask, strict=True)]
