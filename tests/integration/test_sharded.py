"""FSDP2 between two processes over gloo: the numbers of one worker, with half of the base on each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice
from lathe.engine.distributed.ranks import RankEngine
from lathe.engine.distributed.sharded import ShardedLinear
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from tests.fixtures.rank_process import TwoRanks, two_ranks
from tests.fixtures.tiny_families import build_tiny

BOUND = 1e-5
STEPS = 4
SPECS = {
    "llama-biases": LoraSpec(r=4, target_modules=("q_proj", "v_proj", "down_proj")),
    "gemma3": LoraSpec(r=4, target_modules=("q_proj", "gate_proj", "embed_tokens", "lm_head")),
    "qwen2": LoraSpec(r=4, use_dora=True),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[TwoRanks]:
    with two_ranks() as made:
        yield made


def slices(step: int, count: int = 3) -> list[TrainSlice]:
    """A batch of rows of unequal length; its last slice is one rank's alone."""
    draw = torch.Generator().manual_seed(step)
    lengths = [9 + 4 * place for place in range(count)]
    rows = [TrainRow(torch.randint(0, 300, (n,), generator=draw).tolist(), [True] * n) for n in lengths]
    return [TrainSlice("a", (row,), CrossEntropy(sum(lengths) - count)) for row in rows]


def train(engine: Engine, spec: LoraSpec, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine.create_adapter("a", spec, seed=3)
    losses = []
    for step in range(STEPS):
        batch = slices(step)
        for done in range(0, len(batch), engine.workers):
            results = engine.forward_backward(batch[done : done + engine.workers])
            losses += [result.loss for result in results]
        engine.optim_step("a", 1e-2)
        if step == 1:
            engine.save("a", folder, with_optimizer=True)
            engine.drop_adapter("a")
            assert engine.restore("a", folder) == 2
    engine.save("a", folder, with_optimizer=False)
    return losses, load_file(folder / "adapter_model.safetensors")


def linear_bytes(engine: RankEngine) -> int:
    """What this rank holds of the base's matrices; it must hold no whole one."""
    weights = engine.decoder.weights
    linears = {id(one): one for one in (weights.table, *weights.linears)}.values()
    parts = [part for one in linears if isinstance(one, ShardedLinear) for part in one.parameters()]
    assert parts and all(isinstance(part, DTensor) for part in parts)
    held = sum(part.to_local().untyped_storage().nbytes() for part in parts if isinstance(part, DTensor))
    assert sum(one.nbytes for one in linears) <= held
    return held


@pytest.mark.parametrize("family", SPECS)
def test_two_ranks_train_what_one_does_on_half_of_the_base_each(
    family: str, ranks: TwoRanks, tmp_path: Path
) -> None:
    folder = build_tiny(tmp_path / "base", family)
    alone = Engine.load(folder, dtype="float32", threads=1)
    losses, weights = train(alone, SPECS[family], tmp_path / "alone")

    engine = ranks.engine(folder, sharded=True)
    found, spread = train(engine, SPECS[family], tmp_path / "spread")

    assert found == pytest.approx(losses, abs=BOUND, rel=0)
    assert spread.keys() == weights.keys()
    for name, tensor in spread.items():
        assert float((tensor - weights[name]).abs().max()) <= BOUND, name
    linears = {id(one): one for one in (alone.decoder.weights.table, *alone.decoder.weights.linears)}
    tied = alone.spec.tied_head
    whole = sum(one.nbytes for one in linears.values()) - (alone.decoder.weights.head.nbytes if tied else 0)
    for held in (linear_bytes(engine), ranks.peer.submit(linear_bytes)()):
        assert held == pytest.approx(whole / 2, rel=0.05)
    assert engine.memory().base_bytes < 0.6 * whole


def test_sampling_and_log_probabilities_are_those_of_a_whole_base(ranks: TwoRanks, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "base", "gemma3")
    answers = []
    for engine in (Engine.load(folder, dtype="float32", threads=1), ranks.engine(folder, sharded=True)):
        state = engine.open_sequence("", [1, 2, 3], SamplingParams(max_tokens=8, temperature=0))
        while state.finished is None:
            engine.step([state])
        engine.close_sequence(state)
        answers.append((state.tokens, engine.logprobs("", [1, 2, 3, 4])))
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] == pytest.approx(answers[1][1], abs=BOUND)


def test_bfloat16_is_sharded_too(ranks: TwoRanks, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "base", "gemma3")
    losses = []
    for engine in (
        Engine.load(folder, dtype="bfloat16", threads=1),
        ranks.engine(folder, sharded=True, dtype="bfloat16"),
    ):
        engine.create_adapter("a", LoraSpec(r=4), seed=3)
        losses.append([engine.forward_backward([piece])[0].loss for piece in slices(0)])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
