"""Chat completions: OpenAI's JSON to the gateway's request, and its answers back. Pure."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from lathe.gateway.http.answers import Json, seconds
from lathe.gateway.http.errors import invalid, unsupported
from lathe.gateway.http.requests import Model
from lathe.gateway.model import (
    ChatChoice,
    ChatDelta,
    ChatHead,
    ChatRequest,
    ChatResult,
    ChoiceDelta,
    FunctionToolCall,
    TokenLogprob,
    Usage,
)


class StreamOptions(Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatBody(Model):
    """POST /v1/chat/completions. What Lathe does not offer is declared too, so that it is refused by name.

    Accepted without effect: store, metadata, user, service_tier, safety_identifier, prompt_cache_key,
    prompt_cache_retention.
    """

    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None

    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


_UNSUPPORTED = {
    "audio": "audio is not supported; ask for text.",
    "function_call": "function_call is deprecated and not supported; use tool_choice.",
    "functions": "functions is deprecated and not supported; use tools.",
    "moderation": "moderation is not supported; leave it out.",
    "prediction": "prediction is not supported; leave it out.",
    "prompt_cache_options": "prompt_cache_options is not supported; leave it out.",
    "reasoning_effort": "reasoning_effort is not supported; leave it out.",
    "verbosity": "verbosity is not supported; leave it out.",
    "web_search_options": "web_search_options is not supported; leave it out.",
}


def chat_request(body: ChatBody) -> ChatRequest:
    """Raises Unimplemented for what Lathe does not offer, InvalidArgument for what contradicts itself; ranges
    are checked by Inference."""
    _refuse_unsupported(body)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("max_tokens", "max_tokens is deprecated: give max_completion_tokens alone.")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options is only allowed when stream is true.")
    if body.tools is None and body.tool_choice not in (None, "none"):
        raise invalid("tool_choice", "tool_choice is only allowed when tools are given.")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    tools = tuple(body.tools or ()) if body.tool_choice != "none" else ()
    return ChatRequest(
        model=body.model,
        messages=tuple(body.messages),
        tools=tools,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        stop=stop,
        seed=body.seed,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        n=1 if body.n is None else body.n,
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )


def field_names(body: ChatBody) -> tuple[tuple[str, str], ...]:
    """What the gateway's fields were called by this client, for errors."""
    return (("max_tokens", "max_completion_tokens"),) if body.max_completion_tokens is not None else ()


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _refuse_unsupported(body: ChatBody) -> None:
    for name, message in _UNSUPPORTED.items():
        if getattr(body, name) is not None:
            raise unsupported(name, message)
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise unsupported("response_format", "response_format: only the type 'text' is supported.")
    if body.modalities is not None and body.modalities != ["text"]:
        raise unsupported("modalities", "modalities: only ['text'] is supported.")
    if body.tool_choice not in (None, "auto", "none"):
        raise unsupported("tool_choice", "tool_choice: only 'auto' and 'none' are supported.")


# --- answers ----------------------------------------------------------------------------------------------


def completion_json(result: ChatResult) -> Json:
    """chat.completion"""
    return {
        **_head(result.head, "chat.completion"),
        "choices": [_choice(choice) for choice in result.choices],
        "usage": usage_json(result.usage),
    }


def chunks_json(delta: ChatDelta, *, include_usage: bool) -> list[Json]:
    """The chat.completion.chunks of one delta: the role comes in one of its own, as OpenAI sends it.

    include_usage: the client asked for usage; then the last chunk has it and no choices, the others null.
    """
    head = {**_head(delta.head, "chat.completion.chunk")}
    if include_usage:
        head["usage"] = None
    chunks: list[Json] = []
    if delta.choice is not None:
        chunks += [{**head, "choices": [choice]} for choice in _choice_deltas(delta.choice)]
    if delta.usage is not None and include_usage:
        chunks.append({**head, "choices": [], "usage": usage_json(delta.usage)})
    return chunks


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _head(head: ChatHead, kind: str) -> Json:
    return {
        "id": head.id,
        "object": kind,
        "created": seconds(head.created),
        "model": head.model,
        "service_tier": "default",
        "system_fingerprint": head.system_fingerprint,
    }


def _choice(choice: ChatChoice) -> Json:
    message: Json = {"role": "assistant", "content": choice.content, "refusal": None, "annotations": []}
    if choice.tool_calls:
        message["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _choice_deltas(choice: ChoiceDelta) -> list[Json]:
    found: list[Json] = []

    def add(delta: Json, logprobs: Sequence[TokenLogprob] = (), finish: str | None = None) -> None:
        found.append(
            {
                "index": choice.index,
                "delta": delta,
                "logprobs": _logprobs(logprobs),
                "finish_reason": finish,
            }
        )

    if choice.role is not None:
        add({"role": choice.role, "content": "", "refusal": None})
    delta: Json = {}
    if choice.content:
        delta["content"] = choice.content
    if choice.tool_calls:
        delta["tool_calls"] = [
            {"index": index, **_tool_call(call)} for index, call in enumerate(choice.tool_calls)
        ]
    if delta or choice.logprobs or choice.finish_reason is not None:
        add(delta, choice.logprobs, choice.finish_reason)
    return found


def _tool_call(call: FunctionToolCall) -> Json:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> Json | None:
    if not tokens:
        return None
    return {
        "content": [
            {
                "token": item.token,
                "logprob": item.logprob,
                "bytes": list(item.token_bytes),
                "top_logprobs": [
                    {"token": top.token, "logprob": top.logprob, "bytes": list(top.token_bytes)}
                    for top in item.top
                ],
            }
            for item in tokens
        ],
        "refusal": None,
    }
