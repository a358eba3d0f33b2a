"""The settings of an engine, as launchers give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lathe.common.errors import InvalidArgument
from lathe.engine.settings import EngineSettings

GIVEN = {
    "LATHE_ENGINE_ENGINE_ID": "eng-1",
    "LATHE_ENGINE_BASE_MODEL": "baseModels/tiny",
    "LATHE_ENGINE_BASE_DIGEST": "0" * 64,
    "LATHE_ENGINE_JOBS_ADDRESS": "127.0.0.1:7460",
    "LATHE_ENGINE_STORE__KIND": "folder",
    "LATHE_ENGINE_STORE__FOLDER": "/data/store",
    "LATHE_ENGINE_CACHE_FOLDER": "/data/cache",
    "LATHE_ENGINE_RPC__PORT": "0",
    "LATHE_ENGINE_RPC__HEALTH_PORT": "null",
    "LATHE_ENGINE_METRICS__PORT": "null",
    "LATHE_ENGINE_PARENT_PID": "17",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)


def test_what_a_launcher_gives() -> None:
    settings = EngineSettings.load()
    assert (settings.engine_id, settings.parent_pid) == ("eng-1", 17)
    assert (settings.rpc.port, settings.rpc.health_port, settings.metrics.port) == (0, None, None)
    assert settings.store.folder == Path("/data/store")
    assert settings.slice_tokens() == 320
    assert settings.model_threads() >= 1


def test_a_gpu_takes_larger_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATHE_ENGINE_DEVICE", "cuda")
    assert EngineSettings.load().slice_tokens() == 8192
    monkeypatch.setenv("LATHE_ENGINE_TRAIN_TOKENS_PER_SLICE", "100")
    assert EngineSettings.load().slice_tokens() == 100


def test_a_joined_pass_is_no_longer_than_a_slice_if_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EngineSettings.load().pass_tokens() == 320
    monkeypatch.setenv("LATHE_ENGINE_FUSED_TOKENS", "640")
    monkeypatch.setenv("LATHE_ENGINE_DECODE_STEPS_PER_PASS", "4")
    settings = EngineSettings.load()
    assert (settings.pass_tokens(), settings.slice_tokens(), settings.decode_steps_per_pass) == (640, 320, 4)


def test_the_oldest_job_may_not_be_promised_more_than_its_speed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EngineSettings.load().fused_slowdown == 1.6
    monkeypatch.setenv("LATHE_ENGINE_FUSED_SLOWDOWN", "1")
    with pytest.raises(InvalidArgument, match="fused_slowdown"):
        EngineSettings.load()


def test_a_typo_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATHE_ENGINE_TREADS", "2")
    with pytest.raises(InvalidArgument, match="TREADS"):
        EngineSettings.load()
