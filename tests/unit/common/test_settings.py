from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ValidationError

from lathe.common.errors import InvalidArgument
from lathe.common.settings import RpcSettings, ServiceSettings, StoreSettings


class ExampleSettings(ServiceSettings):
    service: ClassVar[str] = "example"
    rpc: RpcSettings = RpcSettings()
    lease_seconds: float = 30.0
    store: StoreSettings | None = None


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATHE_CONFIG", raising=False)


def test_arguments_win_over_environment_over_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "lathe.yaml"
    file.write_text("lease_seconds: 1\nrpc: {port: 1, host: a, health_port: null}\n")
    monkeypatch.setenv("LATHE_EXAMPLE_RPC__PORT", "2")
    monkeypatch.setenv("LATHE_EXAMPLE_LEASE_SECONDS", "2")
    settings = ExampleSettings.load(config=file, lease_seconds=3)
    assert (settings.lease_seconds, settings.rpc.port, settings.rpc.host) == (3, 2, "a")
    assert settings.rpc.health_port is None


def test_the_services_own_variable_wins_over_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATHE_RPC__PORT", "5")
    monkeypatch.setenv("LATHE_RPC__GRACE_S", "7")
    monkeypatch.setenv("LATHE_EXAMPLE_RPC__PORT", "6")
    settings = ExampleSettings.load()
    assert (settings.rpc.port, settings.rpc.grace_s) == (6, 7)


def test_file_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "lathe.yaml"
    file.write_text("lease_seconds: 9\n")
    monkeypatch.setenv("LATHE_CONFIG", str(file))
    assert ExampleSettings.load().lease_seconds == 9


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("leese_seconds: 1", "leese_seconds"),
        ("rpc: {prot: 1}", "rpc.prot"),
        ("- a", "mapping"),
        ("a: [", "YAML"),
    ],
)
def test_a_typo_in_the_file_is_named(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "lathe.yaml"
    file.write_text(content)
    with pytest.raises(InvalidArgument, match=named):
        ExampleSettings.load(config=file)


@pytest.mark.parametrize(
    "variable",
    ["LATHE_EXAMPLE_LEESE_SECONDS", "LATHE_EXAMPLE_RPC__PROT", "LATHE_RPC__PROT", "LATHE_EXAMPLE_X__Y"],
)
def test_a_typo_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(InvalidArgument, match=f"(?i){variable.rpartition('__')[2]}"):
        ExampleSettings.load()


def test_service_links_of_kubernetes_are_no_typo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATHE_EXAMPLE_PORT", "tcp://10.0.0.1:7460")
    monkeypatch.setenv("LATHE_EXAMPLE_PORT_7460_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("LATHE_EXAMPLE_SERVICE_HOST", "10.0.0.1")
    assert ExampleSettings.load().rpc.port == 7460


def test_a_wrong_value_is_explained_without_repeating_it() -> None:
    with pytest.raises(InvalidArgument, match="example service: store: a store of kind 's3' needs") as caught:
        ExampleSettings.load(store={"kind": "s3", "secret_key": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        ExampleSettings.load().lease_seconds = 4  # type: ignore[misc]


def test_null_in_the_environment_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(ServiceSettings, service="plain"):
        rpc: RpcSettings = RpcSettings()

    monkeypatch.setenv("LATHE_RPC__HEALTH_PORT", "null")
    assert Plain.load().rpc.health_port is None
