"""What a model would find in a dataset: its audit, and rows as the model sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from lathe.client.names import full_name
from lathe.client.transport import Transport
from lathe.common.errors import DeadlineExceeded
from lathe.v1 import datasets_pb2 as pb
from lathe.v1.datasets_pb2_grpc import DatasetsServiceStub

T = TypeVar("T")


class Audits:
    """The part of `Datasets` that needs a model."""

    def __init__(self, transport: Transport, project: str) -> None:
        self._transport = transport
        self._project = project
        self._stub = DatasetsServiceStub(transport.channel)

    def audit(
        self,
        name: str,
        model: str,
        *,
        method: str = "supervised",
        context_limit: int = 0,
        truncation: str = "",
        validation_dataset: str = "",
        timeout: float = 600.0,
    ) -> pb.Audit:
        """What a job on `model` would find in a dataset, once it is READY or ERROR; `report` has it by code.

        context_limit: tokens; 0 for the model's own. truncation: `end` cuts longer rows, `error` refuses them.
        validation_dataset: rows that it has too are findings. Raises NotFound, InvalidArgument, FailedPrecondition,
        DeadlineExceeded.
        """
        request = pb.AuditDatasetRequest(
            name=self._name(name),
            model=model,
            options=pb.AuditOptions(method=method, context_limit=context_limit, truncation=truncation),
            validation_dataset=self._name(validation_dataset) if validation_dataset else "",
        )

        def ask() -> tuple[pb.Audit, int]:
            answer = self._transport.call(self._stub.AuditDataset, request)
            return answer, answer.state

        return _settled(ask, request.name, timeout)

    def preview(
        self,
        name: str,
        model: str,
        lines: Sequence[int] = (),
        *,
        method: str = "supervised",
        context_limit: int = 0,
        truncation: str = "",
        timeout: float = 600.0,
    ) -> pb.PreviewDatasetResponse:
        """Rows as the model would see them: tokens, and which are trained. lines: 1-based, at most 20; the first row
        if none is given. Raises what `audit` raises, and InvalidArgument for a line that is no row."""
        request = pb.PreviewDatasetRequest(
            name=self._name(name),
            model=model,
            options=pb.AuditOptions(method=method, context_limit=context_limit, truncation=truncation),
            lines=lines,
        )

        def ask() -> tuple[pb.PreviewDatasetResponse, int]:
            answer = self._transport.call(self._stub.PreviewDataset, request)
            return answer, answer.state

        return _settled(ask, request.name, timeout)

    def _name(self, name: str) -> str:
        return full_name(self._project, "datasets", name)


def _settled(ask: Callable[[], tuple[T, int]], name: str, timeout: float) -> T:
    """The answer once its audit does not run any more. Raises DeadlineExceeded."""
    deadline = time.monotonic() + timeout
    pause = 0.05
    while True:
        answer, state = ask()
        if state != pb.AUDIT_STATE_RUNNING:
            return answer
        if time.monotonic() + pause > deadline:
            raise DeadlineExceeded(f"{name} was not audited within {timeout:.0f} seconds.")
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)
