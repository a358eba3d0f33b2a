"""Chat and deployments: proto to model and back."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from lathe.gateway.model import (
    ChatChoice,
    ChatDelta,
    ChatRequest,
    ChatResult,
    ChoiceDelta,
    Deployment,
    FunctionToolCall,
    TokenLogprob,
    Usage,
)
from lathe.v1 import deployments_pb2, inference_pb2


def chat_request(request: inference_pb2.CreateChatCompletionRequest) -> ChatRequest:
    """Unset fields get OpenAI's defaults."""
    return ChatRequest(
        model=request.model,
        messages=tuple(_message(message) for message in request.messages),
        tools=tuple(_plain(MessageToDict(tool)) for tool in request.tools),
        temperature=request.temperature if request.HasField("temperature") else 1.0,
        top_p=request.top_p if request.HasField("top_p") else 1.0,
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        stop=tuple(request.stop),
        seed=request.seed if request.HasField("seed") else None,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=dict(request.logit_bias),
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        n=request.n or 1,
    )


def _plain(value: Any) -> Any:
    """A Struct knows doubles only: whole numbers become integers again, as the client's JSON had them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role}
    if message.HasField("content"):
        fields["content"] = message.content
    if message.name:
        fields["name"] = message.name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": call.type or "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return fields


def chat_completion(result: ChatResult) -> inference_pb2.ChatCompletion:
    return inference_pb2.ChatCompletion(
        id=result.head.id,
        create_time=timestamp(result.head.created),
        model=result.head.model,
        choices=[_choice(choice) for choice in result.choices],
        usage=_usage(result.usage),
        system_fingerprint=result.head.system_fingerprint,
    )


def chat_chunk(delta: ChatDelta) -> inference_pb2.ChatCompletionChunk:
    return inference_pb2.ChatCompletionChunk(
        id=delta.head.id,
        create_time=timestamp(delta.head.created),
        model=delta.head.model,
        choices=[_delta(delta.choice)] if delta.choice is not None else [],
        usage=_usage(delta.usage) if delta.usage is not None else None,
        system_fingerprint=delta.head.system_fingerprint,
    )


def _choice(choice: ChatChoice) -> inference_pb2.ChatChoice:
    message = inference_pb2.ChatMessage(
        role="assistant",
        content=choice.content,
        tool_calls=[_tool_call(call) for call in choice.tool_calls],
    )
    return inference_pb2.ChatChoice(
        index=choice.index,
        message=message,
        finish_reason=choice.finish_reason,
        logprobs=[_logprob(logprob) for logprob in choice.logprobs],
    )


def _delta(delta: ChoiceDelta) -> inference_pb2.ChatChoiceDelta:
    message = inference_pb2.ChatMessage(
        role=delta.role or "",
        content=delta.content,
        tool_calls=[_tool_call(call) for call in delta.tool_calls],
    )
    return inference_pb2.ChatChoiceDelta(
        index=delta.index,
        delta=message,
        finish_reason=delta.finish_reason or "",
        logprobs=[_logprob(logprob) for logprob in delta.logprobs],
    )


def _tool_call(call: FunctionToolCall) -> inference_pb2.ToolCall:
    function = inference_pb2.FunctionCall(name=call.name, arguments=call.arguments)
    return inference_pb2.ToolCall(id=call.id, type="function", function=function)


def _logprob(item: TokenLogprob) -> inference_pb2.ChatTokenLogprob:
    return inference_pb2.ChatTokenLogprob(
        token=item.token,
        logprob=item.logprob,
        token_bytes=item.token_bytes,
        top_logprobs=[
            inference_pb2.ChatTopLogprob(token=top.token, logprob=top.logprob, token_bytes=top.token_bytes)
            for top in item.top
        ],
    )


def _usage(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
    )


def deployment_pb(deployment: Deployment) -> deployments_pb2.Deployment:
    return deployments_pb2.Deployment(
        name=deployment.name,
        model_id=deployment.model_id,
        create_time=timestamp(deployment.create_time),
        update_time=timestamp(deployment.update_time),
        etag=deployment.etag,
    )


def timestamp(moment: datetime) -> Timestamp:
    result = Timestamp()
    result.FromDatetime(moment)
    return result
