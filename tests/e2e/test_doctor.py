"""`lathe login` and `lathe doctor`, on whatever platform is under test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lathe.client import Client
from lathe.common.errors import PermissionDenied
from lathe.v1 import diagnosis_pb2
from tests.fixtures.platforms import Platform

SERVICES = {"gateway", "accounts", "datasets", "models", "jobs"}
LONG_ENOUGH_S = 180


def lathe(*arguments: str, contexts: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """The command, with nothing in its environment that names a platform."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LATHE_")}
    return subprocess.run(
        [sys.executable, "-m", "lathe.cli.main", *arguments],
        env={**inherited, "LATHE_CONTEXTS_FILE": str(contexts)},
        input=given,
        capture_output=True,
        text=True,
        timeout=LONG_ENOUGH_S,
        check=False,
    )


def severity(finding: diagnosis_pb2.DiagnosisFinding) -> str:
    return diagnosis_pb2.DiagnosisSeverity.Name(finding.severity)


def test_the_platform_finds_nothing_wrong_with_itself(client: Client) -> None:
    found = client.diagnose()
    assert {one.service for one in found.findings} == SERVICES
    failed = [one for one in found.findings if severity(one) == "DIAGNOSIS_SEVERITY_FAILED"]
    assert not failed
    named = {(one.service, one.name) for one in found.findings}
    assert {(service, "database") for service in SERVICES} <= named
    assert {(service, "store") for service in ("gateway", "datasets", "models")} <= named
    assert found.version


def test_only_an_operator_is_told(client: Client, platform: Platform) -> None:
    key, secret = client.keys.create("doctor", "member")
    with Client(platform.grpc, secret) as member, pytest.raises(PermissionDenied):
        member.diagnose()
    client.keys.revoke(key.name)


def test_who_has_logged_in_needs_no_options_and_the_doctor_finds_nothing(
    platform: Platform, tmp_path: Path
) -> None:
    contexts = tmp_path / "contexts.yaml"
    done = lathe(
        *("login", platform.grpc, "--api-key", "-", "--http", platform.http, "--name", "here"),
        contexts=contexts,
        given=platform.api_key,
    )
    assert done.returncode == 0, done.stderr
    assert platform.api_key not in done.stdout + done.stderr
    assert contexts.stat().st_mode & 0o077 == 0
    assert lathe("models", "list", "--json", contexts=contexts).returncode == 0
    done = lathe("doctor", "--json", contexts=contexts)
    report: dict[str, Any] = json.loads(done.stdout)
    failed = [one for one in report["findings"] if one["severity"] == "failed"]
    assert not failed
    assert done.returncode == 0
    outside = {one["name"] for one in report["findings"] if one["where"] == "outside"}
    assert {"name", "port", "grpc", "key", "http", "version", "clock"} <= outside


def test_a_wrong_key_is_not_stored_and_the_doctor_names_it(platform: Platform, tmp_path: Path) -> None:
    contexts = tmp_path / "contexts.yaml"
    done = lathe("login", platform.grpc, contexts=contexts, given="sk-lathe-wrong")
    assert done.returncode == 5, done.stderr
    assert not contexts.exists()
    done = lathe(
        "--address", platform.grpc, "--api-key", "sk-lathe-wrong", "doctor", "--json", contexts=contexts
    )
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert [one["name"] for one in report["findings"] if one["severity"] == "failed"] == ["key"]
