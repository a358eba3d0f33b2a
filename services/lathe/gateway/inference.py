"""Chat completions: from a model id and messages to tokens on an engine, and back to text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from lathe.common.clock import Clock
from lathe.common.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unavailable
from lathe.common.ids import IdFactory
from lathe.common.metrics import Metrics
from lathe.common.rpc.principal import Principal, Role
from lathe.gateway.auth import demand_role
from lathe.gateway.choice import ChoiceText
from lathe.gateway.engines import EngineDirectory
from lathe.gateway.model import (
    ChatChoice,
    ChatDelta,
    ChatHead,
    ChatRequest,
    ChatResult,
    ChoiceDelta,
    FunctionToolCall,
    SampleCall,
    SampleEvent,
    ServedModel,
    TokenLogprob,
    Usage,
    system_fingerprint,
    validate_chat,
)
from lathe.gateway.ports import TokenizerSource
from lathe.gateway.resolve import ModelDirectory
from lathe.text.chat import parse_messages
from lathe.text.render import render_prompt
from lathe.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")

# More choices than this at once would push everybody else's requests out of an engine.
_CHOICES_AT_ONCE = 16
_LEAST_TOP_P = 1e-6


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request ready to be sampled. started is on the clock's monotonic scale, in seconds."""

    request: ChatRequest
    model: ServedModel
    tokenizer: Tokenizer
    prompt: tuple[int, ...]
    max_tokens: int
    head: ChatHead
    started: float


@dataclass(slots=True)
class _Count:
    """What a request used so far."""

    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    first_token_at: float | None = None


