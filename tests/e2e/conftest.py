"""One platform per session, and clients of it. Tests here use what any client has: `lathe.client` and `openai`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from lathe.client import Client
from lathe.v1 import datasets_pb2, jobs_pb2, models_pb2
from tests.e2e.data import BY_HEART, jsonl, lessons
from tests.fixtures.platforms import Platform, embedded, processes
from tests.fixtures.tiny_chat import write_tiny_chat

HERE = Path(__file__).parent
# Weights that are there already keep the name they have: tests ask for `tuned.model`.
BASE = "e2e-tiny"
Upload = Callable[[bytes], datasets_pb2.Dataset]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the target cannot do; put last what kills parts of the platform."""
    target = config.getoption("--target")
    left_out = [item for item in items if HERE in item.path.parents and not _possible(item, target)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("kills") is not None)


def _possible(item: pytest.Item, target: str) -> bool:
    if item.get_closest_marker("real_model") or item.get_closest_marker("embedded_only"):
        return target == "embedded"
    if item.get_closest_marker("processes_only"):
        return target == "processes"
    ours = item.get_closest_marker("kills") or item.get_closest_marker("own_platform")
    return target in ("embedded", "processes") or not ours


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--target"))


@pytest.fixture(scope="session")
def platform(
    request: pytest.FixtureRequest, target: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    if target == "embedded":
        with embedded(tmp_path_factory.mktemp("embedded")) as running:
            yield running
    elif target == "processes":
        servers = request.getfixturevalue("postgres"), request.getfixturevalue("seaweedfs")
        with processes(tmp_path_factory.mktemp("processes"), *servers) as running:
            yield running
    else:
        yield Platform(target, os.environ["LATHE_HTTP"], os.environ["LATHE_API_KEY"])


@pytest.fixture(scope="session")
def client(platform: Platform) -> Iterator[Client]:
    """The client of an admin of the default project."""
    with Client(platform.grpc, platform.api_key) as connected:
        yield connected


@pytest.fixture(scope="session")
def sdk(platform: Platform) -> Iterator[openai.OpenAI]:
    """The SDK as it is installed, only pointed elsewhere."""
    with openai.OpenAI(base_url=f"{platform.http}/v1", api_key=platform.api_key) as connected:
        yield connected


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def base_model(client: Client, tiny_folder: Path) -> str:
    """The id of a tiny model that can be tuned."""
    model = client.models.import_folder(tiny_folder, BASE, license="Apache-2.0", source="made by a test")
    assert model.state == models_pb2.BASE_MODEL_STATE_READY
    assert model.tunable, model.not_tunable_reason
    return model.name.removeprefix("baseModels/")


@pytest.fixture(scope="session")
def upload(client: Client) -> Upload:
    """Upload bytes for tuning and wait for their validation."""
    return lambda content: client.datasets.wait(client.datasets.upload(content).name)


@pytest.fixture(scope="session")
def lessons_dataset(upload: Upload) -> datasets_pb2.Dataset:
    dataset = upload(jsonl(lessons()))
    assert dataset.state == datasets_pb2.DATASET_STATE_READY, dataset.report
    return dataset


@pytest.fixture(scope="session")
def tuned(client: Client, base_model: str, lessons_dataset: datasets_pb2.Dataset) -> jobs_pb2.Job:
    """A job that succeeded: its model knows the lessons by heart."""
    job = client.jobs.create(base_model, lessons_dataset.name, suffix="lessons", seed=1, **BY_HEART)
    for update in client.jobs.watch(job.name):
        job = update.job
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job
    return job
