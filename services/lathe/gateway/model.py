"""What the gateway works with: chat requests and answers, engines, deployments; and the rules on them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from lathe.common.errors import FieldViolation, InvalidArgument

MAX_STOPS = 4
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
_DEPLOYMENT_ID = re.compile(r"[a-z0-9._-]{1,63}")


# --- chat -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat completion in OpenAI's terms; messages and tools are OpenAI's objects as they are."""

    model: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int = 0
    n: int = 1
    parallel_tool_calls: bool = True


@dataclass(frozen=True, slots=True)
class FunctionToolCall:
    """A call of a function that the model wrote; arguments is JSON as it wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """A token that could have been sampled, with its natural-log probability."""

    token: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token, its natural-log probability, and the likeliest ones in its place."""

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; cached ones are part of the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ChatHead:
    """What every part of one answer repeats. model is what the client wrote."""

    id: str
    created: datetime
    model: str
    system_fingerprint: str


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One finished answer. content is None when the model only called tools."""

    index: int
    content: str | None
    tool_calls: tuple[FunctionToolCall, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatResult:
    """A whole completion."""

    head: ChatHead
    choices: tuple[ChatChoice, ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice gained. role is set in its first delta, finish_reason in its last."""

    index: int
    role: str | None = None
    content: str | None = None
    tool_calls: tuple[FunctionToolCall, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """One item of a streamed completion; the last one alone has usage, and no choice."""

    head: ChatHead
    choice: ChoiceDelta | None
    usage: Usage | None = None


def validate_chat(request: ChatRequest, prefix: str = "") -> None:
    """Check every range at once. Raises InvalidArgument with one violation per wrong field.

    prefix: put before each field's path, such as `completion.`.
    """
    found: list[FieldViolation] = []

    def demand(holds: bool, name: str, rule: str) -> None:
        if not holds:
            found.append(FieldViolation(prefix + name, f"{prefix}{name} must be {rule}."))

    demand(bool(request.model), "model", "the id of a model or deployment")
    demand(bool(request.messages), "messages", "a list of at least one message")
    demand(0 <= request.temperature <= 2, "temperature", "between 0 and 2")
    demand(0 <= request.top_p <= 1, "top_p", "between 0 and 1")
    demand(request.max_tokens is None or request.max_tokens >= 1, "max_tokens", "1 or more")
    demand(len(request.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings")
    demand(all(request.stop), "stop", "strings of at least one character")
    demand(request.seed is None or -(2**63) <= request.seed < 2**63, "seed", "a 64-bit integer")
    demand(-2 <= request.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
    demand(-2 <= request.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
    demand(
        all(token >= 0 and -100 <= bias <= 100 for token, bias in request.logit_bias.items()),
        "logit_bias",
        "a map from token ids to biases between -100 and 100",
    )
    demand(0 <= request.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", f"between 0 and {MAX_TOP_LOGPROBS}")
    demand(request.logprobs or not request.top_logprobs, "top_logprobs", "0 unless logprobs is true")
    demand(1 <= request.n <= MAX_CHOICES, "n", f"between 1 and {MAX_CHOICES}")
    if found:
        raise InvalidArgument(" ".join(item.description for item in found), violations=found)


# --- models and engines -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a base model: its path in the folder, and the object that holds its bytes."""

    path: str
    object_key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class BaseModelRef:
    """A base model as the gateway needs it. name is `baseModels/{id}`."""

    name: str
    digest: str
    context_length: int
    files: tuple[StoredFile, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Where an adapter's files are, and the digest of the manifest that lists them."""

    prefix: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a model id means: a base model, with an adapter on it or without."""

    base: BaseModelRef
    adapter: AdapterRef | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine as `jobs` lists it."""

    engine_id: str
    address: str
    base_model: str
    base_digest: str
    max_sequences: int = 1
    active_sequences: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class SampleCall:
    """One sequence to sample. top_logprobs -1 asks for no logprobs at all."""

    base_digest: str
    adapter: AdapterRef | None
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = -1
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token an engine sampled; top holds (token, logprob) of the likeliest ones."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SampleEvent:
    """One message of an engine's stream. finish is `stop` or `length` in the last one."""

    tokens: tuple[SampledToken, ...] = ()
    finish: Literal["stop", "length"] | None = None
    cached_prompt_tokens: int = 0


def system_fingerprint(model: ServedModel, version: str) -> str:
    """Changes when the weights behind the model id or the code change."""
    adapter = model.adapter.manifest_sha256 if model.adapter else ""
    return "fp_" + hashlib.sha256(f"{model.base.digest}\n{adapter}\n{version}".encode()).hexdigest()[:10]


# --- uploads ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UploadTarget:
    """Where the bytes of a dataset go while they come in; open until the upload was committed. in_parts: it takes
    parts, not a stream."""

    staging_key: str
    open: bool
    in_parts: bool = False


@dataclass(frozen=True, slots=True)
class PartTarget:
    """Where one part of an upload goes, and the most bytes that it may have."""

    part_id: str
    object_key: str
    max_bytes: int


@dataclass(frozen=True, slots=True)
class AnnouncedFile:
    """A file that an import named: size in bytes, sha256 in lower-case hex, and whether the platform has it already."""

    size: int
    sha256: str
    stored: bool


@dataclass(frozen=True, slots=True)
class StoredUpload:
    """A finished upload: one object, or the prefix of its parts; size in bytes, sha256 in lower-case hex."""

    staging_key: str
    size: int
    sha256: str


# --- deployments and idempotency --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deployment:
    """A name that clients call and the model id behind it. version rises with each update."""

    name: str
    model_id: str
    create_time: datetime
    update_time: datetime
    version: int = 1

    @property
    def etag(self) -> str:
        return hashlib.sha256(f"{self.name}\n{self.version}".encode()).hexdigest()[:16]


def check_deployment_id(deployment_id: str) -> None:
    """Raises InvalidArgument unless it is 1 to 63 of [a-z0-9._-]."""
    if not _DEPLOYMENT_ID.fullmatch(deployment_id) or not deployment_id[0].isalnum():
        message = (
            f"deployment_id {deployment_id!r} must be 1 to 63 lower-case letters, digits and any of . _ -, "
            f"beginning with a letter or digit."
        )
        raise InvalidArgument(message, violations=[FieldViolation("deployment_id", message)])


@dataclass(frozen=True, slots=True)
class IdempotencyRow:
    """One create at the HTTP door: who asked for what, and the answer once there is one."""

    id: str
    key_id: str
    path: str
    digest: str
    state: Literal["running", "done"]
    created: datetime
    status: int | None = None
    body: bytes | None = None
