"""Fused equals solo: four jobs that share passes compute what each computes alone on its engine.

In float64 the losses and gradients of every step and the final weights are equal to 1e-10. In bfloat16 a product's
rounding may depend on how many tokens the pass has. The bound there: fusing moves a job by no more than bfloat16 has
moved it already. Losses, gradients and final weights of the fused run lie at most twice as far from the solo run as
that one lies from the same run in float64 (two independent roundings of one number lie sqrt(2) apart).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lathe.engine.base import Decoder
from lathe.engine.batch import SliceResult, TrainRow, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.model import AttemptEvent, Ended, SlicePlan, Snapshot, StepMetrics, TrainingConfig
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.sft import SupervisedRecipe
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import random_weights
from tests.fakes.clock import FakeClock

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# Different ranks, modules, rates, seeds and batch sizes; DoRA, dropout, embeddings and head among them.
JOBS = {
    "a": TrainingConfig(2, 1, 3e-2, 1, lora_r=2, target_modules=("q_proj", "v_proj")),
    "b": TrainingConfig(2, 3, 1e-2, 2, lora_r=4, target_modules=("all-linear",), use_dora=True),
    "c": TrainingConfig(
        2, 2, 2e-2, 3, lora_r=8, lora_alpha=8, target_modules=("o_proj", "down_proj"), lora_dropout=0.2
    ),
    "d": TrainingConfig(
        2, 4, 5e-3, 4, lora_r=16, target_modules=("gate_proj", "lm_head", "embed_tokens"), use_rslora=True
    ),
}
# One shape, as small jobs mostly have: they go through batched products.
ALIKE = {
    name: TrainingConfig(2, 1, rate, seed, lora_r=4, target_modules=("all-linear",))
    for seed, (name, rate) in enumerate({"p": 3e-2, "q": 1e-2, "r": 2e-2, "s": 5e-3}.items())
}
# A rate that no loss survives.
BROKEN = TrainingConfig(2, 1, 1e308, 5, lora_r=16, target_modules=("lm_head",))
SLICE_TOKENS = 40


class RecordingEngine(Engine):
    """Keeps each adapter's gradient at each step, and how many adapters each pass had."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.joined: list[int] = []
        self.errors: dict[str, str] = {}
        self.gradients: dict[str, list[Tensor]] = {}

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        self.joined.append(len(pieces))
        return super().forward_backward(pieces)

    def optim_step(self, key: str, lr: float, *, clip: float = 1.0, weight_decay: float = 0.0) -> float:
        gradients = self._held[key].adapter.gradients
        assert gradients is not None
        self.gradients.setdefault(key, []).append(gradients.clone())
        return super().optim_step(key, lr, clip=clip, weight_decay=weight_decay)


@dataclass(frozen=True)
class Outcome:
    """A job's losses and its gradients' and final weights' numbers, in float64."""

    losses: Tensor
    gradients: list[Tensor]
    weights: Tensor


def engine_of(dtype: torch.dtype) -> RecordingEngine:
    spec = DecoderSpec.from_config(CONFIG)
    weights = random_weights(spec, device=torch.device("cpu"), dtype=dtype, std=0.2)
    return RecordingEngine(Decoder(spec, weights))


def rows_of(name: str) -> list[TrainRow]:
    seed = ord(name[0])
    lengths = [5 + (7 * i * seed) % 19 for i in range(4)]
    if name in ALIKE:
        lengths = [14 + (i * seed) % 4 for i in range(4)]
    return [
        TrainRow(
            [(seed * (i + 1) + 11 * j * j) % 96 for j in range(length)],
            [j >= 2 and (i + j) % 4 != 0 for j in range(length)],
            line=i + 1,
        )
        for i, length in enumerate(lengths)
    ]


