"""What the shell relies on: the same tests on the fake engine and on the real one with a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lathe.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.full import FullSpec
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from tests.fakes.engine import FakeEngine
from tests.fixtures.tiny_llama import build_tiny_llama

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_llama(folder)
    return folder


@pytest.fixture(params=["fake", "real"])
def engine(request: pytest.FixtureRequest, tiny_folder: Path) -> FakeEngine | Engine:
    if request.param == "fake":
        return FakeEngine()
    return Engine.load(tiny_folder, dtype="float32", threads=1, kv_budget_bytes=1 << 24)


def _slice(key: str, seed: int) -> TrainSlice:
    tokens = [(seed * 31 + 7 * place) % 500 for place in range(12)]
    return TrainSlice(key, (TrainRow(tokens, [place >= 2 for place in range(12)]),), CrossEntropy(20))


def _train(engine: FakeEngine | Engine, key: str, steps: range) -> None:
    for step in steps:
        for part in range(2):
            engine.forward_backward([_slice(key, 2 * step + part)])
        engine.optim_step(key, 1e-2)


def test_save_and_restore_go_on_as_if_nothing_had_happened(
    engine: FakeEngine | Engine, tmp_path: Path
) -> None:
    for key in ("whole", "parts"):
        engine.create_adapter(key, LoraSpec(r=4), seed=1)
    _train(engine, "whole", range(4))
    _train(engine, "parts", range(2))
    engine.forward_backward([_slice("parts", 99)])  # half a step is not saved
    engine.save("parts", tmp_path / "half", with_optimizer=True, base_model="baseModels/tiny")
    engine.drop_adapter("parts")
    assert engine.restore("again", tmp_path / "half") == 2
    _train(engine, "again", range(2, 4))
    for key in ("whole", "again"):
        names = engine.save(key, tmp_path / key, with_optimizer=False, base_model="baseModels/tiny")
        assert set(names) == {"adapter_config.json", "adapter_model.safetensors"}
        for name in names:
            assert (tmp_path / key / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_measuring_a_pass_leaves_no_trace(engine: FakeEngine | Engine, tmp_path: Path) -> None:
    for key in ("a", "b"):
        engine.create_adapter(key, LoraSpec(r=4, lora_dropout=0.1), seed=1)
    taken = engine.measure("b", _slice("b", 5).rows)
    assert taken is not None and taken >= 0
    for key in ("a", "b"):
        _train(engine, key, range(2))
        engine.save(key, tmp_path / key, with_optimizer=False)
    weights = [(tmp_path / key / "adapter_model.safetensors").read_bytes() for key in ("a", "b")]
    assert weights[0] == weights[1]
    with pytest.raises(NotFound):
        engine.measure("nobody", _slice("b", 5).rows)


def test_a_forgotten_gradient_leaves_no_trace(engine: FakeEngine | Engine, tmp_path: Path) -> None:
    for key in ("a", "b"):
        engine.create_adapter(key, LoraSpec(r=4), seed=1)
    engine.forward_backward([_slice("b", 5)])
    engine.zero_grad("b")
    for key in ("a", "b"):
        _train(engine, key, range(1))
        engine.save(key, tmp_path / key, with_optimizer=False)
    weights = [(tmp_path / key / "adapter_model.safetensors").read_bytes() for key in ("a", "b")]
    assert weights[0] == weights[1]


def test_a_slice_is_counted(engine: FakeEngine | Engine) -> None:
    engine.create_adapter("a", LoraSpec(r=4), seed=1)
    for (result,) in (engine.forward_backward([_slice("a", 1)]), engine.evaluate([_slice("a", 1)])):
        assert (result.tokens, result.input_tokens) == (10, 12)
        assert result.loss_sum > 0
        assert 0 <= result.correct <= 10


def test_keys(engine: FakeEngine | Engine, tmp_path: Path) -> None:
    engine.create_adapter("a", LoraSpec(r=4), seed=1)
    with pytest.raises(AlreadyExists):
        engine.create_adapter("a", LoraSpec(r=4), seed=1)
    engine.save("a", tmp_path, with_optimizer=False)
    engine.load_adapter("served", tmp_path)
    with pytest.raises(FailedPrecondition):
        engine.forward_backward([_slice("served", 1)])
    with pytest.raises(InvalidArgument):
        engine.restore("b", tmp_path)  # there is no optimizer
    assert set(engine.adapter_keys()) == {"a", "served"}
    engine.drop_adapter("a")
    with pytest.raises(NotFound):
        engine.drop_adapter("a")


def test_a_module_that_the_base_has_not(engine: FakeEngine | Engine) -> None:
    with pytest.raises(InvalidArgument, match="target_modules"):
        engine.create_adapter("a", LoraSpec(target_modules=("q_proj", "nonsense")), seed=1)
    assert engine.adapter_keys() == ()
    engine.create_adapter("a", LoraSpec(target_modules=("q_proj", "embed_tokens", "lm_head")), seed=1)


def test_a_sequence(engine: FakeEngine | Engine) -> None:
    state = engine.open_sequence("", [1, 2, 3, 4, 5], GREEDY)
    assert engine.step([state], prefill_tokens=3) == []
    outputs = []
    while state.finished is None:
        outputs += engine.step([state], prefill_tokens=3)
    assert [output.sampled.token for output in outputs] == state.tokens
    assert (len(state.tokens), state.finished, state.prompt_tokens) == (4, "length", 5)
    engine.close_sequence(state)
    engine.close_sequence(state)


def test_a_stop_token_ends_a_sequence(engine: FakeEngine | Engine) -> None:
    first = engine.open_sequence("", [1, 2, 3], GREEDY)
    while first.finished is None:
        engine.step([first])
    stop = SamplingParams(max_tokens=4, temperature=0.0, stop_ids=frozenset({first.tokens[0]}))
    state = engine.open_sequence("", [1, 2, 3], stop)
    while state.finished is None:
        engine.step([state])
    assert (state.tokens, state.finished) == (first.tokens[:1], "stop")


def test_a_sequence_that_gets_no_number_fails_alone(engine: FakeEngine | Engine, tmp_path: Path) -> None:
    make_overflow(engine, "huge", tmp_path)
    alone = engine.open_sequence("", [1, 2, 3], GREEDY)
    while alone.finished is None:
        engine.step([alone])

    states = [engine.open_sequence(key, [1, 2, 3], GREEDY) for key in ("huge", "", "huge")]
    outputs = []
    while any(state.finished is None for state in states):
        outputs += engine.step(states, prefill_tokens=5)

    assert [state.finished for state in states] == ["error", "length", "error"]
    assert states[1].tokens == alone.tokens == [output.sampled.token for output in outputs]
    for state in (states[0], states[2]):
        assert state.tokens == [] and state.failure is not None
        assert state.failure.reason == "MODEL_NOT_FINITE"
        engine.close_sequence(state)
    engine.drop_adapter("huge")


def make_overflow(engine: FakeEngine | Engine, key: str, folder: Path) -> None:
    """Loads an adapter of finite weights whose products are infinite."""
    engine.create_adapter("a", LoraSpec(r=4, target_modules=("q_proj", "o_proj")), seed=1)
    engine.save("a", folder, with_optimizer=False)
    engine.drop_adapter("a")
    if isinstance(engine, FakeEngine):
        engine.overflows.add(key)
    else:
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.fill_(1e25) for name, tensor in load_file(path).items()}, path)
    engine.load_adapter(key, folder)


def test_what_cannot_be_sampled(engine: FakeEngine | Engine, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        engine.open_sequence("nobody", [1], GREEDY)
    with pytest.raises(InvalidArgument):
        engine.open_sequence("", [], GREEDY)
    engine.create_adapter("a", LoraSpec(r=4), seed=1)
    state = engine.open_sequence("a", [1, 2], GREEDY)
    with pytest.raises(FailedPrecondition):
        engine.drop_adapter("a")
    engine.close_sequence(state)
    engine.drop_adapter("a")
    assert engine.memory().base_bytes > 0


def test_a_whole_model_is_trained_saved_and_gone_on_with(engine: FakeEngine | Engine, tmp_path: Path) -> None:
    engine.create_adapter("whole", FullSpec(), seed=1)
    engine.create_adapter("lora", LoraSpec(r=4), seed=1)
    assert (engine.joins("whole"), engine.joins("lora")) == (False, True)
    _train(engine, "whole", range(2))
    with pytest.raises(InvalidArgument):
        engine.forward_backward([_slice("whole", 1), _slice("lora", 1)])
    names = engine.save("whole", tmp_path / "half", with_optimizer=True, base_model="baseModels/tiny")
    assert names == ("config.json", "model.safetensors", "optimizer.safetensors")
    assert engine.restore("again", tmp_path / "half") == 2
    for key in ("whole", "again"):
        engine.zero_grad(key)
        _train(engine, key, range(2, 4))
        engine.save(key, tmp_path / key, with_optimizer=False, base_model="baseModels/tiny")
    weights = [(tmp_path / key / "model.safetensors").read_bytes() for key in ("whole", "again")]
    assert weights[0] == weights[1]
    engine.load_adapter("served", tmp_path / "whole")
    with pytest.raises(FailedPrecondition):
        engine.forward_backward([_slice("served", 1)])


def test_another_job_goes_on_from_a_tuned_model(engine: FakeEngine | Engine, tmp_path: Path) -> None:
    engine.create_adapter("first", LoraSpec(r=4), seed=1)
    _train(engine, "first", range(2))
    engine.save("first", tmp_path / "first", with_optimizer=True)
    engine.continue_adapter("second", tmp_path / "first", seed=2)
    engine.save("second", tmp_path / "second", with_optimizer=True)
    same = "adapter_model.safetensors"
    assert (tmp_path / "second" / same).read_bytes() == (tmp_path / "first" / same).read_bytes()
    engine.drop_adapter("second")
    assert engine.restore("second", tmp_path / "second") == 0  # its optimiser is a fresh one


def test_another_job_may_have_another_dropout(engine: FakeEngine | Engine, tmp_path: Path) -> None:
    engine.create_adapter("first", LoraSpec(r=4, lora_dropout=0.1), seed=1)
    engine.save("first", tmp_path / "first", with_optimizer=False)
    for key, asked in (("kept", None), ("other", 0.5)):
        engine.continue_adapter(key, tmp_path / "first", 2, asked)
        engine.save(key, tmp_path / key, with_optimizer=False)
    saved = [json.loads((tmp_path / key / "adapter_config.json").read_text()) for key in ("kept", "other")]
    assert [config["lora_dropout"] for config in saved] == [0.1, 0.5]
    if isinstance(engine, Engine):
        kept, other = (engine.forward_backward([_slice(key, 1)])[0].loss for key in ("kept", "other"))
        engine.create_adapter("none", LoraSpec(r=4), seed=1)
        assert kept == other == engine.forward_backward([_slice("none", 1)])[0].loss  # B is nothing yet
        for key in ("kept", "other"):
            engine.optim_step(key, 0.1)
        assert engine.forward_backward([_slice("kept", 1)]) != engine.forward_backward([_slice("other", 1)])
