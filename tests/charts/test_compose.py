"""deploy/compose.yaml: Docker's own check where it is there, and settings that every service takes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.charts.chart import ROOT, SERVICES

FILE = ROOT / "deploy" / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())


def compose_command() -> list[str] | None:
    """Docker's plugin, or the program of its own that older ones were."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and subprocess.run([*command, "version"], check=False, capture_output=True).returncode == 0
        ):
            return command
    return None


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """deploy/compose/prepare.py, at work in a folder of the test's."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "deploy" / "compose" / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HOME", tmp_path)
    (tmp_path / "secrets").mkdir()
    return module


def test_docker_takes_the_file() -> None:
    command = compose_command()
    if command is None:
        # Said aloud, and nothing is lost of the other checks here.
        warnings.warn(
            "Docker's compose plugin is not here: deploy/compose.yaml was not checked by it.", stacklevel=1
        )
        return
    ended = subprocess.run([*command, "-f", str(FILE), "config"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert set(yaml.safe_load(ended.stdout)["services"]) == {*SERVICES, "postgres", "seaweedfs", "prepare"}


def test_every_service_is_checked_and_may_write_to_its_volumes_only() -> None:
    for name, service in COMPOSE["services"].items():
        if name == "prepare":
            continue
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert all(need["condition"].startswith("service_") for need in service["depends_on"].values()), name
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published == ["${LATHE_LISTEN:-127.0.0.1}:7460:7460", "${LATHE_LISTEN:-127.0.0.1}:8080:8080"]


def test_the_images_are_this_version() -> None:
    version = yaml.safe_load((ROOT / "charts" / "lathe" / "Chart.yaml").read_text())["appVersion"]
    for service in COMPOSE["services"].values():
        assert service["image"].endswith(f"${{LATHE_VERSION:-{version}}}")
        assert service["image"].split("}")[1].split(":")[0] in (
            "lathe/control",
            "lathe/engine",
            "lathe/tryout",
        )


@pytest.mark.parametrize("service", [*SERVICES, "engine"])
def test_a_service_takes_the_settings_that_are_written_for_it(
    service: str, prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("LATHE_")]:
        monkeypatch.delenv(name)
    file = tmp_path / f"{service}.json"
    file.write_text(json.dumps(prepare.settings(service)))
    if service == "engine":
        for name in ("ENGINE_ID", "BASE_MODEL", "BASE_DIGEST", "JOBS_ADDRESS"):
            monkeypatch.setenv(f"LATHE_ENGINE_{name}", "x")
    settings = getattr(import_module(f"lathe.{service}.settings"), f"{service.capitalize()}Settings").load(
        file
    )
    assert settings.rpc.host == "0.0.0.0"
    if service in SERVICES:
        assert settings.db.url.get_secret_value().endswith(f"@postgres:5432/{service}")
        assert COMPOSE["services"][service]["environment"]["LATHE_CONFIG"].endswith(f"/{service}.json")
    if service == "jobs":
        assert settings.launcher.kind == "subprocess"
        assert settings.launcher.engine_env["LATHE_ENGINE_RPC__HOST"] == "jobs"


def test_a_secret_is_made_once(prepare: ModuleType) -> None:
    first = prepare.kept("service-token")
    assert prepare.kept("service-token") == first and len(first) == 64
    assert prepare.kept("engine-token") != first
    assert prepare.settings("accounts")["bootstrap_key"].startswith("sk-lathe-")