def trained(
    names: Sequence[str], dtype: torch.dtype, folder: Path
) -> tuple[dict[str, Outcome], RecordingEngine]:
    """The jobs on one engine, through the loop, to their ends. A failed one's error is in `engine.errors`."""
    engine, clock = engine_of(dtype), FakeClock()
    loop = ModelLoop(engine, clock, LoopLimits(fused_tokens=4 * SLICE_TOKENS))
    events: dict[str, list[AttemptEvent]] = {name: [] for name in names}
    for name in names:
        run = Run(
            SupervisedRecipe,
            engine=engine,
            key=name,
            data=TrainData(rows_of(name)),
            config={**JOBS, **ALIKE}.get(name, BROKEN),
            plan=SlicePlan(SLICE_TOKENS, 1, str(dtype), "cpu"),
            folder=lambda kind, step, name=name: folder / f"{name}-{kind}-{step}",
            clock=clock,
        )
        loop.start(name, run, events[name].append)
    while loop.run_once():
        pass
    outcomes = {}
    for name, said in events.items():
        end = said[-1]
        assert isinstance(end, Ended)
        if end.error is not None:
            engine.errors[name] = end.error.message
            continue
        final = [event for event in said if isinstance(event, Snapshot)][-1]
        tensors = load_file(final.folder / "adapter_model.safetensors")
        outcomes[name] = Outcome(
            torch.tensor(
                [event.train_loss for event in said if isinstance(event, StepMetrics)], dtype=torch.float64
            ),
            [gradient.double() for gradient in engine.gradients[name]],
            torch.cat([tensors[key].double().flatten() for key in sorted(tensors)]),
        )
    return outcomes, engine


def distances(a: Outcome, b: Outcome) -> tuple[float, float, float]:
    """Of losses, of the first step's gradients (later ones have other weights), of final weights; relative to b."""
    pairs = ((a.losses, b.losses), (a.gradients[0], b.gradients[0]), (a.weights, b.weights))
    losses, gradients, weights = (float((x - y).norm() / y.norm()) for x, y in pairs)
    return losses, gradients, weights


@pytest.mark.parametrize("names", [list(JOBS), list(ALIKE)], ids=["mixed", "alike"])
def test_in_float64_every_number_is_equal(tmp_path: Path, names: list[str]) -> None:
    fused, engine = trained(names, torch.float64, tmp_path / "fused")
    assert max(engine.joined) == 4
    for name in names:
        alone, engine = trained([name], torch.float64, tmp_path / "alone")
        assert set(engine.joined) == {1}
        torch.testing.assert_close(fused[name].losses, alone[name].losses, rtol=1e-10, atol=0)
        for ours, theirs in zip(fused[name].gradients, alone[name].gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(fused[name].weights, alone[name].weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("names", [list(JOBS), list(ALIKE)], ids=["mixed", "alike"])
def test_in_bfloat16_fusing_moves_a_job_no_further_than_rounding_did(
    tmp_path: Path, names: list[str]
) -> None:
    fused, _ = trained(names, torch.bfloat16, tmp_path / "fused")
    for name in names:
        alone, _ = trained([name], torch.bfloat16, tmp_path / "alone")
        exact, _ = trained([name], torch.float64, tmp_path / "exact")
        moved, rounded = distances(fused[name], alone[name]), distances(alone[name], exact[name])
        assert all(ours <= 2 * bound for ours, bound in zip(moved, rounded, strict=True)), (
            name,
            moved,
            rounded,
        )


def test_a_job_whose_loss_is_no_number_takes_nobody_along(tmp_path: Path) -> None:
    fused, engine = trained(["nan", "a", "c"], torch.float64, tmp_path / "fused")
    assert max(engine.joined) == 3
    assert set(engine.errors) == {"nan"}
    assert "not a number any more at step 2 of 8; look at lines" in engine.errors["nan"]
    for name in ("a", "c"):
        alone, _ = trained([name], torch.float64, tmp_path / "alone")
        torch.testing.assert_close(fused[name].weights, alone[name].weights, rtol=1e-10, atol=1e-10)
