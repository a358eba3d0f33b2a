"""The Ray launcher against a real local Ray, through its Job REST API."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lathe.common.errors import Unavailable
from lathe.jobs.launchers.ray import RayLauncher
from lathe.jobs.ports import LaunchedEngine
from tests.fixtures.servers import ended_with_us, free_ports

_START_S = 90.0
_SLEEPER = (
    "python -c \"import os, time; print(os.environ['LATHE_ENGINE_ENGINE_ID'], flush=True); time.sleep(300)\""
)
_BROKEN = "python -c \"import sys; print('first'); sys.exit('no weights here')\""


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address of a Ray head's dashboard."""
    # Ray puts sockets under it, whose paths may not be longer than 107 bytes.
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    gcs, port, agent, agent_grpc, client = free_ports(5)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--temp-dir={folder}", f"--port={gcs}", "--num-cpus=2", "--num-gpus=0"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *(f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1"),
        "--object-store-memory=100000000",
    ]
    log = Path(folder) / "start.log"
    with log.open("wb") as out:
        ray = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        with ended_with_us(ray.pid):
            _wait_for(address, ray, log)
            yield address
    finally:
        # Ray ends its own daemons at SIGTERM.
        ray.terminate()
        try:
            ray.wait(20)
        except subprocess.TimeoutExpired:
            ray.kill()
            ray.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(address: str, ray: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and ray.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=2) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"Ray did not start:\n{log.read_text()[-3000:]}")


async def until(
    launcher: RayLauncher, engine_id: str, wanted: Callable[[LaunchedEngine | None], bool]
) -> LaunchedEngine | None:
    deadline = time.monotonic() + 60
    while True:
        try:
            found = next((one for one in await launcher.list() if one.engine_id == engine_id), None)
        except Unavailable:
            # A busy machine may be slow to answer; the reconciler asks again, too.
            assert time.monotonic() < deadline
            continue
        if wanted(found):
            return found
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.2)


async def test_an_engine_is_a_ray_job_until_it_is_stopped(dashboard: str) -> None:
    launcher = RayLauncher(dashboard, _SLEEPER, "127.0.0.1:1", num_cpus=0.5)
    await launcher.start("eng-1", "baseModels/tiny", "d" * 64)
    await launcher.start("eng-1", "baseModels/tiny", "d" * 64)
    assert await launcher.list() == [LaunchedEngine("eng-1", running=True)]
    await launcher.stop("eng-1")
    ended = await until(launcher, "eng-1", lambda engine: engine is not None and not engine.running)
    assert ended is not None and ended.killed
    await launcher.stop("eng-1")
    await launcher.stop("eng-1")
    assert await launcher.list() == []


async def test_an_engine_that_ends_says_why(dashboard: str) -> None:
    launcher = RayLauncher(dashboard, _BROKEN, "127.0.0.1:1", num_cpus=0.5)
    await launcher.start("eng-2", "baseModels/tiny", "d" * 64)
    found = await until(launcher, "eng-2", lambda engine: engine is not None and not engine.running)
    assert found is not None and not found.killed
    assert "FAILED" in found.exit_status
    assert "no weights here" in found.last_log_line
    await launcher.stop("eng-2")


async def test_a_ray_that_is_away_is_unavailable() -> None:
    [port] = free_ports(1)
    launcher = RayLauncher(f"http://127.0.0.1:{port}", _SLEEPER, "127.0.0.1:1")
    with pytest.raises(Unavailable):
        await launcher.list()
