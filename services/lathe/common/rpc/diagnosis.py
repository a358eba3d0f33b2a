"""The service that every process answers to the gateway's doctor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from lathe import __version__
from lathe.common.clock import Clock
from lathe.common.diagnosis import Finding, Severity
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.server import Registration
from lathe.v1 import diagnosis_pb2 as pb
from lathe.v1.diagnosis_pb2_grpc import (
    DiagnosisInternalServiceServicer,
    add_DiagnosisInternalServiceServicer_to_server,
)

Probe = Callable[[], Awaitable[Sequence[Finding]]]

_SEVERITIES = {
    Severity.OK: pb.DIAGNOSIS_SEVERITY_OK,
    Severity.WARNING: pb.DIAGNOSIS_SEVERITY_WARNING,
    Severity.FAILED: pb.DIAGNOSIS_SEVERITY_FAILED,
}


class DiagnosisServicer(DiagnosisInternalServiceServicer):
    """lathe.v1.DiagnosisInternalService. The probes bound themselves and run side by side."""

    def __init__(self, service: str, clock: Clock, probes: Sequence[Probe]) -> None:
        self._service = service
        self._clock = clock
        self._probes = probes

    async def Diagnose(self, request: pb.DiagnoseRequest, context: ServicerContext) -> pb.ServiceDiagnosis:
        findings = await all_findings(self._probes)
        return pb.ServiceDiagnosis(
            service=self._service,
            version=__version__,
            time=timestamp(self._clock),
            findings=[finding_pb(self._service, finding) for finding in findings],
        )


def diagnosis(service: str, clock: Clock, *probes: Probe) -> Registration:
    """What a service's `main` adds to its registrations."""
    return Registration(
        add_DiagnosisInternalServiceServicer_to_server,
        DiagnosisServicer(service, clock, probes),
        "lathe.v1.DiagnosisInternalService",
    )


async def all_findings(probes: Iterable[Probe]) -> list[Finding]:
    """What all probes find, in their order."""
    answers = await asyncio.gather(*(probe() for probe in probes))
    return [finding for findings in answers for finding in findings]


def finding_pb(service: str, finding: Finding) -> pb.DiagnosisFinding:
    """A finding in the contract's form."""
    return pb.DiagnosisFinding(
        service=service,
        name=finding.name,
        severity=_SEVERITIES[finding.severity],
        message=finding.message,
        advice=finding.advice,
    )


def finding_of(message: pb.DiagnosisFinding) -> Finding:
    """A finding from the contract's form."""
    ok = message.severity in (pb.DIAGNOSIS_SEVERITY_OK, pb.DIAGNOSIS_SEVERITY_WARNING)
    return Finding(message.name, ok, message.message, message.advice)


def timestamp(clock: Clock) -> Timestamp:
    """The clock's time as a message."""
    now = Timestamp()
    now.FromDatetime(clock.now())
    return now
