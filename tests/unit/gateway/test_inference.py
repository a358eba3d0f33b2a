from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lathe.common.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from lathe.common.metrics import Metrics
from lathe.common.rpc.principal import Principal
from lathe.gateway.engines import EngineDirectory
from lathe.gateway.inference import Inference
from lathe.gateway.model import (
    AdapterRef,
    BaseModelRef,
    ChatDelta,
    ChatRequest,
    Deployment,
    EngineInfo,
    SampledToken,
    SampleEvent,
    ServedModel,
)
from lathe.gateway.resolve import ModelDirectory
from lathe.text.render import render_prompt
from lathe.text.tokenizer import Tokenizer
from tests.fakes.clock import FakeClock
from tests.fakes.gateway import (
    FakeDeployments,
    FakeEngineFeed,
    FakeEngines,
    FakeModels,
    FakeTokenizers,
    Script,
)
from tests.fakes.ids import FakeIds
from tests.fixtures.tiny import CHATML, build_tiny_tokenizer

ALICE = Principal("acme", "member", "key_1")
BASE = BaseModelRef("baseModels/tiny", "d1", 200)
ADAPTER = AdapterRef("jobs/j/a/final", "m" * 64)
TUNED = "ft:tiny:acme::1"
A = EngineInfo("eng-a", "a:1", "baseModels/tiny", "d1", max_sequences=4)
B = EngineInfo("eng-b", "b:1", "baseModels/tiny", "d1", max_sequences=4)
ASK = ChatRequest("tiny", ({"role": "user", "content": "Hello"},))
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    # Knowing tools makes the template one whose calls are parsed.
    template = CHATML + "{% if tools %}<tool_call>{% endif %}"
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.from_folder(build_tiny_tokenizer(folder, chat_template=template))


class World:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.clock = FakeClock()
        self.feed = FakeEngineFeed()
        self.engines = FakeEngines()
        self.models = FakeModels(
            {("", "tiny"): ServedModel(BASE), ("acme", TUNED): ServedModel(BASE, ADAPTER)}
        )
        self.deployments = FakeDeployments()
        self.directory = EngineDirectory(self.feed, self.engines, self.clock)
        self.metrics = Metrics()
        self.inference = Inference(
            ModelDirectory(self.models, self.deployments, self.clock),
            FakeTokenizers(tokenizer),
            self.directory,
            clock=self.clock,
            ids=FakeIds(),
            metrics=self.metrics,
            version="1",
        )

    def answer(self, text: str, *, end: bool = True, cached: int = 0) -> Script:
        """A script that samples `text`, token by token, and the end of the turn."""
        ids = [*self.tokenizer.encode(text), *(self.tokenizer.eos_ids[:1] if end else ())]
        events = [SampleEvent((SampledToken(i, -0.5, ((i, -0.5), (65, -2.0))),)) for i in ids]
        events[0] = replace(events[0], cached_prompt_tokens=cached)
        events[-1] = replace(events[-1], finish="stop" if end else "length")
        return events

    async def serve(self, *engines: EngineInfo) -> None:
        self.feed.publish(engines)
        await self.clock.advance(0)


@pytest.fixture
async def world(tokenizer: Tokenizer) -> AsyncIterator[World]:
    world = World(tokenizer)
    task = asyncio.create_task(world.directory.run())
    await world.serve(A, B)
    yield world
    task.cancel()


async def gather(world: World, request: ChatRequest) -> list[ChatDelta]:
    return [delta async for delta in world.inference.stream(ALICE, request)]


def text_of(deltas: Sequence[ChatDelta]) -> str:
    return "".join(d.choice.content or "" for d in deltas if d.choice is not None)


async def test_an_answer_with_usage(world: World) -> None:
    world.engines.scripts = {"a:1": world.answer("Grüße 🙂 Paris", cached=3)}
    result = await world.inference.chat(ALICE, ASK)

    prompt = render_prompt(world.tokenizer, [{"role": "user", "content": "Hello"}])
    _, call = world.engines.calls[0]
    assert list(call.prompt) == prompt
    assert (call.adapter, call.max_tokens, call.top_logprobs) == (None, 200 - len(prompt), -1)
    assert call.stop_token_ids == world.tokenizer.eos_ids
    choice = result.choices[0]
    assert (choice.content, choice.finish_reason, choice.logprobs) == ("Grüße 🙂 Paris", "stop", ())
    completion = len(world.tokenizer.encode("Grüße 🙂 Paris")) + 1
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(prompt), completion)
    assert result.usage.cached_prompt_tokens == 3
    assert result.head.id.startswith("chatcmpl-") and result.head.system_fingerprint.startswith("fp_")
    assert world.engines.open == 0


