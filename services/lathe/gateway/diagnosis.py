"""`lathe doctor` from inside: the gateway asks every service to examine itself, and joins the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from lathe.common.clock import Clock
from lathe.common.diagnosis import Finding, clock_finding
from lathe.common.errors import LatheError, Unauthenticated
from lathe.common.rpc.principal import Principal, require_operator
from lathe.gateway.model import EngineInfo

Probe = Callable[[], Awaitable[Sequence[Finding]]]

_MANY_ENGINES = 20


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """What a service said of itself, and its own clock when it did."""

    version: str
    time: datetime
    findings: Sequence[Finding]


@dataclass(frozen=True, slots=True)
class Examined:
    """A finding and the service that it is about."""

    service: str
    finding: Finding


@dataclass(frozen=True, slots=True)
class Peer:
    """A service behind the gateway: where it is, and how it is asked. `examine` raises LatheErrors."""

    address: str
    examine: Callable[[], Awaitable[ServiceReport]]


@dataclass(frozen=True, slots=True)
class PlatformDoctor:
    """own: the gateway's own probes. engines: those that are listed. reach: one engine's address -> it answers."""

    peers: Mapping[str, Peer]
    own: Sequence[Probe]
    engines: Callable[[], Sequence[EngineInfo]]
    reach: Callable[[str], Awaitable[None]]
    clock: Clock
    version: str

    async def diagnose(self, principal: Principal) -> list[Examined]:
        """Everything that was found, service by service. Raises PermissionDenied to others than operators."""
        require_operator(principal, "examine the platform")
        mine = asyncio.gather(*(probe() for probe in self.own), self._engines())
        theirs = asyncio.gather(*(self._peer(name, peer) for name, peer in self.peers.items()))
        own, peers = await mine, await theirs
        found = [Examined("gateway", finding) for findings in own for finding in findings]
        return [*found, *(one for findings in peers for one in findings)]

    async def _peer(self, name: str, peer: Peer) -> list[Examined]:
        begun = self.clock.now()
        try:
            report = await peer.examine()
        except LatheError as error:
            return [Examined(name, unreachable(name, peer.address, error))]
        findings = judged(name, report, self.version, begun, self.clock.now())
        return [Examined(name, finding) for finding in findings]

    async def _engines(self) -> Sequence[Finding]:
        """Whether the gateway reaches the engines: a network policy may let jobs do what it keeps from us."""
        engines = list(self.engines())[:_MANY_ENGINES]
        results = await asyncio.gather(*(self._reached(engine) for engine in engines))
        failed = [(engine, why) for engine, why in zip(engines, results, strict=True) if why]
        if failed:
            engine, why = failed[0]
            message = f"{len(failed)} of {len(engines)} engines are not reached from here: {engine.engine_id}: {why}"
            advice = "See whether they run, and whether the network lets the gateway reach their port 7460."
            return [Finding("engines", False, message, advice)]
        return [Finding("engines", True, f"All {len(engines)} engines are reached.")] if engines else []

    async def _reached(self, engine: EngineInfo) -> str:
        try:
            await self.reach(engine.address)
        except LatheError as error:
            return error.message
        return ""


def judged(
    service: str, report: ServiceReport, version: str, begun: datetime, ended: datetime
) -> list[Finding]:
    """What a service said, and whether its version and clock agree with ours.

    begun, ended: our clock before and after the question.
    """
    if report.version == version:
        answers = Finding("answers", True, f"{service} answers, version {report.version}.")
    else:
        message = f"{service} is version {report.version}, the gateway is {version}."
        answers = Finding(
            "answers", True, message, "Finish the upgrade: all services should have one version."
        )
    return [answers, clock_finding("clock", service, report.time, begun, ended), *report.findings]


def unreachable(service: str, address: str, error: LatheError) -> Finding:
    """Why a service did not say anything."""
    if isinstance(error, Unauthenticated):
        message = f"{service} at {address} does not accept the gateway's credential: {error.message}"
        return Finding(
            "answers", False, message, "Give all services the same service token, then restart them."
        )
    message = f"{service} does not answer at {address}: {error.message}"
    return Finding("answers", False, message, log_advice(service, address))


def log_advice(service: str, address: str) -> str:
    """Where a service's log is. In a cluster the address is the Service's name, which is the Deployment's too."""
    host = address.rpartition(":")[0].strip("[]")
    if host in ("localhost", "") or host.replace(".", "").isdigit() or ":" in host:
        return f"See the log of `lathe serve {service}`, or start it."
    name, _, rest = host.partition(".")
    where = f" -n {rest.partition('.')[0]}" if rest else ""
    return f"See its log (kubectl logs{where} deploy/{name}) and its pods (kubectl get pods)."
