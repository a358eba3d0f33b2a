"""What the platform needs goes away for a while: calls are refused with a hint, jobs wait and go on, nothing is lost.

Longer than a lease term where that matters. Who stands still is worse than who is dead: connections stay.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from lathe.client import Client
from lathe.common.errors import LatheError, Unavailable
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.data import LESSONS, ask, jsonl, lessons
from tests.e2e.survival import (
    check_history,
    final_adapter,
    start_long,
    upload_long,
    wait_for_step,
    wait_for_success,
)
from tests.fixtures.outages import Server, database_server, process_server, store_server
from tests.fixtures.platforms import Platform, processes
from tests.fixtures.servers import run_postgres, run_seaweedfs

pytestmark = [pytest.mark.kills, pytest.mark.processes_only]

LEASE_S = 15.0
CLIENT_S = 9.0
# The client goes on with an upload until nothing has moved for CLIENT_S, and then ends the try it is in; a busy machine
# takes its time for all that. What hangs would do so for a minute and longer.
PATIENCE_S = 2 * CLIENT_S + 20.0
Call = Callable[[], object]


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


@pytest.fixture(scope="module")
def world(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> tuple[Platform, dict[str, Server]]:
    """A platform on servers of its own: they are stopped and killed here."""
    postgres = stack.enter_context(run_postgres())
    s3 = stack.enter_context(run_seaweedfs(tmp_path_factory.mktemp("store")))
    platform = stack.enter_context(processes(tmp_path_factory.mktemp("outages"), postgres, s3))
    servers = {
        "store": store_server(s3, stack),
        "database": database_server(postgres, stack),
        "jobs": process_server(lambda: platform.processes["jobs"].pid),
    }
    return platform, servers


@pytest.fixture(scope="module")
def platform(world: tuple[Platform, dict[str, Server]]) -> Platform:
    return world[0]


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[Client]:
    with Client(platform.grpc, platform.api_key) as connected:
        yield connected


@pytest.fixture(scope="module")
def base_model(client: Client, tiny_folder: str) -> str:
    return client.models.import_folder(tiny_folder, "tiny", license="Apache-2.0").name.partition("/")[2]


@pytest.fixture(scope="module")
def dataset(client: Client) -> datasets_pb2.Dataset:
    return upload_long(client)


@pytest.fixture(scope="module")
def undisturbed(
    platform: Platform, client: Client, base_model: str, dataset: datasets_pb2.Dataset
) -> dict[str, bytes]:
    return final_adapter(platform, client, wait_for_success(client, start_long(client, base_model, dataset)))


@pytest.fixture
def running(
    client: Client, base_model: str, dataset: datasets_pb2.Dataset, undisturbed: dict[str, bytes]
) -> jobs_pb2.Job:
    return wait_for_step(client, start_long(client, base_model, dataset), 40)


@pytest.fixture
def calls(platform: Platform, dataset: datasets_pb2.Dataset, base_model: str) -> Iterator[dict[str, Call]]:
    """Calls at both doors, by what they need."""
    with (
        Client(platform.grpc, platform.api_key, timeout=CLIENT_S) as grpc,
        httpx.Client(base_url=f"{platform.http}/v1", timeout=PATIENCE_S, headers=_key(platform)) as http,
    ):
        assert grpc.project
        file_id = dataset.name.rpartition("/")[2]
        content = jsonl(lessons(4))
        form = {"purpose": "fine-tune"}
        yield {
            "store: gRPC upload": lambda: grpc.datasets.upload(content),
            "store: gRPC download": lambda: list(grpc.datasets.download(dataset.name)),
            "store: HTTP upload": lambda: http.post(
                "/files", data=form, files={"file": ("a.jsonl", content)}
            ),
            "store: HTTP download": lambda: http.get(f"/files/{file_id}/content"),
            "database: gRPC get": lambda: list(grpc.jobs.list()),
            "database: gRPC chat": lambda: grpc.chat(
                base_model, ask("Hello!"), max_tokens=4, timeout=CLIENT_S
            ),
            "database: HTTP list": lambda: http.get("/fine_tuning/jobs"),
            "database: HTTP upload": lambda: http.post(
                "/files", data=form, files={"file": ("a.jsonl", content)}
            ),
        }


def _key(platform: Platform) -> dict[str, str]:
    return {"authorization": f"Bearer {platform.api_key}"}


def refused(name: str, call: Call) -> str:
    """What is wrong with how the call was refused; nothing if it was right."""
    started = time.monotonic()
    try:
        answer = call()
    except Unavailable as error:
        wrong = "" if error.retry_after else f"no retry hint: {error!r}"
    except (LatheError, httpx.HTTPError) as error:
        wrong = repr(error)
    else:
        right = (
            isinstance(answer, httpx.Response)
            and answer.status_code == 503
            and "retry-after" in answer.headers
        )
        wrong = "" if right else f"{answer} {answer.text if isinstance(answer, httpx.Response) else ''}"
    seconds = time.monotonic() - started
    if seconds > PATIENCE_S:
        wrong += " too late"
    return f"{name} after {seconds:.1f} s: {wrong}" if wrong else ""


def all_refused(calls: dict[str, Call], what: str) -> None:
    """Every call that needs `what` is refused as it should be, at once and side by side."""
    chosen = {name: call for name, call in calls.items() if name.startswith(what)}
    with ThreadPoolExecutor(len(chosen)) as threads:
        found = [wrong for wrong in threads.map(refused, chosen.keys(), chosen.values()) if wrong]
    assert not found, "\n".join(found)


def check_untouched(
    platform: Platform, client: Client, job: jobs_pb2.Job, undisturbed: dict[str, bytes]
) -> None:
    """The same attempt went on to the same end, and its model answers."""
    job = wait_for_success(client, job)
    check_history(client, job)
    assert (job.attempt_count, job.lost_lease_count) == (1, 0)
    assert final_adapter(platform, client, job) == undisturbed
    answer = client.chat(job.fine_tuned_model, ask(LESSONS[0][0]), temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == LESSONS[0][1]


@pytest.mark.parametrize("what", ["store", "database"])
def test_a_server_stands_still_and_dies(
    world: tuple[Platform, dict[str, Server]],
    running: jobs_pb2.Job,
    calls: dict[str, Call],
    undisturbed: dict[str, bytes],
    what: str,
) -> None:
    platform, servers = world
    started = time.monotonic()
    with servers[what].still():
        # Longer than keys and models are remembered.
        time.sleep(6)
        all_refused(calls, what)
        if what == "database":
            time.sleep(max(0.0, started + LEASE_S + 3 - time.monotonic()))
    with servers[what].dead():
        time.sleep(2)
        all_refused(calls, f"{what}: HTTP")
    with Client(platform.grpc, platform.api_key) as client:
        check_untouched(platform, client, running, undisturbed)


def test_jobs_stands_still_for_longer_than_a_lease(
    world: tuple[Platform, dict[str, Server]],
    client: Client,
    base_model: str,
    running: jobs_pb2.Job,
    undisturbed: dict[str, bytes],
) -> None:
    platform, servers = world
    with servers["jobs"].still():
        # Engines are known already: sampling goes on beside the job.
        assert client.chat(base_model, ask("Hello!"), max_tokens=4).choices
        time.sleep(LEASE_S + 5)
    check_untouched(platform, client, running, undisturbed)


def test_an_engine_stands_still_for_longer_than_a_lease(
    platform: Platform, client: Client, running: jobs_pb2.Job, undisturbed: dict[str, bytes]
) -> None:
    """Another one goes on at once; the one that stands still is ended, also before it wakes."""
    stopped = platform.engine_pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    job = wait_for_success(client, running)
    check_history(client, job)
    assert (job.attempt_count, job.lost_lease_count) == (2, 1)
    assert final_adapter(platform, client, job) == undisturbed
    deadline = time.monotonic() + 30
    while set(stopped) & set(platform.engine_pids()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