async def test_a_base_without_a_chat_template_takes_no_messages(tmp_path: Path) -> None:
    world = World(Tokenizer.from_folder(build_tiny_tokenizer(tmp_path, chat_template=None)))
    with pytest.raises(InvalidArgument, match=r"tiny completes text.*chat_template\.jinja") as raised:
        await world.inference.chat(ALICE, ASK)
    assert [violation.field for violation in raised.value.violations] == ["messages"]


async def test_the_stream_has_role_first_finish_then_usage_last(world: World) -> None:
    world.engines.scripts = {"a:1": world.answer("one two", end=False)}
    deltas = await gather(world, ASK)
    choices = [d.choice for d in deltas if d.choice is not None]
    assert [c.role for c in choices].count("assistant") == 1 and choices[0].role == "assistant"
    assert choices[-1].finish_reason == "length" and not any(c.finish_reason for c in choices[:-1])
    assert text_of(deltas) == "one two"
    assert deltas[-1].choice is None and deltas[-1].usage is not None
    assert not any(d.usage for d in deltas[:-1])


async def test_a_stop_string_ends_the_engines_stream(world: World) -> None:
    world.engines.scripts = {"a:1": [*world.answer("The capital of France"), asyncio.Event()]}
    result = await world.inference.chat(ALICE, replace(ASK, stop=("tal o", "zzz")))
    assert (result.choices[0].content, result.choices[0].finish_reason) == ("The capi", "stop")
    assert world.engines.open == 0


async def test_text_held_for_a_stop_string_comes_at_the_end(world: World) -> None:
    world.engines.scripts = {"a:1": world.answer("The cap")}
    result = await world.inference.chat(ALICE, replace(ASK, stop=("capital",)))
    assert result.choices[0].content == "The cap"


async def test_logprobs(world: World) -> None:
    world.engines.scripts = {"a:1": world.answer("Hi")}
    result = await world.inference.chat(ALICE, replace(ASK, logprobs=True, top_logprobs=2))
    assert world.engines.calls[0][1].top_logprobs == 2
    logprobs = result.choices[0].logprobs
    assert b"".join(item.token_bytes for item in logprobs) == b"Hi"
    assert len(logprobs[0].top) == 2 and logprobs[0].logprob == -0.5


async def test_top_p_of_zero_is_not_unset(world: World) -> None:
    world.engines.scripts = {"a:1": world.answer("Hi")}
    await world.inference.chat(ALICE, replace(ASK, top_p=0.0))
    assert 0 < world.engines.calls[0][1].top_p < 0.001


async def test_several_choices_differ_in_seed(world: World) -> None:
    world.engines.scripts = {"a:1": world.answer("one"), "b:1": world.answer("two")}
    result = await world.inference.chat(ALICE, replace(ASK, n=4, seed=7))
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert {choice.content for choice in result.choices} == {"one", "two"}
    assert sorted(call.seed or 0 for _, call in world.engines.calls) == [7, 8, 9, 10]
    assert world.engines.open == 0


async def test_one_failing_choice_ends_all(world: World) -> None:
    world.engines.scripts = {
        "a:1": [SampleEvent((SampledToken(70),)), asyncio.Event()],
        "b:1": [ResourceExhausted("full", retry_after=1)],
    }
    with pytest.raises(ResourceExhausted):
        await world.inference.chat(ALICE, replace(ASK, n=2))
    assert world.engines.open == 0


async def test_tool_calls_are_parsed_and_never_shown_as_text(world: World) -> None:
    written = 'Let me see.<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    world.engines.scripts = {"a:1": world.answer(written)}
    deltas = await gather(world, replace(ASK, tools=(WEATHER,)))
    assert text_of(deltas) == "Let me see."
    calls = [call for d in deltas if d.choice is not None for call in d.choice.tool_calls]
    assert [(c.name, c.arguments) for c in calls] == [("get_weather", '{"city": "Paris"}')]
    assert calls[0].id.startswith("call_")
    last = deltas[-2].choice
    assert last is not None and last.finish_reason == "tool_calls"

    result = await world.inference.chat(ALICE, replace(ASK, tools=(WEATHER,)))
    assert result.choices[0].finish_reason == "tool_calls"


async def test_text_that_only_looks_like_a_call_comes_whole(world: World) -> None:
    for text in ('{"a": 1}', "<tool_call>broken", "a < b and <tool"):
        world.engines.scripts = {"a:1": world.answer(text)}
        world.directory.suspect("eng-b")
        result = await world.inference.chat(ALICE, replace(ASK, tools=(WEATHER,)))
        assert (result.choices[0].content, result.choices[0].finish_reason) == (text, "stop")


