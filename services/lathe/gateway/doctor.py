"""lathe.v1.PlatformService, and the services that it asks."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC

import grpc

from lathe.common.clock import Clock
from lathe.common.rpc import channel as rpc
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.diagnosis import finding_of, finding_pb, timestamp
from lathe.gateway.diagnosis import Peer, PlatformDoctor, ServiceReport
from lathe.gateway.servicer import caller
from lathe.v1 import diagnosis_pb2 as pb
from lathe.v1.diagnosis_pb2_grpc import DiagnosisInternalServiceStub, PlatformServiceServicer

# Longer than the slowest probe (jobs looks at its cluster and at its engines).
_PEER_S = 11.0


class PlatformServicer(PlatformServiceServicer):
    """http_port: where the OpenAI API answers; 0 if that is not known yet."""

    def __init__(self, doctor: PlatformDoctor, clock: Clock, http_port: int) -> None:
        self._doctor = doctor
        self._clock = clock
        self._http_port = http_port

    async def Diagnose(self, request: pb.DiagnoseRequest, context: ServicerContext) -> pb.PlatformDiagnosis:
        found = await self._doctor.diagnose(caller())
        return pb.PlatformDiagnosis(
            version=self._doctor.version,
            time=timestamp(self._clock),
            findings=[finding_pb(one.service, one.finding) for one in found],
            http_port=self._http_port,
        )


def peers_of(channels: Mapping[str, grpc.aio.Channel], addresses: Mapping[str, str]) -> dict[str, Peer]:
    """channels, addresses: by the service's short name."""
    return {name: Peer(addresses[name], RpcExamination(channel)) for name, channel in channels.items()}


class RpcExamination:
    """Asks one service to examine itself."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = DiagnosisInternalServiceStub(channel)

    async def __call__(self) -> ServiceReport:
        answer = await rpc.call(self._stub.Diagnose, pb.DiagnoseRequest(), timeout=_PEER_S)
        return ServiceReport(
            version=answer.version,
            time=answer.time.ToDatetime(tzinfo=UTC),
            findings=[finding_of(finding) for finding in answer.findings],
        )
