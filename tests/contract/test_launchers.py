"""What every launcher does: on the fake, on real child processes, and on a Kubernetes in memory.

Ray's run is in tests/integration, a real Kubernetes' in tests/cluster.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lathe.common.errors import FailedPrecondition
from lathe.jobs.launchers.kuberay import KubernetesLauncher
from lathe.jobs.launchers.manifests import Frame
from lathe.jobs.launchers.subprocess import SubprocessLauncher
from lathe.jobs.ports import EngineLaunch, LaunchedEngine, Launcher
from tests.fakes.clock import FakeClock
from tests.fakes.jobs import FakeLauncher
from tests.fakes.kubernetes import FakeKubeApi

SLEEPER = (sys.executable, "-c", "import os, time; print(dict(os.environ), flush=True); time.sleep(60)")
BROKEN = (sys.executable, "-c", "import sys; print('first'); sys.exit('no weights here')")


def launch(engine_id: str = "eng-1") -> EngineLaunch:
    return EngineLaunch(engine_id, "baseModels/tiny", "d" * 64, "default")


def of_two_workers() -> EngineLaunch:
    return EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, "default", "job-1", workers=2)


async def one(launcher: Launcher, engine_id: str = "eng-1") -> LaunchedEngine | None:
    return next((engine for engine in await launcher.list() if engine.engine_id == engine_id), None)


async def until(
    launcher: Launcher, wanted: Callable[[LaunchedEngine | None], bool], timeout: float = 60
) -> LaunchedEngine | None:
    deadline = time.monotonic() + timeout
    while not wanted(found := await one(launcher)):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    return found


def written(log: Path) -> str:
    """What the process said, once it said something."""
    deadline = time.monotonic() + 60
    while not (text := log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return text


def subprocesses(folder: Path, command: tuple[str, ...] = SLEEPER) -> SubprocessLauncher:
    return SubprocessLauncher(
        folder, command, "127.0.0.1:1", {"LATHE_ENGINE_THREADS": "2"}, {**os.environ, "LATHE_SECRET": "x"}
    )


def on_kubernetes(folder: Path, *, kuberay: bool) -> KubernetesLauncher:
    (folder / "default.yaml").write_text("{spec: {containers: [{name: engine, image: 'lathe/engine:1'}]}}")
    frame = Frame("lathe", "lathe", "jobs:7460", "2.60.0")
    return KubernetesLauncher(FakeKubeApi(kuberay=kuberay), frame, folder, FakeClock())


@pytest.fixture(params=["fake", "subprocess", "rayjob", "deployment"])
async def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Launcher]:
    made: Launcher
    match request.param:
        case "fake":
            made = FakeLauncher()
        case "subprocess":
            made = subprocesses(tmp_path)
        case kind:
            made = on_kubernetes(tmp_path, kuberay=kind == "rayjob")
    yield made
    await made.close()


async def test_an_engine_runs_until_it_is_stopped(launcher: Launcher) -> None:
    assert not await launcher.list()
    await launcher.start(launch("eng-1"))
    await launcher.start(launch("eng-1"))
    assert await launcher.list() == [LaunchedEngine("eng-1", running=True)]
    await launcher.stop("eng-1")
    await launcher.stop("eng-1")
    assert not await launcher.list()


async def test_an_engine_that_ends_says_why(tmp_path: Path) -> None:
    launcher = subprocesses(tmp_path, BROKEN)
    await launcher.start(launch("eng-1"))
    found = await until(launcher, lambda engine: engine is not None and not engine.running)
    assert found == LaunchedEngine("eng-1", False, "exit code 1", False, "no weights here")
    await launcher.close()


async def test_a_kill_from_outside_is_seen_as_one(tmp_path: Path) -> None:
    launcher = subprocesses(tmp_path)
    await launcher.start(launch("eng-1"))
    os.kill(launcher._children["eng-1"].pid, signal.SIGKILL)
    found = await until(launcher, lambda engine: engine is not None and not engine.running)
    assert found is not None and found.killed and found.exit_status == "killed by signal 9"
    await launcher.close()


async def test_a_successor_knows_what_still_lives(tmp_path: Path) -> None:
    first = subprocesses(tmp_path)
    await first.start(launch("eng-1"))
    second = subprocesses(tmp_path)
    assert await second.list() == [LaunchedEngine("eng-1", running=True)]
    await second.stop("eng-1")
    assert not await second.list()
    await first.start(launch("eng-2"))
    os.kill(first._children["eng-2"].pid, signal.SIGKILL)
    await first._children["eng-2"].wait()
    third = subprocesses(tmp_path)
    [found] = await third.list()
    assert (found.engine_id, found.running, found.killed) == ("eng-2", False, True)


async def test_an_engine_gets_its_own_settings_and_nobody_elses(tmp_path: Path) -> None:
    launcher = subprocesses(tmp_path)
    await launcher.start(launch("eng-1"))
    log = tmp_path / "logs" / "eng-1.log"
    text = await asyncio.to_thread(written, log)
    for expected in (
        "'LATHE_ENGINE_ENGINE_ID': 'eng-1'",
        "'LATHE_ENGINE_BASE_MODEL': 'baseModels/tiny'",
        "'LATHE_ENGINE_JOBS_ADDRESS': '127.0.0.1:1'",
        "'LATHE_ENGINE_ENGINE_CLASS': 'default'",
        "'LATHE_ENGINE_JOB_ID': ''",
        "'LATHE_ENGINE_THREADS': '2'",
        "'LATHE_ENGINE_RPC__PORT': '0'",
        f"'LATHE_ENGINE_PARENT_PID': '{os.getpid()}'",
    ):
        assert expected in text
    assert "LATHE_SECRET" not in text
    assert log.stat().st_mode & 0o077 == 0
    await launcher.close()


async def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    launcher = subprocesses(tmp_path, (str(tmp_path / "missing"),))
    with pytest.raises(FailedPrecondition, match="missing"):
        await launcher.start(launch("eng-1"))
    assert not await launcher.list()


async def test_a_process_that_ended_before_it_was_noted_is_no_survivor(tmp_path: Path) -> None:
    launcher = subprocesses(tmp_path)
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    launcher._note("eng-1", process.pid)
    assert not launcher._list()[0].running


async def test_a_launcher_tells_the_doctor_whether_it_can_start_engines(
    launcher: Launcher, tmp_path: Path
) -> None:
    assert all(finding.ok for finding in await launcher.check())
    [finding] = await subprocesses(tmp_path, (str(tmp_path / "missing"),)).check()
    assert not finding.ok and "missing" in finding.message and finding.advice


async def test_several_workers_are_started_or_refused_as_was_said(launcher: Launcher) -> None:
    why = await launcher.why_one_worker()
    assert bool(why) == (type(launcher) is SubprocessLauncher or _on_deployments(launcher))
    if not why:
        await launcher.start(of_two_workers())
        assert await one(launcher) is not None
        return
    with pytest.raises(FailedPrecondition) as caught:
        await launcher.start(of_two_workers())
    assert caught.value.message == why
    assert await one(launcher) is None


def _on_deployments(launcher: Launcher) -> bool:
    return isinstance(launcher, KubernetesLauncher) and not launcher.api.serves("ray.io/v1")
