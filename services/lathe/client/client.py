"""`Client`: one connection, and a room for each kind of resource."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from lathe.client.accounts import Keys, Projects
from lathe.client.datasets import Datasets
from lathe.client.deployments import Deployments
from lathe.client.inference import chat_request
from lathe.client.jobs import Jobs
from lathe.client.lineage import Lineage
from lathe.client.models import Adapters, Models
from lathe.client.transport import Tls, Transport
from lathe.common.errors import Unavailable
from lathe.v1 import accounts_pb2, diagnosis_pb2, inference_pb2
from lathe.v1.accounts_pb2_grpc import AccountsServiceStub
from lathe.v1.diagnosis_pb2_grpc import PlatformServiceStub
from lathe.v1.inference_pb2_grpc import InferenceServiceStub

# HealthCheckResponse{status: SERVING}
_SERVING = b"\x08\x01"


class Client:
    """A platform, as one API key sees it.

    address: the gateway's `host:port`. timeout: seconds per call, its retries included. Nothing is sent before the
    first call; that one also asks which project the key belongs to.
    """

    def __init__(self, address: str, api_key: str, *, tls: Tls | None = None, timeout: float = 30.0) -> None:
        self.address = address
        self._transport = Transport(address, api_key, tls=tls, timeout=timeout)

    @cached_property
    def project(self) -> str:
        """`projects/{project}` of the key."""
        return self.caller().project

    @cached_property
    def datasets(self) -> Datasets:
        return Datasets(self._transport, self.project)

    @cached_property
    def models(self) -> Models:
        return Models(self._transport)

    @cached_property
    def adapters(self) -> Adapters:
        return Adapters(self._transport, self.project)

    @cached_property
    def jobs(self) -> Jobs:
        return Jobs(self._transport, self.project)

    @cached_property
    def lineage(self) -> Lineage:
        return Lineage(self.datasets, self.adapters, self.jobs)

    @cached_property
    def keys(self) -> Keys:
        return Keys(self._transport, self.project)

    @cached_property
    def projects(self) -> Projects:
        return Projects(self._transport)

    @cached_property
    def deployments(self) -> Deployments:
        return Deployments(self._transport, self.project)

    def caller(self) -> accounts_pb2.Caller:
        """Who the key is. Raises Unauthenticated."""
        stub = AccountsServiceStub(self._transport.channel)
        return self._transport.call(stub.GetCaller, accounts_pb2.GetCallerRequest())

    def check(self, *, timeout: float = 5.0) -> None:
        """Raise Unavailable unless the platform says that it is well. Needs no valid key."""
        # The protocol is gRPC's own and one number long: no package is needed for it.
        answer: bytes = self._transport.once(
            self._transport.channel.unary_unary("/grpc.health.v1.Health/Check"), b"", timeout=timeout
        )
        if answer != _SERVING:
            raise Unavailable("It answers, but says that it does not serve now.", reason="NOT_SERVING")

    def diagnose(self, *, timeout: float = 30.0) -> diagnosis_pb2.PlatformDiagnosis:
        """Have the platform examine itself: every service, its database and store, and what engines run on.

        For admins of the default project. Raises PermissionDenied to others.
        """
        stub = PlatformServiceStub(self._transport.channel)
        return self._transport.call(stub.Diagnose, diagnosis_pb2.DiagnoseRequest(), timeout=timeout)

    def chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, timeout: float = 300.0, **options: Any
    ) -> inference_pb2.ChatCompletion:
        """Sample an answer.

        messages: OpenAI's message objects. options: tools, temperature, top_p, max_tokens, stop, seed,
        presence_penalty, frequency_penalty, logit_bias, logprobs, top_logprobs, n. Raises NotFound for an unknown
        model, InvalidArgument naming the field, Unavailable when no engine could be had.
        """
        request = chat_request(self.project, model, messages, options)
        stub = InferenceServiceStub(self._transport.channel)
        return self._transport.once(stub.CreateChatCompletion, request, timeout=timeout)

    def chat_stream(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, timeout: float = 300.0, **options: Any
    ) -> Iterator[inference_pb2.ChatCompletionChunk]:
        """The same as `chat`, chunk by chunk as it is sampled; the last chunk has the usage."""
        request = inference_pb2.StreamChatCompletionRequest(
            completion=chat_request(self.project, model, messages, options)
        )
        stub = InferenceServiceStub(self._transport.channel)
        return self._transport.stream(stub.StreamChatCompletion, request, timeout=timeout)

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