@dataclass(slots=True)
class _Gathered:
    """One choice, put together from its deltas."""

    text: list[str] = field(default_factory=list)
    tool_calls: list[FunctionToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "stop"

    def add(self, delta: ChoiceDelta) -> None:
        self.text.append(delta.content or "")
        self.tool_calls.extend(delta.tool_calls)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason

    def choice(self, index: int) -> ChatChoice:
        text = "".join(self.text)
        content = None if self.tool_calls and not text.strip() else text
        return ChatChoice(index, content, tuple(self.tool_calls), self.finish_reason, tuple(self.logprobs))


class Inference:
    """Answers chat requests of every door."""

    def __init__(
        self,
        models: ModelDirectory,
        tokenizers: TokenizerSource,
        engines: EngineDirectory,
        *,
        clock: Clock,
        ids: IdFactory,
        metrics: Metrics,
        version: str,
        engine_start_timeout_s: float = 120.0,
    ) -> None:
        self._models = models
        self._tokenizers = tokenizers
        self._engines = engines
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._version = version
        self._start_timeout_s = engine_start_timeout_s

    async def chat(self, principal: Principal, request: ChatRequest, *, prefix: str = "") -> ChatResult:
        """The whole answer. Raises what `stream` raises."""
        gathered = [_Gathered() for _ in range(max(request.n, 1))]
        head: ChatHead | None = None
        usage: Usage | None = None
        async with aclosing(self.stream(principal, request, prefix=prefix)) as deltas:
            async for delta in deltas:
                head = delta.head
                usage = delta.usage or usage
                if delta.choice is not None:
                    gathered[delta.choice.index].add(delta.choice)
        assert head is not None and usage is not None  # the last delta always has both
        return ChatResult(head, tuple(one.choice(index) for index, one in enumerate(gathered)), usage)

    async def stream(
        self, principal: Principal, request: ChatRequest, *, prefix: str = ""
    ) -> AsyncGenerator[ChatDelta, None]:
        """The answer as it is sampled; closing the generator frees the engine.

        The first item comes with the first token: all that can be refused is raised before it. prefix: put
        before the fields' paths in errors. Raises InvalidArgument (ranges, messages, context), NotFound (the
        model), Unavailable (no engine, or lost on the way), ResourceExhausted (the engine is full).
        """
        prepared = await self._prepare(principal, request, prefix)
        count = _Count()
        choices = [self._choice(prepared, index, count) for index in range(request.n)]
        try:
            async with aclosing(choices[0] if request.n == 1 else merge(choices)) as deltas:
                async for delta in deltas:
                    yield ChatDelta(prepared.head, delta)
            usage = Usage(len(prepared.prompt), count.completion_tokens, count.cached_prompt_tokens)
            yield ChatDelta(prepared.head, None, usage)
        finally:
            self._metrics.chat_tokens.labels("prompt").inc(len(prepared.prompt))
            self._metrics.chat_tokens.labels("cached_prompt").inc(count.cached_prompt_tokens)
            self._metrics.chat_tokens.labels("completion").inc(count.completion_tokens)

    async def _prepare(self, principal: Principal, request: ChatRequest, prefix: str) -> _Prepared:
        started = self._clock.monotonic()
        demand_role(principal, Role.MEMBER)
        validate_chat(request, prefix)
        conversation = parse_messages(
            [dict(message) for message in request.messages],
            [dict(tool) for tool in request.tools] or None,
            prefix,
        )
        model = await self._models.resolve(principal, request.model)
        tokenizer = await self._tokenizers.get(model.base)
        if not tokenizer.has_template:
            raise InvalidArgument(
                f"{request.model} completes text and takes no messages: its base model {model.base.name} has no chat "
                "template. Import the base model with a chat_template.jinja, or call another model.",
                reason="NO_CHAT_TEMPLATE",
                violations=[FieldViolation(f"{prefix}messages", f"{request.model} has no chat template.")],
            )
        now = self._clock.now()
        # A long prompt takes its time to tokenise, and the loop has other streams to serve.
        prompt = await asyncio.to_thread(
            render_prompt, tokenizer, conversation.messages, conversation.tools, now=now
        )
        max_tokens = room_for(len(prompt), request.max_tokens, model.base.context_length)
        head = ChatHead(
            self._ids.new("chatcmpl"), now, request.model, system_fingerprint(model, self._version)
        )
        return _Prepared(request, model, tokenizer, tuple(prompt), max_tokens, head, started)

    async def _choice(
        self, prepared: _Prepared, index: int, count: _Count
    ) -> AsyncGenerator[ChoiceDelta, None]:
        request = prepared.request
        text = ChoiceText(
            prepared.tokenizer,
            request.stop,
            with_tools=bool(request.tools),
            new_call_id=lambda: f"call_{self._ids.token(24)}",
            parallel_tool_calls=request.parallel_tool_calls,
        )
        role: str | None = "assistant"
        finish: str | None = None
        began: float | None = None
        tokens = 0
        async with aclosing(self._events(prepared, index)) as events:
            async for event in events:
                if index == 0:
                    count.cached_prompt_tokens = max(count.cached_prompt_tokens, event.cached_prompt_tokens)
                if event.tokens and began is None:
                    began = self._first_token(prepared, count)
                content: list[str] = []
                logprobs: list[TokenLogprob] = []
                for token in event.tokens:
                    tokens += 1
                    count.completion_tokens += 1
                    content.append(text.push(token))
                    shown = text.logprob(token) if request.logprobs else None
                    if shown is not None:
                        logprobs.append(shown)
                    if text.stopped:
                        break
                if event.tokens and (role or logprobs or any(content)):
                    yield ChoiceDelta(index, role, "".join(content), logprobs=tuple(logprobs))
                    role = None
                finish = "stop" if text.stopped else event.finish
                if finish is not None:
                    break
        self._per_token(began, tokens)
        rest = text.finish()
        if rest.text or rest.tool_calls or role:
            yield ChoiceDelta(index, role, rest.text or None, rest.tool_calls)
        if rest.tool_calls and finish != "length":
            finish = "tool_calls"
        yield ChoiceDelta(index, finish_reason="stop" if text.stopped and finish is None else finish)

    async def _events(self, prepared: _Prepared, index: int) -> AsyncGenerator[SampleEvent, None]:
        """One sequence's tokens; an engine lost before the first one is replaced once."""
        model = prepared.model
        call = _sample_call(prepared, index)
        adapter = model.adapter.prefix if model.adapter else None
        deadline = prepared.started + self._start_timeout_s
        for attempt in (1, 2):
            channel = await self._engines.engine_for(
                model.base.digest, model.base.name, deadline, adapter=adapter
            )
            began = False
            try:
                async with aclosing(channel.sample(call)) as events:
                    async for event in events:
                        began = began or bool(event.tokens)
                        yield event
                        if event.finish is not None:
                            return
                raise Unavailable("The engine ended the answer before it was finished.")
            except (Unavailable, FailedPrecondition) as error:
                self._engines.suspect(channel.info.engine_id)
                if began:
                    raise _lost("The engine was lost in the middle of the answer") from error
                if attempt == 2:
                    raise _lost("No engine could begin the answer") from error
                log.warning("Engine %s is lost; trying another: %s", channel.info.engine_id, error)

    def _first_token(self, prepared: _Prepared, count: _Count) -> float:
        now = self._clock.monotonic()
        if count.first_token_at is None:
            count.first_token_at = now
            self._metrics.time_to_first_token_seconds.observe(now - prepared.started)
        return now

    def _per_token(self, began: float | None, tokens: int) -> None:
        if began is not None and tokens > 1:
            seconds = (self._clock.monotonic() - began) / (tokens - 1)
            self._metrics.time_per_output_token_seconds.observe(seconds)


def room_for(prompt_tokens: int, max_tokens: int | None, context_length: int) -> int:
    """How many tokens may be sampled: `max_tokens`, or what the context leaves.

    Raises InvalidArgument with reason CONTEXT_LENGTH_EXCEEDED and the counts.
    """
    left = context_length - prompt_tokens
    if left >= 1 and (max_tokens is None or max_tokens <= left):
        return left if max_tokens is None else max_tokens
    asked = f" and max_tokens asks for {max_tokens}" if max_tokens is not None else ""
    raise InvalidArgument(
        f"This model's context holds {context_length} tokens, but messages and tools take "
        f"{prompt_tokens}{asked}. Shorten the messages or lower max_tokens.",
        reason="CONTEXT_LENGTH_EXCEEDED",
        metadata={
            "context_length": str(context_length),
            "prompt_tokens": str(prompt_tokens),
            "max_tokens": str(max_tokens or 0),
        },
    )


def _sample_call(prepared: _Prepared, index: int) -> SampleCall:
    request = prepared.request
    return SampleCall(
        base_digest=prepared.model.base.digest,
        adapter=prepared.model.adapter,
        prompt=prepared.prompt,
        max_tokens=prepared.max_tokens,
        temperature=request.temperature,
        # An engine reads 0 as "unset"; to OpenAI it is the likeliest token alone.
        top_p=max(request.top_p, _LEAST_TOP_P),
        # With one seed for all, n choices would be n times the same.
        seed=None if request.seed is None else (request.seed + index) & (2**63 - 1),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        top_logprobs=request.top_logprobs if request.logprobs else -1,
        stop_token_ids=prepared.tokenizer.eos_ids,
    )


def _lost(what: str) -> Unavailable:
    return Unavailable(f"{what}; send the request again.", reason="ENGINE_LOST", retry_after=1.0)


@dataclass(frozen=True, slots=True)
class _End:
    """A source has ended, by an error or not."""

    error: Exception | None


async def merge(
    sources: Sequence[AsyncGenerator[T, None]], at_once: int = _CHOICES_AT_ONCE
) -> AsyncGenerator[T, None]:
    """The items of several generators as they come, `at_once` of them running; the first error ends all."""
    queue: asyncio.Queue[T | _End] = asyncio.Queue(maxsize=4 * at_once)
    room = asyncio.Semaphore(at_once)

    async def pump(source: AsyncGenerator[T, None]) -> None:
        error: Exception | None = None
        try:
            async with room, aclosing(source):
                async for item in source:
                    await queue.put(item)
        except Exception as raised:
            error = raised  # handed over to the consumer, who raises it
        await queue.put(_End(error))

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if not isinstance(item, _End):
                yield item
                continue
            if item.error is not None:
                raise item.error
            left -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
