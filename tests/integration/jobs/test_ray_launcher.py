"""The Ray launcher against a real local Ray, through its Job REST API."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from lathe.common.errors import Unavailable
from lathe.jobs.launchers.ray import RayLauncher
from lathe.jobs.ports import EngineLaunch, LaunchedEngine
from tests.fixtures.servers import free_ports

_SLEEPER = (
    "python -c \"import os, time; print(os.environ['LATHE_ENGINE_ENGINE_ID'], flush=True); time.sleep(300)\""
)
_TELLER = (
    "python -c \"import os, sys; names = ('WORKERS', 'WORKER_CPUS', 'RAY_ADDRESS'); "
    "sys.exit('{} workers of {} CPUs by {}'.format(*(os.environ['LATHE_ENGINE_' + name] for name in names)))\""
)
_BROKEN = "python -c \"import sys; print('first'); sys.exit('no weights here')\""


def launch(engine_id: str = "eng-1") -> EngineLaunch:
    return EngineLaunch(engine_id, "baseModels/tiny", "d" * 64, "default")


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
    await launcher.start(launch("eng-1"))
    await launcher.start(launch("eng-1"))
    # Other tests have jobs on this Ray too.
    assert (await launcher.list()).count(LaunchedEngine("eng-1", running=True)) == 1
    await launcher.stop("eng-1")
    ended = await until(launcher, "eng-1", lambda engine: engine is not None and not engine.running)
    assert ended is not None and ended.killed
    await launcher.stop("eng-1")
    await launcher.stop("eng-1")
    assert "eng-1" not in {engine.engine_id for engine in await launcher.list()}


async def test_an_engine_of_several_workers_is_told_how_it_gets_them(dashboard: str) -> None:
    launcher = RayLauncher(dashboard, _TELLER, "127.0.0.1:1", num_cpus=0.5)
    assert await launcher.why_one_worker() == ""
    await launcher.start(replace(launch("eng-3"), job_id="job-1", workers=2))
    found = await until(launcher, "eng-3", lambda engine: engine is not None and not engine.running)
    assert found is not None and "2 workers of 0.5 CPUs by auto" in found.last_log_line


async def test_an_engine_that_ends_says_why(dashboard: str) -> None:
    launcher = RayLauncher(dashboard, _BROKEN, "127.0.0.1:1", num_cpus=0.5)
    await launcher.start(launch("eng-2"))
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
