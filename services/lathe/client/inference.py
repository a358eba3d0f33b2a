"""OpenAI's message objects to the contract's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.v1 import inference_pb2 as pb

OPTIONS = frozenset(
    {
        *(
            "tools",
            "temperature",
            "top_p",
            "max_tokens",
            "stop",
            "seed",
            "presence_penalty",
            "frequency_penalty",
        ),
        *("logit_bias", "logprobs", "top_logprobs", "n"),
    }
)


def chat_request(
    project: str, model: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> pb.CreateChatCompletionRequest:
    """The request for `chat`. Raises InvalidArgument naming what cannot be sent."""
    for name in options:
        if name not in OPTIONS:
            raise _invalid(name, f"There is no option {name!r}; there are {', '.join(sorted(OPTIONS))}.")
    given = {name: value for name, value in options.items() if value is not None}
    stop = given.pop("stop", ())
    request = pb.CreateChatCompletionRequest(
        parent=project,
        model=model,
        stop=[stop] if isinstance(stop, str) else list(stop),
        tools=[_struct(tool, f"tools[{index}]") for index, tool in enumerate(given.pop("tools", ()))],
        logit_bias={int(token): float(bias) for token, bias in given.pop("logit_bias", {}).items()},
        **given,
    )
    for index, message in enumerate(messages):
        try:
            ParseDict(_message(message), request.messages.add())
        except ParseError as error:
            raise _invalid(f"messages[{index}]", f"messages[{index}] cannot be sent: {error}.") from error
    return request


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    # A null is the same as a missing field here, and the contract's text has no parts.
    plain = {name: value for name, value in message.items() if value is not None and name != "weight"}
    content = plain.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        plain["content"] = "".join(part.get("text", "") for part in content)
    return plain


def _struct(value: Mapping[str, Any], field: str) -> Struct:
    struct = Struct()
    try:
        ParseDict(dict(value), struct)
    except (ParseError, TypeError) as error:
        raise _invalid(field, f"{field} must be a JSON object: {error}.") from error
    return struct


def _invalid(field: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, violations=[FieldViolation(field, message)])
