"""What the gateway makes of its services' answers to the doctor."""

from datetime import timedelta

import pytest

from lathe.common.diagnosis import Finding, Severity
from lathe.common.errors import LatheError, PermissionDenied, Unauthenticated, Unavailable
from lathe.common.rpc.principal import Principal
from lathe.gateway.diagnosis import Peer, PlatformDoctor, ServiceReport, judged, log_advice, unreachable
from lathe.gateway.model import EngineInfo
from tests.fakes.clock import FakeClock

OPERATOR = Principal("default", "admin", "key_1")
ENGINE = EngineInfo("eng-a", "10.0.0.7:7460", "baseModels/b", "d1", max_sequences=4)


class World:
    """Two services and one engine; each may be made to fail."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.away: dict[str, LatheError] = {}
        self.lost: set[str] = set()

    def doctor(self) -> PlatformDoctor:
        return PlatformDoctor(
            peers={name: Peer(f"lathe-{name}:7460", self._examine(name)) for name in ("accounts", "jobs")},
            own=[self._own],
            engines=lambda: [ENGINE],
            reach=self._reach,
            clock=self.clock,
            version="1.0",
        )

    async def _own(self) -> list[Finding]:
        return [Finding("database", True, "The database can be written.")]

    async def _reach(self, address: str) -> None:
        if address in self.lost:
            raise Unavailable("Nobody answers.")

    def _examine(self, name: str):  # type: ignore[no-untyped-def]
        async def examine() -> ServiceReport:
            if name in self.away:
                raise self.away[name]
            return ServiceReport("1.0", self.clock.now(), [Finding("launcher", True, f"{name} is well.")])

        return examine


async def test_every_service_and_engine_is_asked_and_named() -> None:
    found = await World().doctor().diagnose(OPERATOR)
    assert {one.service for one in found} == {"gateway", "accounts", "jobs"}
    assert all(one.finding.severity is Severity.OK for one in found)
    assert "jobs is well." in [one.finding.message for one in found]


async def test_a_service_and_an_engine_that_do_not_answer_do_not_hide_the_others() -> None:
    world = World()
    world.away["jobs"] = Unavailable("lathe.v1.JobsService cannot be reached.")
    world.lost.add(ENGINE.address)
    found = await world.doctor().diagnose(OPERATOR)
    failed = {one.service: one.finding for one in found if not one.finding.ok}
    assert set(failed) == {"jobs", "gateway"}
    assert "lathe-jobs:7460" in failed["jobs"].message
    assert "kubectl logs deploy/lathe-jobs" in failed["jobs"].advice
    assert "eng-a" in failed["gateway"].message


@pytest.mark.parametrize("principal", [Principal("default", "member", "k"), Principal("other", "admin", "k")])
async def test_only_operators_are_told(principal: Principal) -> None:
    with pytest.raises(PermissionDenied):
        await World().doctor().diagnose(principal)


def test_another_version_and_a_clock_that_is_off_are_told() -> None:
    now = FakeClock().now()
    version, clock, own = judged(
        "jobs", ServiceReport("0.9", now + timedelta(seconds=20), [Finding("x", True, "X.")]), "1.0", now, now
    )
    assert version.severity is Severity.WARNING
    assert "0.9" in version.message
    assert clock.severity is Severity.FAILED
    assert "20.0 seconds ahead" in clock.message
    assert own.name == "x"


def test_a_refused_credential_is_not_taken_for_an_outage() -> None:
    finding = unreachable("jobs", "lathe-jobs:7460", Unauthenticated("own services only"))
    assert "service token" in finding.advice


def test_the_advice_says_where_the_log_is() -> None:
    assert "lathe serve jobs" in log_advice("jobs", "127.0.0.1:7460")
    assert "deploy/x-jobs)" in log_advice("jobs", "x-jobs:7460")
    assert "-n prod deploy/x-jobs" in log_advice("jobs", "x-jobs.prod.svc:7460")
