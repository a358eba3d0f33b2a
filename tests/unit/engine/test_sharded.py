"""A base sharded over ranks that are threads here: the numbers of a whole one, from parts that are there when they are
used only, and gathered in the same order by every rank, whatever happens on one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice
from lathe.engine.distributed.leading import LeadingEngine
from lathe.engine.distributed.ranks import RankEngine
from lathe.engine.distributed.sharded import Sharded, ShardedLinear, ShardedParts
from lathe.engine.engine import Engine
from lathe.engine.full import FullSpec
from lathe.engine.lora_config import LoraSpec
from lathe.engine.lora_layout import EMBEDDING, HEAD
from lathe.engine.model import RankLost
from lathe.engine.sampling import SamplingParams
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import Placement, random_weights
from tests.fixtures.gang import LocalShards, gang_of
from tests.unit.engine.conftest import CONFIG

SPECS = {
    "plain": LoraSpec(r=4, lora_dropout=0.1),
    "dora": LoraSpec(r=4, use_dora=True),
    "ends": LoraSpec(r=4, target_modules=("q_proj", "embed_tokens", "lm_head"), use_dora=True),
}


def decoder(to: Placement | None = None) -> Decoder:
    spec = DecoderSpec.from_config(CONFIG)
    weights = random_weights(spec, device=torch.device("cpu"), dtype=torch.float32, std=0.1, to=to)
    return Decoder(spec, weights)


class Gathered:
    """A gang on a sharded base; logs[rank]: what it gathered."""

    def __init__(self, world: int) -> None:
        self.logs: list[list[str]] = []
        self.shards: list[LocalShards] = []
        decoders = [decoder(Sharded(self._shard(rank))) for rank in range(world)]
        self.engine, self.peers, _ = gang_of(
            LeadingEngine(decoders[0]), [RankEngine(one) for one in decoders[1:]]
        )

    def _shard(self, rank: int) -> Callable[..., LocalShards]:
        self.logs.append([])

        def shard(linears: list[ShardedLinear]) -> LocalShards:
            self.shards.append(LocalShards(linears, self.logs[rank]))
            return self.shards[-1]

        return shard

    def in_step(self) -> bool:
        """Whether every rank gathered the same in the same order, and lets go of it all."""
        return all(log == self.logs[0] for log in self.logs) and not any(one.whole for one in self.shards)


def batch(seed: int, count: int = 3) -> list[TrainSlice]:
    draw = torch.Generator().manual_seed(seed)
    rows = [TrainRow(torch.randint(0, 60, (8,), generator=draw).tolist(), [True] * 8) for _ in range(count)]
    return [TrainSlice("a", (row,), CrossEntropy(7 * count)) for row in rows]


def train(engine: Engine, spec: LoraSpec, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights; a checkpoint is gone on from on the way."""
    engine.create_adapter("a", spec, seed=3)
    losses = []
    for step in range(3):
        slices = batch(step)
        for done in range(0, len(slices), engine.workers):
            together = slices[done : done + engine.workers]
            losses += [result.loss for result in engine.forward_backward(together)]
        engine.optim_step("a", 1e-2)
        losses += [result.loss for result in engine.evaluate(slices[:1])]
        engine.save("a", folder, with_optimizer=True)
        engine.drop_adapter("a")
        assert engine.restore("a", folder) == step + 1
    return losses, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("world", [2, 3])
def test_a_sharded_base_gives_what_a_whole_one_does(kind: str, world: int, tmp_path: Path) -> None:
    alone, weights = train(Engine(decoder()), SPECS[kind], tmp_path / "one")
    gathered = Gathered(world)

    losses, spread = train(gathered.engine, SPECS[kind], tmp_path / "many")

    torch.testing.assert_close(losses, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(spread, weights, rtol=0, atol=1e-6)
    assert gathered.logs[0] and gathered.in_step()


def test_rank_0_samples_and_the_others_lend() -> None:
    gathered, whole = Gathered(2), Engine(decoder())
    answers = []
    for engine in (gathered.engine, whole):
        engine.create_adapter("a", LoraSpec(r=4), seed=3)
        state = engine.open_sequence("a", [1, 2, 3], SamplingParams(max_tokens=4, temperature=0))
        while state.finished is None:
            engine.step([state])
        engine.close_sequence(state)
        answers.append((state.tokens, engine.logprobs("a", [1, 2, 3, 4])))
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] == pytest.approx(answers[1][1], abs=1e-5)
    assert gathered.in_step()


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_rank_that_fails_in_a_pass_lends_the_rest(guilty: int) -> None:
    gathered = Gathered(2)
    gathered.engine.create_adapter("a", LoraSpec(r=4), seed=3)
    slices = batch(0, 2)
    slices[guilty] = TrainSlice("a", (TrainRow([1, 9999], [True, True]),), CrossEntropy(7))

    with pytest.raises(InvalidArgument, match="outside the vocabulary"):
        gathered.engine.forward_backward(slices)

    assert gathered.in_step()
    gathered.engine.zero_grad("a")
    assert gathered.engine.forward_backward(batch(0, 2))
    assert gathered.in_step()


def test_adapters_for_sampling_are_on_every_rank_since_dora_reads_the_base(tmp_path: Path) -> None:
    gathered = Gathered(2)
    gathered.engine.create_adapter("a", SPECS["ends"], seed=3)
    gathered.engine.save("a", tmp_path, with_optimizer=False)
    gathered.engine.load_adapter("served", tmp_path)
    assert gathered.peers[0].engine.adapter_keys() == ("a", "served")
    assert gathered.in_step()


def test_a_whole_model_has_no_place_beside_a_sharded_base(tmp_path: Path) -> None:
    gathered = Gathered(2)
    gathered.engine._folder = tmp_path
    (tmp_path / "config.json").write_text("{}")
    for attempt in (
        lambda: gathered.engine.create_adapter("a", FullSpec(), seed=3),
        lambda: gathered.engine.load_adapter("a", tmp_path),
    ):
        with pytest.raises(FailedPrecondition, match="sharded over its workers"):
            attempt()
    assert not gathered.engine.adapter_keys()


def test_memory_held_is_the_shard() -> None:
    linear = ShardedLinear(torch.zeros(6, 4), torch.zeros(6))
    assert linear.nbytes == 4 * (24 + 6)


class Broken:
    def begin(self) -> Callable[[], None]:
        raise RuntimeError("connection closed by peer")

    def free(self) -> None:
        pass


def test_shards_that_cannot_be_gathered_are_a_lost_rank() -> None:
    parts = ShardedParts({EMBEDDING: Broken(), 0: Broken(), HEAD: Broken()})
    with pytest.raises(RankLost, match="connection closed"), parts.passing(training=True):
        parts.take(EMBEDDING)
    with pytest.raises(ValueError, match="own"), parts.passing(training=True):
        raise ValueError("its own trouble comes first")


def test_a_part_out_of_turn_is_a_bug_that_is_told() -> None:
    log: list[str] = []
    shards = LocalShards([ShardedLinear(torch.zeros(6, 4), None)], log)
    parts = ShardedParts({EMBEDDING: shards, 0: shards, HEAD: shards})
    with pytest.raises(RuntimeError, match="not what the pass takes"), parts.passing(training=False):
        parts.take(HEAD)
