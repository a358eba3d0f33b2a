"""Training every weight, against a plain transformers loop in fp32 on a tiny model of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice, trained_tokens
from lathe.engine.engine import Engine
from lathe.engine.full import FullModel, FullSpec, bytes_in_training
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from lathe.engine.weights import load_weights, read_spec
from tests.fixtures.tiny_families import TINY, build_tiny

ROWS = [list(range(5, 24)), [7, 3, 9], list(range(40, 90)), [9, 9, 11, 600]]
LR = 0.003
GREEDY = SamplingParams(max_tokens=8, temperature=0, top_logprobs=0)


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def piece_of(key: str, rows: list[list[int]] = ROWS) -> TrainSlice:
    made = tuple(TrainRow(row, [i % 3 != 1 for i in range(len(row))]) for row in rows)
    return TrainSlice(key, made, CrossEntropy(sum(trained_tokens(row) for row in made)))


def their_loss(model: Any, piece: TrainSlice) -> torch.Tensor:
    total, count = torch.zeros(()), 0
    for row in piece.rows:
        logits = model(torch.tensor([row.tokens])).logits[0, :-1]
        labels = torch.tensor([t if m else -100 for t, m in zip(row.tokens, row.mask, strict=True)][1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += trained_tokens(row)
    return total / count


def entry(engine: Engine, key: str) -> FullModel:
    held = engine._held[key].adapter
    assert isinstance(held, FullModel)
    return held


def train(engine: Engine, key: str, steps: int) -> None:
    for _ in range(steps):
        engine.forward_backward([piece_of(key)])
        engine.optim_step(key, LR)


def sampled(engine: Engine, keys: list[str]) -> list[list[int]]:
    """Greedy tokens of one prompt for each key, all in one batch."""
    states = [engine.open_sequence(key, [5, 6, 7, 8], GREEDY) for key in keys]
    while any(state.finished is None for state in states):
        engine.step(states)
    for state in states:
        engine.close_sequence(state)
    return [state.tokens for state in states]


@pytest.mark.parametrize("name", TINY)
def test_three_steps_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = build_tiny(tmp_path / "base", name)
    engine, model = Engine.load(folder, dtype="float32"), reference(folder)
    engine.create_adapter("a", FullSpec(), seed=1)
    theirs = dict(model.named_parameters())
    ours = entry(engine, "a")
    assert {key: tuple(value.shape) for key, value in ours.named_tensors()} == {
        key: tuple(value.shape) for key, value in theirs.items()
    }
    optimizer = torch.optim.AdamW(theirs.values(), lr=LR, weight_decay=0.01)
    for _ in range(3):
        (result,) = engine.forward_backward([piece_of("a")])
        optimizer.zero_grad()
        loss = their_loss(model, piece_of("a"))
        loss.backward()
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        for key, gradient in ours.named_gradients():
            torch.testing.assert_close(
                gradient,
                theirs[key].grad,
                atol=3e-5,
                rtol=2e-3,
                msg=lambda m, k=key: f"{k}: {m}",
            )
        norm = float(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0))
        optimizer.step()
        assert engine.optim_step("a", LR, clip=1.0, weight_decay=0.01) == pytest.approx(norm, rel=1e-3)
        # Adam divides by the gradient's size: where that is rounding alone (as of a key's bias, to which the softmax is
        # blind where nothing is rotated) the steps may differ, and another kind of CPU rounds otherwise. The next step
        # begins at the same weights again.
        for key, tensor in ours.named_tensors():
            gaps = (tensor - theirs[key]).abs()[theirs[key].grad.abs() > 1e-6]
            assert gaps.numel() == 0 or gaps.mean() < 1e-5, key
            theirs[key].data.copy_(tensor)
    engine.save("a", tmp_path / "tuned", with_optimizer=False, base_model="tiny")
    for key, tensor in reference(tmp_path / "tuned").named_parameters():
        assert torch.equal(tensor, dict(ours.named_tensors())[key])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ROWS[0]])).logits[0], -1)
    chosen = [float(logprobs[i, token]) for i, token in enumerate(ROWS[0][1:])]
    assert engine.logprobs("a", ROWS[0]) == pytest.approx(chosen, abs=2e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("base"), "llama")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    base: Path, tmp_path: Path, dtype: str
) -> None:
    engine = Engine.load(base, dtype=dtype)
    engine.create_adapter("a", FullSpec(), seed=1)
    train(engine, "a", 2)
    engine.forward_backward([piece_of("a", ROWS[:1])])  # half a step is not saved
    names = engine.save("a", tmp_path / "half", with_optimizer=True)
    assert names == ("config.json", "model.safetensors", "optimizer.safetensors")
    engine.zero_grad("a")
    assert engine.restore("b", tmp_path / "half") == 2
    before = engine.evaluate([piece_of("a")])[0].loss
    for key in ("a", "b"):
        train(engine, key, 2)
    assert torch.equal(entry(engine, "a").master, entry(engine, "b").master)
    assert engine.evaluate([piece_of("a")])[0].loss < before


def test_it_is_sampled_beside_adapters_and_the_base_and_changes_neither(base: Path, tmp_path: Path) -> None:
    # In float64, where no two tokens are so near to each other that a batch of another shape could swap them.
    spec = read_spec(base)
    weights = load_weights(base, spec, device=torch.device("cpu"), dtype=torch.float64)
    engine = Engine(Decoder(spec, weights), folder=base)
    plain = sampled(engine, [""])[0]
    engine.create_adapter("lora", LoraSpec(r=4), seed=1)
    engine.create_adapter("full", FullSpec(), seed=1)
    assert sampled(engine, ["full"]) == [plain]
    for key in ("lora", "full"):
        train(engine, key, 5)
    alone = [sampled(engine, [key])[0] for key in ("", "lora", "full")]
    assert alone[0] == plain
    assert alone[2] != plain
    engine.save("full", tmp_path / "tuned", with_optimizer=False)
    engine.load_adapter("served", tmp_path / "tuned")
    together = sampled(engine, ["full", "", "lora", "served", "full", "lora"])
    assert together == [alone[2], alone[0], alone[1], alone[2], alone[2], alone[1]]
    engine.continue_adapter("further", tmp_path / "tuned", seed=2)
    # The files are in float32.
    assert torch.equal(entry(engine, "further").master.float(), entry(engine, "full").master.float())
    for key in ("lora", "full", "served", "further"):
        engine.drop_adapter(key)
    assert (engine.memory().adapter_bytes, sampled(engine, [""])[0]) == (0, plain)


def test_what_it_holds_in_memory(base: Path) -> None:
    engine = Engine.load(base, dtype="bfloat16")
    engine.create_adapter("a", FullSpec(), seed=1)
    memory, weights = engine.memory(), entry(engine, "a").master.numel()
    assert memory.adapter_bytes + memory.optimizer_bytes == bytes_in_training(torch.bfloat16) * weights


def test_a_pass_never_mixes_it_with_adapters(base: Path) -> None:
    engine = Engine.load(base, dtype="float32")
    engine.create_adapter("lora", LoraSpec(r=4), seed=1)
    engine.create_adapter("full", FullSpec(), seed=1)
    assert (engine.joins("lora"), engine.joins("full")) == (True, False)
    with pytest.raises(InvalidArgument, match="by themselves"):
        engine.forward_backward([piece_of("lora"), piece_of("full")])


def test_a_folder_that_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    engine = Engine.load(base, dtype="float32")
    engine.create_adapter("good", FullSpec(), seed=1)
    other = build_tiny(tmp_path / "other", "llama", hidden_size=32)
    with pytest.raises(InvalidArgument, match="another architecture"):
        engine.load_adapter("b", other)
    engine.save("good", tmp_path / "nan", with_optimizer=True)
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    (tmp_path / "torn").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "torn" / name).write_bytes((tmp_path / "nan" / name).read_bytes()[:2000])
    for load in (engine.load_adapter, engine.restore):
        with pytest.raises(InvalidArgument, match=r"model\.norm\.weight holds a NaN"):
            load("b", tmp_path / "nan")
    with pytest.raises(InvalidArgument, match=r"model\.safetensors cannot be read"):
        engine.load_adapter("b", tmp_path / "torn")
    assert engine.adapter_keys() == ("good",)
    with pytest.raises(FailedPrecondition, match="no files"):
        Engine(engine.decoder).create_adapter("a", FullSpec(), seed=1)


def test_a_copy_that_memory_has_no_room_for_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_tiny(tmp_path / "base", "llama")
    engine = Engine.load(folder, dtype="float32")
    engine.create_adapter("a", FullSpec(), seed=1)
    engine.save("a", tmp_path / "a", with_optimizer=True)
    engine.drop_adapter("a")
    monkeypatch.setattr(engine, "free_bytes", lambda: 1000)
    for begin in (
        lambda: engine.create_adapter("b", FullSpec(), seed=1),
        lambda: engine.continue_adapter("b", tmp_path / "a", seed=1),
        lambda: engine.restore("b", tmp_path / "a"),
    ):
        with pytest.raises(FailedPrecondition, match=r"bytes each\), and 1e-06 GB are free") as refused:
            begin()
        assert refused.value.reason == "OUT_OF_MEMORY"
        assert engine.adapter_keys() == ()
