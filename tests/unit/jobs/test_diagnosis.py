"""What jobs says of its engines to the doctor."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from lathe.common.diagnosis import Severity
from lathe.jobs.diagnosis import engines_finding
from lathe.jobs.model import BaseRef, EngineRecord, EngineState

NOW = datetime(2026, 1, 1, tzinfo=UTC)
READY = EngineRecord("eng-1", BaseRef("tiny", "d1"), EngineState.READY, NOW, heartbeat_time=NOW)


def test_engines_that_are_heard_of_and_those_that_start_are_counted() -> None:
    starting = EngineRecord("eng-2", BaseRef("tiny", "d1"), EngineState.LAUNCHING, NOW)
    finding = engines_finding([READY, starting], NOW)
    assert finding.severity is Severity.OK
    assert "1 engines answer (tiny), 1 more" in finding.message
    assert engines_finding([], NOW).severity is Severity.OK


def test_a_silent_engine_is_named() -> None:
    silent = replace(READY, heartbeat_time=NOW - timedelta(seconds=60))
    finding = engines_finding([silent], NOW)
    assert finding.severity is Severity.WARNING
    assert "eng-1" in finding.message
