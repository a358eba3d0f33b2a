"""Data parallel over ranks that are threads here: the numbers, what is spread, and a rank that is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lathe.common.errors import AlreadyExists, FailedPrecondition
from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, SliceResult, TrainRow, TrainSlice
from lathe.engine.distributed import files
from lathe.engine.distributed.leading import LeadingEngine
from lathe.engine.distributed.ranks import RankEngine
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import Dpo, Kto, Method, RankLost, SlicePlan, StepMetrics, TrainingConfig
from lathe.engine.recipes.methods import recipe_of
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.sampling import SamplingParams
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import random_weights
from lathe.text.formats import Role
from tests.fakes.clock import FakeClock
from tests.fixtures.gang import ThreadPeer, gang_of
from tests.fixtures.turns import scores, served
from tests.unit.engine.conftest import CONFIG

STEPS = 3


def decoder() -> Decoder:
    spec = DecoderSpec.from_config(CONFIG)
    return Decoder(spec, random_weights(spec, device=torch.device("cpu"), dtype=torch.float32, std=0.1))


def gang(world: int) -> tuple[LeadingEngine, list[ThreadPeer], list[str]]:
    return gang_of(LeadingEngine(decoder()), [RankEngine(decoder()) for _ in range(world - 1)])


def slices(seed: int, count: int = 3) -> list[TrainSlice]:
    """A batch cut into slices of two rows of eight tokens."""
    draw = torch.Generator().manual_seed(seed)
    rows = [
        TrainRow(torch.randint(0, 60, (8,), generator=draw).tolist(), [True] * 8) for _ in range(2 * count)
    ]
    return [TrainSlice("a", tuple(rows[i : i + 2]), CrossEntropy(14 * count)) for i in range(0, 2 * count, 2)]


def train(engine: Engine, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps and the adapter's tensors after them; a checkpoint is taken and gone on from on the way."""
    engine.create_adapter("a", LoraSpec(r=4, lora_dropout=0.1), seed=3)
    losses = []
    for step in range(STEPS):
        batch = slices(step)
        done = 0
        while done < len(batch):
            together = batch[done : done + engine.workers]
            losses += [result.loss for result in engine.forward_backward(together)]
            done += len(together)
        engine.optim_step("a", 1e-2)
        if step == 0:
            engine.save("a", folder / "mid", with_optimizer=True)
            engine.drop_adapter("a")
            assert engine.restore("a", folder / "mid") == 1
    engine.save("a", folder / "end", with_optimizer=False)
    return losses, load_file(folder / "end" / "adapter_model.safetensors")


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_compute_what_one_engine_does(world: int, tmp_path: Path) -> None:
    alone, weights = train(Engine(decoder()), tmp_path / "one")
    engine, peers, left = gang(world)

    losses, spread = train(engine, tmp_path / "many")

    torch.testing.assert_close(losses, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(spread, weights, rtol=0, atol=1e-6)
    for peer in peers:
        assert torch.equal(peer.engine.gradients("a"), torch.zeros_like(engine.gradients("a")))
        assert peer.engine.logprobs("a", [1, 2, 3]) == engine.logprobs("a", [1, 2, 3])
    assert not left


def test_scores_and_evaluations_come_back_in_the_rows_order(tmp_path: Path) -> None:
    engine, _, _ = gang(2)
    engine.create_adapter("a", LoraSpec(r=4), seed=3)
    one = Engine(decoder())
    one.create_adapter("a", LoraSpec(r=4), seed=3)
    batch = slices(7, count=5)
    rows = [row for piece in batch for row in piece.rows]

    assert [r.loss for r in engine.evaluate(batch)] == pytest.approx(
        [one.evaluate([p])[0].loss for p in batch]
    )
    assert scores(engine, "a", rows) == pytest.approx(scores(one, "a", rows), abs=1e-4)


@pytest.mark.parametrize("when", ["pass", "step"])
def test_a_lost_rank_changes_nothing_of_the_last_step(when: str, tmp_path: Path) -> None:
    engine, peers, left = gang(2)
    engine.create_adapter("a", LoraSpec(r=4), seed=3)
    engine.forward_backward(slices(0)[:2])
    engine.optim_step("a", 1e-2)
    before = engine.logprobs("a", [1, 2, 3, 4])
    if when == "step":
        engine.forward_backward(slices(1)[:2])
    peers[0].lost = True

    with pytest.raises(RankLost, match="A worker of this job was lost"):
        engine.forward_backward(slices(1)[:2]) if when == "pass" else engine.optim_step("a", 1e-2)

    assert engine.logprobs("a", [1, 2, 3, 4]) == before
    engine.save("a", tmp_path, with_optimizer=True)
    with pytest.raises(RankLost):
        engine.forward_backward(slices(1)[:2])
    engine.drop_adapter("a")
    assert not engine.adapter_keys()
    assert left == ["left"]


def test_a_rank_lost_after_the_sum_leaves_a_whole_step(tmp_path: Path) -> None:
    engine, peers, left = gang(2)
    engine.create_adapter("a", LoraSpec(r=4), seed=3)
    engine.forward_backward(slices(0)[:2])
    peers[0].lost_after = 1

    assert engine.optim_step("a", 1e-2) > 0

    assert left
    engine.save("a", tmp_path, with_optimizer=True)
    assert Engine(decoder()).restore("a", tmp_path) == 1
    with pytest.raises(RankLost):
        engine.forward_backward(slices(1)[:2])


def test_a_rank_lost_at_the_end_takes_nothing_from_a_finished_job() -> None:
    engine, peers, left = gang(2)
    engine.create_adapter("a", LoraSpec(r=4), seed=3)
    peers[0].lost = True
    engine.drop_adapter("a")
    assert not engine.adapter_keys()
    assert left


def test_adapters_for_sampling_are_rank_0s_alone(tmp_path: Path) -> None:
    engine, peers, _ = gang(2)
    engine.create_adapter("a", LoraSpec(r=4), seed=3)
    engine.save("a", tmp_path, with_optimizer=False)
    engine.load_adapter("served", tmp_path)
    assert peers[0].engine.adapter_keys() == ("a",)

    state = engine.open_sequence("a", [1, 2, 3], SamplingParams(max_tokens=1, temperature=0))
    with pytest.raises(FailedPrecondition, match="in use"):
        engine.drop_adapter("a")
    assert peers[0].engine.adapter_keys() == ("a",)
    engine.close_sequence(state)
    engine.drop_adapter("a")
    engine.drop_adapter("served")
    assert peers[0].engine.adapter_keys() == engine.adapter_keys() == ()


def test_what_a_rank_refuses_is_raised_as_it_is() -> None:
    engine, _, left = gang(2)
    with pytest.raises(Exception, match="holds no adapter 'b'"):
        engine.zero_grad("b")
    assert not left


def test_a_reference_is_on_every_rank(tmp_path: Path) -> None:
    engine, peers, _ = gang(2)
    engine.create_adapter("a", LoraSpec(r=4), seed=3)
    engine.save("a", tmp_path, with_optimizer=False)
    engine.load_reference("a/reference", tmp_path)
    rows = [row for piece in slices(7) for row in piece.rows]
    pieces = [TrainSlice("a/reference", (row,), CrossEntropy(1)) for row in rows]

    found = [-result.loss_sum for result in engine.evaluate(pieces)]

    assert found == pytest.approx(scores(engine, "a", rows), abs=1e-4)
    assert peers[0].engine.adapter_keys() == ("a", "a/reference")
    engine.drop_adapter("a/reference")
    assert peers[0].engine.adapter_keys() == ("a",)


def test_an_adapter_that_one_rank_cannot_make_is_on_none(tmp_path: Path) -> None:
    engine, peers, left = gang(3)
    peers[1].engine.create_adapter("a", LoraSpec(r=4), seed=3)
    with pytest.raises(AlreadyExists):
        engine.create_adapter("a", LoraSpec(r=4), seed=3)
    assert [one.adapter_keys() for one in (engine, *(peer.engine for peer in peers))] == [()] * 3
    engine.create_adapter("a", LoraSpec(r=4), seed=3)
    assert not left


def test_files_arrive_as_they_are_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 5)
    source = tmp_path / "source"
    (source / "deeper").mkdir(parents=True)
    contents = {"a.json": b"0123456789", "b.bin": bytes(range(13)), "empty": b""}
    for name, content in contents.items():
        (source / name).write_bytes(content)
    sent: list[Tensor] = []
    files.send(source, files.listing(source), lambda piece: sent.append(piece.clone()), torch.device("cpu"))
    assert [len(piece) for piece in sent] == [5, 5, 5, 5, 3]

    def next_piece(tensor: Tensor) -> None:
        tensor.copy_(sent.pop(0))

    with files.receiving(files.listing(source), next_piece, torch.device("cpu")) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert not folder.exists()


