"""The whole platform with its engines on a local Ray: a job is trained and answered, also after a kill."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lathe.client import Client
from tests.e2e.data import LESSONS, ask
from tests.e2e.survival import check_history, start_long, upload_long, wait_for_step, wait_for_success
from tests.fixtures.platforms import processes
from tests.fixtures.servers import PostgresEndpoint, S3Endpoint
from tests.fixtures.tiny_chat import write_tiny_chat


def engines_of(folder: Path) -> list[int]:
    """Processes that run an engine with a cache under `folder`: Ray's children, not ours."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            # The shell that Ray starts it with has the same variables, and the engine as a word of one argument.
            if command[1:3] == [b"-m", b"lathe.engine.main"] and str(folder).encode() in _variables(entry):
                found.append(int(entry.name))
        except OSError:
            continue  # no process, or it ended meanwhile
    return found


def _variables(entry: Path) -> bytes:
    return (entry / "environ").read_bytes()


@contextmanager
def no_engine_left(folder: Path) -> Iterator[None]:
    """What Ray runs does not end with the platform."""
    try:
        yield
    finally:
        for pid in engines_of(folder):
            os.kill(pid, signal.SIGKILL)


def test_a_job_on_ray_succeeds_after_its_engine_was_killed(
    dashboard: str, postgres: PostgresEndpoint, seaweedfs: S3Endpoint, tmp_path: Path
) -> None:
    launcher = {
        "kind": "ray",
        "ray_address": dashboard,
        "ray_entrypoint": f"{sys.executable} -m lathe.engine.main",
        "ray_num_cpus": 0.5,
    }
    with (
        no_engine_left(tmp_path),
        processes(tmp_path, postgres, seaweedfs, launcher) as platform,
        Client(platform.grpc, platform.api_key) as client,
    ):
        tiny = tmp_path / "tiny"
        tiny.mkdir()
        client.models.import_folder(write_tiny_chat(tiny), "tiny", license="Apache-2.0")
        dataset = upload_long(client)
        job = wait_for_step(client, start_long(client, "tiny", dataset), 60)
        [engine] = engines_of(tmp_path)
        os.kill(engine, signal.SIGKILL)

        job = wait_for_success(client, job)
        assert (job.attempt_count, job.lost_lease_count) == (2, 1)
        check_history(client, job)
        answer = client.chat(job.fine_tuned_model, ask(LESSONS[0][0]), temperature=0, max_tokens=20)
        assert answer.choices[0].message.content == LESSONS[0][1]
