"""Engines as child processes of this one: what `lathe up` uses."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lathe.common.diagnosis import Finding
from lathe.common.errors import FailedPrecondition, Unavailable
from lathe.jobs.launchers.processes import engine_variables, inherited
from lathe.jobs.ports import EngineLaunch, LaunchedEngine

log = logging.getLogger(__name__)

_LOG_TAIL_BYTES = 8192
_ONE_WORKER = (
    "engines are processes of one machine here, of one worker each; more need Ray (jobs' launcher.kind)."
)
# A command that is missing or cannot be run; a full disk or process table may pass.
_NEVER = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOEXEC, errno.ENOTDIR)
# Several engines share this machine with whoever started them: no fixed ports, unless they are given.
_FREE_PORTS = {
    "LATHE_ENGINE_RPC__PORT": "0",
    "LATHE_ENGINE_RPC__HEALTH_PORT": "null",
    "LATHE_ENGINE_METRICS__PORT": "0",
}


@dataclass(slots=True)
class SubprocessLauncher:
    """One process per engine, in a session of its own, its output in `folder`/logs.

    `folder`/engines has a file per process, so that a successor of this process knows which still live.
    command: what to run; stop_grace_s: between SIGTERM and SIGKILL.
    """

    folder: Path
    command: Sequence[str]
    jobs_address: str
    engine_env: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    stop_grace_s: float = 10.0
    _children: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    async def start(self, launch: EngineLaunch) -> None:
        if launch.workers > 1:
            raise FailedPrecondition(_ONE_WORKER)
        engine_id = launch.engine_id
        if engine_id in self._children or await asyncio.to_thread(self._survivor, engine_id) is not None:
            return
        env = inherited(self.environ) | engine_variables(
            launch, self.jobs_address, {**_FREE_PORTS, **self.engine_env}
        )
        env["LATHE_ENGINE_PARENT_PID"] = str(os.getpid())
        try:
            descriptor = await asyncio.to_thread(self._open_log, engine_id)
            try:
                process = await asyncio.create_subprocess_exec(
                    *self.command,
                    env=env,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=descriptor,
                    stderr=descriptor,
                    start_new_session=True,
                )
            finally:
                os.close(descriptor)
            self._children[engine_id] = process
            await asyncio.to_thread(self._note, engine_id, process.pid)
        except OSError as error:
            message = f"The engine's process cannot be started: {error}."
            if error.errno in _NEVER:
                raise FailedPrecondition(message) from error
            raise Unavailable(message) from error

    async def list(self) -> Sequence[LaunchedEngine]:
        return await asyncio.to_thread(self._list)

    async def stop(self, engine_id: str) -> None:
        process = self._children.get(engine_id)
        if process is not None:
            if process.returncode is None:
                await self._end(process)
            del self._children[engine_id]
        else:
            survivor = await asyncio.to_thread(self._survivor, engine_id)
            if survivor is not None:
                _signal(survivor, signal.SIGKILL)
        await asyncio.to_thread(self._record(engine_id).unlink, missing_ok=True)

    async def why_one_worker(self) -> str:
        return _ONE_WORKER

    async def check(self) -> Sequence[Finding]:
        program = self.command[0]
        if await asyncio.to_thread(shutil.which, program) is None:
            advice = "Install Lathe with its engine (`make install`), so that jobs can start engines."
            return [Finding("launcher", False, f"Engines cannot start: there is no {program}.", advice)]
        return [Finding("launcher", True, "Engines start as processes of this machine.")]

    async def close(self) -> None:
        await asyncio.gather(*(self.stop(engine_id) for engine_id in list(self._children)))

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        _signal(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), self.stop_grace_s)
        except TimeoutError:
            _signal(process.pid, signal.SIGKILL)
            await process.wait()

    # --- files; all of this runs in a thread ---

    def _list(self) -> Sequence[LaunchedEngine]:
        found = [self._child(engine_id, process) for engine_id, process in list(self._children.items())]
        records = self.folder / "engines"
        for path in sorted(records.glob("*.json")) if records.is_dir() else []:
            if path.stem not in self._children:
                running = self._survivor(path.stem) is not None
                found.append(
                    LaunchedEngine(
                        path.stem,
                        running,
                        exit_status="" if running else "it ended with the process that started it",
                        killed=not running,
                    )
                )
        return found

    def _child(self, engine_id: str, process: asyncio.subprocess.Process) -> LaunchedEngine:
        code = process.returncode
        if code is None:
            return LaunchedEngine(engine_id, running=True)
        status = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        outside = code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
        return LaunchedEngine(engine_id, False, status, outside, self._last_line(engine_id))

    def _log_path(self, engine_id: str) -> Path:
        return self.folder / "logs" / f"{engine_id}.log"

    def _record(self, engine_id: str) -> Path:
        return self.folder / "engines" / f"{engine_id}.json"

    def _open_log(self, engine_id: str) -> int:
        path = self._log_path(engine_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _note(self, engine_id: str, pid: int) -> None:
        path = self._record(engine_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"pid": pid, "started": _start_mark(pid)}))
        part.replace(path)

    def _survivor(self, engine_id: str) -> int | None:
        """The pid of a process that a predecessor of ours started and that still runs."""
        try:
            noted = json.loads(self._record(engine_id).read_text())
            pid, started = int(noted["pid"]), str(noted["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        # The same pid may be another process by now; its start says which it is. One that had ended before it was
        # noted has none.
        return pid if started and _start_mark(pid) == started else None

    def _last_line(self, engine_id: str) -> str:
        try:
            with self._log_path(engine_id).open("rb") as stream:
                stream.seek(0, os.SEEK_END)
                stream.seek(max(0, stream.tell() - _LOG_TAIL_BYTES))
                text = stream.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        log.debug("Process group %s is gone already.", pid)


def _start_mark(pid: int) -> str:
    """Something that differs between two processes with the same pid; empty if there is none (or a zombie)."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.parent.parent.is_dir() or not Path("/proc/self/stat").exists():
        return _alive_mark(pid)
    try:
        # The second field is the name in parentheses and may itself hold spaces and parentheses.
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _alive_mark(pid: int) -> str:
    """Where there is no /proc: only whether the pid is in use."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "alive"
    return "alive"