async def test_an_engine_lost_before_the_first_token_is_replaced_once(world: World) -> None:
    world.engines.scripts = {"a:1": [Unavailable("refused")], "b:1": world.answer("Hi")}
    assert text_of(await gather(world, ASK)) == "Hi"
    assert [address for address, _ in world.engines.calls] == ["a:1", "b:1"]

    await world.serve(A, B)
    world.engines.scripts = {"a:1": [FailedPrecondition("draining")], "b:1": [Unavailable("refused")]}
    with pytest.raises(Unavailable) as caught:
        await gather(world, ASK)
    assert caught.value.reason == "ENGINE_LOST" and caught.value.retry_after == 1


@pytest.mark.parametrize("end", [[Unavailable("gone")], []])
async def test_an_engine_lost_later_is_an_error(world: World, end: list[Any]) -> None:
    world.engines.scripts = {"a:1": [SampleEvent((SampledToken(70),)), *end], "b:1": world.answer("Hi")}
    with pytest.raises(Unavailable, match="middle"):
        await gather(world, ASK)
    assert len(world.engines.calls) == 1


@pytest.mark.parametrize("began", [True, False])
async def test_a_model_that_gives_no_number_says_so_and_is_not_tried_again(world: World, began: bool) -> None:
    tokens = [SampleEvent((SampledToken(70),))] if began else []
    world.engines.scripts = {"a:1": [*tokens, Internal("not finite", reason="MODEL_NOT_FINITE")]}
    for _ in range(2):  # nor is the engine thought to be lost
        with pytest.raises(Internal, match="not finite") as caught:
            await world.inference.chat(ALICE, ASK)
        assert caught.value.reason == "MODEL_NOT_FINITE"
    assert [address for address, _ in world.engines.calls] == ["a:1", "a:1"]
    assert world.engines.open == 0


async def test_a_client_that_goes_frees_the_engine(world: World) -> None:
    world.engines.scripts = {"a:1": [SampleEvent((SampledToken(70),)), asyncio.Event()]}
    async with aclosing(world.inference.stream(ALICE, ASK)) as deltas:
        await anext(deltas)
        assert world.engines.open == 1
    assert world.engines.open == 0

    task = asyncio.create_task(world.inference.chat(ALICE, replace(ASK, n=3)))
    while not world.engines.open:  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.engines.open == 0


async def test_context_is_checked_with_counts(world: World) -> None:
    for request in (replace(ASK, max_tokens=200), replace(ASK, messages=_long_messages())):
        with pytest.raises(InvalidArgument) as caught:
            await world.inference.chat(ALICE, request)
        assert caught.value.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert caught.value.metadata["context_length"] == "200"
        assert int(caught.value.metadata["prompt_tokens"]) > 0
    assert world.engines.calls == []


def _long_messages() -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": "word " * 300},)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ("a",) * 5}, "stop"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"messages": ({"role": "owl", "content": "x"},)}, "messages[0].role"),
        ({"messages": ()}, "messages"),
    ],
)
async def test_ranges(world: World, change: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await world.inference.chat(ALICE, replace(ASK, **change), prefix="completion.")
    assert [item.field for item in caught.value.violations] == [f"completion.{path}"]


async def test_a_deployment_stands_for_its_model(world: World) -> None:
    name = "projects/acme/deployments/support"
    now = world.clock.now()
    await world.deployments.add(Deployment(name, TUNED, now, now), "")
    world.engines.scripts = {"a:1": world.answer("Hi"), "b:1": world.answer("Hi")}
    for _ in range(2):
        result = await world.inference.chat(ALICE, replace(ASK, model="support"))
        assert result.head.model == "support"
    assert [call.adapter for _, call in world.engines.calls] == [ADAPTER, ADAPTER]
    # The engine that has the adapter is asked again, and the model is remembered for five seconds.
    assert len({address for address, _ in world.engines.calls}) == 1
    assert world.models.calls == 1
    world.clock.tick(5)
    await world.inference.chat(ALICE, replace(ASK, model="support"))
    assert world.models.calls == 2


async def test_models_of_others_do_not_exist(world: World) -> None:
    for who, model in ((ALICE, "nothing"), (Principal("other", "member", "k"), TUNED)):
        with pytest.raises(NotFound) as caught:
            await world.inference.chat(who, replace(ASK, model=model))
        assert caught.value.reason == "MODEL_NOT_FOUND"
    with pytest.raises(PermissionDenied):
        await world.inference.chat(Principal("acme", "viewer", "k"), ASK)


async def test_metrics(world: World) -> None:
    world.engines.scripts = {"a:1": world.answer("one two three")}
    result = await world.inference.chat(ALICE, ASK)
    registry = world.metrics.registry
    assert registry.get_sample_value("lathe_time_to_first_token_seconds_count") == 1
    assert registry.get_sample_value("lathe_time_per_output_token_seconds_count") == 1
    sampled = registry.get_sample_value("lathe_chat_tokens_total", {"kind": "completion"})
    assert sampled == result.usage.completion_tokens
