"""The variables that the chart sets are settings that exist: the real classes load them."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import pytest

from lathe.common.service import ProcessSettings
from lathe.engine.settings import EngineSettings
from tests.charts.chart import EXTERNAL, SERVICES, Rendered, render

# What the launcher adds to a class's template, and what no template can know.
LAUNCHED = {
    "LATHE_ENGINE_ENGINE_ID": "eng-1",
    "LATHE_ENGINE_BASE_MODEL": "baseModels/tiny",
    "LATHE_ENGINE_BASE_DIGEST": "ab" * 32,
    "LATHE_ENGINE_JOBS_ADDRESS": "lathe-jobs:7460",
    "LATHE_ENGINE_THREADS": "2",
}
URL = "postgresql+psycopg://one:secret@db/one"
PUBLIC_TLS: dict[str, Any] = {"gateway": {"tls": {"existingSecret": "public"}}}


def settings_class(service: str) -> type[ProcessSettings]:
    module = import_module(f"lathe.{service}.settings")
    found: type[ProcessSettings] = getattr(module, f"{service.capitalize()}Settings")
    return found


def loaded(env: dict[str, str], settings: type[ProcessSettings], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that a container with just these variables has."""
    for name in [name for name in os.environ if name.startswith("LATHE_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, URL if name.endswith("_DB__URL") else value)
    return settings.load()


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("values", [{}, EXTERNAL, PUBLIC_TLS], ids=["tryout", "external", "public-tls"])
def test_a_service_knows_every_variable(
    service: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loaded(render(values).env(service), settings_class(service), monkeypatch)
    assert settings.rpc.peers is not None
    assert settings.rpc.host == settings.metrics.host == "0.0.0.0"
    assert settings.rpc.grace_s == (60 if service == "gateway" else 10)
    behind_mtls = settings.rpc.tls_client_ca_file is not None
    assert behind_mtls == (service != "gateway")
    assert (settings.rpc.tls_cert_file is not None) == (behind_mtls or values is PUBLIC_TLS)


def test_secrets_of_imports_reach_datasets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    s3 = {
        "LATHE_DATASETS_IMPORTS__S3__KIND": "s3",
        "LATHE_DATASETS_IMPORTS__S3__ENDPOINT": "s3.example",
        "LATHE_DATASETS_IMPORTS__S3__BUCKET": "any",
    }
    imports = {"enabled": True, "existingSecret": "mine"}
    rendered = render({"imports": imports, "datasets": {"settings": s3}})
    env = rendered.env("datasets")
    secret = {name for name, value in env.items() if "IMPORTS__" in name and name not in s3} - {
        "LATHE_DATASETS_IMPORTS__ENABLED"
    }
    known = loaded(env, settings_class("datasets"), monkeypatch).imports
    assert known.enabled and None not in (known.hub_token, known.s3.access_key, known.s3.secret_key)
    assert len(secret) == 3
    for service in SERVICES:
        others = rendered if service != "datasets" else render({"imports": {**imports, "enabled": False}})
        assert not secret & set(others.env(service))


@pytest.mark.parametrize("service", SERVICES)
def test_the_migration_loads_every_services_settings(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loaded(render().env("migrate"), settings_class(service), monkeypatch)
    assert settings.db.url.get_secret_value() == URL  # type: ignore[attr-defined]


@pytest.mark.parametrize("values", [{}, EXTERNAL], ids=["tryout", "external"])
def test_an_engine_knows_every_variable(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: Rendered = render(values)
    settings = loaded(rendered.env("engine:cpu") | LAUNCHED, EngineSettings, monkeypatch)
    assert settings.rpc.peers is not None and settings.rpc.tls_client_ca_file is not None
    assert settings.store.bucket == "lathe"
    assert settings.advertise_address == "$(POD_IP):7460"


def test_engines_and_services_keep_things_in_the_same_store(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(EXTERNAL)
    engine = loaded(rendered.env("engine:cpu") | LAUNCHED, EngineSettings, monkeypatch)
    for service in ("datasets", "gateway", "models"):
        store = loaded(rendered.env(service), settings_class(service), monkeypatch).store
        assert store == engine.store


def test_jobs_knows_the_classes_and_where_their_templates_are(monkeypatch: pytest.MonkeyPatch) -> None:
    big = {"device": "cuda", "gpus": 1, "resources": {"limits": {"memory": "8Gi"}}}
    values = {"engines": {"defaultClass": "big", "classes": {"big": big}}}
    rendered = render(values)
    settings = loaded(rendered.env("jobs"), settings_class("jobs"), monkeypatch)
    assert set(settings.engine_classes) == {"cpu", "big"}
    assert settings.default_engine_class == "big"
    assert {f"{name}.yaml" for name in settings.engine_classes} == set(
        rendered.one("ConfigMap", "engines")["data"]
    )
    assert settings.launcher.kubernetes.owner_deployment == "lathe-jobs"


def test_a_large_number_arrives_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    many = 2_000_000
    named = ("min", "max", "maxPerBase", "idleTimeoutSeconds", "drainGraceSeconds")
    values = {
        "engines": dict.fromkeys(named, many),
        "database": {"poolSize": many},
        "drain": {"delaySeconds": many, "graceSeconds": many},
        "migrations": {"timeoutSeconds": many},
    }
    rendered = render(values)
    for component in (*SERVICES, "engine:cpu", "migrate"):
        pod = rendered.pod(component)["spec"]
        assert "e+" not in str([rendered.env(component), pod]), component
    settings = loaded(rendered.env("jobs"), settings_class("jobs"), monkeypatch)
    assert settings.max_engines == settings.engine_idle_timeout_s == settings.db.pool_size == many
