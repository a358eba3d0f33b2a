"""Sequences that come and go beside one another, on base and adapters, are each what they are alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import Sampled, SamplingParams
from lathe.engine.sequences import SequenceState
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import random_weights
from tests.unit.engine.conftest import CONFIG

MakeEngine = Callable[..., Engine]
KEYS = ("", "a", "b")


@dataclass(frozen=True)
class Request:
    """One sequence: when it comes, in steps; after how many of its tokens its reader goes away (0: never)."""

    number: int
    key: str
    arrival: int
    leaves: int

    @property
    def prompt(self) -> list[int]:
        return [(self.number * 31 + 7 * i + 3 * i * i) % 96 for i in range(3 + 5 * (self.number % 4))]

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=6, temperature=0.9, seed=self.number, top_logprobs=1)


REQUESTS = st.lists(
    st.tuples(st.sampled_from(KEYS), st.integers(0, 9), st.integers(0, 4)), min_size=2, max_size=9
).map(lambda rows: [Request(i, *row) for i, row in enumerate(rows)])


@cache
def adapted_engine() -> Engine:
    """Two adapters of different ranks and modules, trained until they answer otherwise than the base.

    In float64: company may round the last bit otherwise, and of thousands of float32 draws one lies that near to
    another token, on one kind of CPU or another.
    """
    spec = DecoderSpec.from_config(CONFIG)
    weights = random_weights(spec, device=torch.device("cpu"), dtype=torch.float64, std=0.2)
    engine = Engine(Decoder(spec, weights))
    engine.create_adapter("a", LoraSpec(r=4), seed=1)
    engine.create_adapter("b", LoraSpec(r=8, target_modules=("q_proj", "down_proj")), seed=2)
    rows = tuple(TrainRow([(i * 13 + 5 * j) % 96 for j in range(12)], [True] * 12) for i in range(4))
    for key in ("a", "b"):
        for _ in range(4):
            engine.forward_backward([TrainSlice(key, rows, CrossEntropy(44))])
            engine.optim_step(key, 0.05)
    return engine


def test_an_adapter_that_overflows_spoils_no_other_sequence() -> None:
    spec = DecoderSpec.from_config(CONFIG)
    weights = random_weights(spec, device=torch.device("cpu"), dtype=torch.float32, std=0.2)
    engine = Engine(Decoder(spec, weights))
    prompts = [[5, 6, 7], list(range(10, 60))]

    def answers(*keys: str) -> list[list[int]]:
        params = SamplingParams(max_tokens=8, temperature=0.0)
        states = [engine.open_sequence(key, prompt, params) for key in keys for prompt in prompts]
        while any(state.finished is None for state in states):
            engine.step(states)
        for state in states:
            engine.close_sequence(state)
            assert (state.finished == "error") == (state.key == "huge")
        return [state.tokens for state in states]

    expected = answers("")
    modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    engine.create_adapter("huge", LoraSpec(r=4, target_modules=modules), seed=1)
    huge = engine._held["huge"].adapter
    huge.master.fill_(1e25)
    huge.publish()
    assert answers("huge", "") == [[] for _ in prompts] + expected
    assert engine._cache.data.isfinite().all()
    engine.drop_adapter("huge")
    assert answers("") == expected


@pytest.mark.parametrize("chunk", [256, 3])
def test_a_prompt_with_one_token_that_overflows_fails_and_leaves_nothing(
    make_engine: MakeEngine, tmp_path: Path, chunk: int
) -> None:
    # The keys and values of such a token are cut to what the cache may hold, so what follows it is finite again.
    engine = make_engine()
    engine.create_adapter("a", LoraSpec(r=4, target_modules=("embed_tokens",)), seed=1)
    engine.save("a", tmp_path, with_optimizer=False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "embedding_A" in name:
            tensor.zero_()[:, 7] = 1e30
        else:
            tensor.fill_(1e30)
    save_file(tensors, path)
    engine.load_adapter("seven", tmp_path)

    params = SamplingParams(max_tokens=3, temperature=0.0)
    for _ in range(2):
        prompts = ([5, 7, 6, 8], [5, 6, 8, 9])
        states = [engine.open_sequence("seven", prompt, params) for prompt in prompts]
        while any(state.finished is None for state in states):
            engine.step(states, prefill_tokens=chunk)
        assert [state.finished for state in states] == ["error", "length"]
        assert states[0].tokens == []
        assert states[0].cached_tokens <= 1  # what both have in common, and nothing from the 7 on


def drive(engine: Engine, requests: list[Request]) -> dict[int, list[Sampled]]:
    """Steps the engine as a server does, each request from its arrival on; what each was given."""
    given: dict[int, list[Sampled]] = {request.number: [] for request in requests}
    running: dict[int, tuple[Request, SequenceState]] = {}
    for moment in range(200):
        for request in requests:
            if request.arrival == moment:
                state = engine.open_sequence(request.key, request.prompt, request.params)
                running[id(state)] = request, state
        for out in engine.step([state for _, state in running.values()], prefill_tokens=8):
            request, state = running[id(out.state)]
            given[request.number].append(out.sampled)
            if state.finished is not None or len(state.tokens) == request.leaves:
                engine.close_sequence(state)
                del running[id(state)]
        if not running and moment >= max(request.arrival for request in requests):
            return given
    raise AssertionError("the sequences did not end")


@cache
def alone(request: Request) -> tuple[Sampled, ...]:
    return tuple(drive(adapted_engine(), [Request(request.number, request.key, 0, 0)])[request.number])


def test_the_adapters_answer_differently() -> None:
    found = {key: [one.token for one in alone(Request(3, key, 0, 0))] for key in KEYS}
    assert len({tuple(tokens) for tokens in found.values()}) == len(KEYS)


@given(requests=REQUESTS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_company_changes_no_sequence(requests: list[Request]) -> None:
    given = drive(adapted_engine(), requests)
    for request in requests:
        expected = alone(request)[: request.leaves or None]
        found = given[request.number]
        assert [one.token for one in found] == [one.token for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize("key", KEYS)
def test_logprobs_are_those_of_the_training_pass(key: str) -> None:
    engine = adapted_engine()
    request = Request(3, key, 0, 0)
    given = drive(engine, [request])[3]
    whole = [*request.prompt, *(one.token for one in given)]
    trained = engine.logprobs(key, whole)[len(request.prompt) - 1 :]
    assert [one.logprob for one in given] == pytest.approx(trained, abs=1e-4)
    assert all(math.isfinite(value) for value in trained)


def test_a_cancelled_sequence_makes_room_at_once(make_engine: MakeEngine) -> None:
    # Room for two of these sequences; a third can only run in the place of one that has gone.
    engine = make_engine(kv_tokens=100)
    params = SamplingParams(max_tokens=20, temperature=0)
    first, second, third = (engine.open_sequence("", [number] * 40, params) for number in (1, 2, 3))
    for _ in range(3):
        engine.step([first, second, third])
    assert (len(first.tokens), len(second.tokens), third.tokens) == (3, 3, [])
    engine.close_sequence(first)
    (given,) = [out for out in engine.step([second, third]) if out.state is third]
    assert given.sampled.token == third.tokens[0]