def test_a_file_that_cannot_be_read_keeps_no_rank_waiting(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123")
    told = (("a", 4), ("gone", 3))
    sent: list[Tensor] = []
    with pytest.raises(OSError, match="gone"):
        files.send(tmp_path, told, lambda piece: sent.append(piece.clone()), torch.device("cpu"))
    assert [bytes(piece.tolist()) for piece in sent] == [b"0123", bytes(3)]


def test_the_rank_with_the_least_room_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, peers, _ = gang(2)
    engine.create_adapter("a", LoraSpec(r=4), seed=3)
    room = {id(engine): 70, id(peers[0].engine): 50}
    taken = {id(engine): 10, id(peers[0].engine): 30}
    monkeypatch.setattr(Engine, "free_bytes", lambda self: room[id(self)])
    monkeypatch.setattr(Engine, "measure", lambda self, key, rows: taken[id(self)])
    assert engine.free_bytes() == 50
    assert engine.measure("a", slices(0)[0].rows) == 30


@pytest.mark.parametrize("method", [Dpo(beta=0.5), Kto(beta=0.5)])
def test_a_preference_job_on_two_ranks_is_that_of_one(
    method: Method, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, peers, _ = gang(2)
    by_the_base: list[int] = []
    alone = Engine.evaluate

    def evaluate(self: Engine, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        by_the_base.extend(id(self) for piece in pieces if not piece.key)
        return alone(self, pieces)

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    losses, weights = [], []
    for one in (Engine(decoder()), engine):
        told = list(served(preference_run(one, method, tmp_path / str(one.workers)).turns(), one))
        losses.append([turn.train_loss for turn in told if isinstance(turn, StepMetrics)])
        folder = tmp_path / str(one.workers) / "final-4"
        weights.append(load_file(folder / "adapter_model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
    share = by_the_base.count(id(peers[0].engine)) / by_the_base.count(id(engine))
    assert 0.5 <= share <= 1


def preference_run(engine: Engine, method: Method, folder: Path) -> Run:
    kto = isinstance(method, Kto)
    roles = (Role.DESIRABLE, Role.UNDESIRABLE) if kto else (Role.CHOSEN, Role.REJECTED)
    rows = [
        TrainRow(
            [line, 7, 5 * line, 5 * line + 1, *[line] * place], [False, False, *[True] * (2 + place)], role
        )
        for line in range(1, 9)
        for place, role in enumerate(roles)
    ]
    config = TrainingConfig(
        n_epochs=1, batch_size=4 if kto else 2, learning_rate=0.02, seed=3, lora_r=4,
        target_modules=("all-linear",), method=method,
    )  # fmt: skip
    return Run(
        recipe_of(method),
        engine=engine,
        key="a",
        data=TrainData(rows),
        config=config,
        plan=SlicePlan(10, 1, "float32", "cpu"),
        folder=lambda kind, step: folder / f"{kind}-{step}",
        clock=FakeClock(),
    )
