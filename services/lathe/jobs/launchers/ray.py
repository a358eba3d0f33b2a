"""Engines as jobs of a Ray cluster, through Ray's Job REST API. Ray itself is never imported here."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lathe.common.diagnosis import Finding
from lathe.common.errors import LatheError, Unavailable
from lathe.jobs.launchers.processes import engine_variables, gang_variables
from lathe.jobs.ports import EngineLaunch, LaunchedEngine

_RUNNING = ("PENDING", "RUNNING")
_MARK = "lathe_engine"


@dataclass(frozen=True, slots=True)
class RayLauncher:
    """One Ray job per engine; the entrypoint is the engine itself, and its submission id the engine's.

    address: `http://host:port` of the dashboard. entrypoint: a shell command line on a Ray node. num_cpus, num_gpus:
    what an engine takes of Ray, and each of its other workers again.
    """

    address: str
    entrypoint: str
    jobs_address: str
    engine_env: Mapping[str, str] = field(default_factory=dict)
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    timeout_s: float = 5.0

    async def start(self, launch: EngineLaunch) -> None:
        variables = engine_variables(launch, self.jobs_address, self.engine_env)
        variables |= gang_variables(launch, self.num_cpus, self.num_gpus)
        body = {
            "entrypoint": self.entrypoint,
            "submission_id": launch.engine_id,
            "runtime_env": {"env_vars": variables},
            "metadata": {_MARK: launch.base_model},
            "entrypoint_num_cpus": self.num_cpus,
            "entrypoint_num_gpus": self.num_gpus,
        }
        if await self._find(launch.engine_id) is None:
            # Ray answers a submission only when its agent has taken it, which may need a process to start.
            await self._call("POST", "/api/jobs/", body, timeout_s=60.0)

    async def list(self) -> Sequence[LaunchedEngine]:
        jobs = await self._call("GET", "/api/jobs/")
        return [
            await self._engine(job)
            for job in jobs
            if (job.get("metadata") or {}).get(_MARK) and job.get("submission_id")
        ]

    async def stop(self, engine_id: str) -> None:
        job = await self._find(engine_id)
        if job is None:
            return
        if job.get("status") in _RUNNING:
            await self._call("POST", f"/api/jobs/{engine_id}/stop", {})
            # Ray forgets only jobs that have ended; the next call does that.
            return
        await self._call("DELETE", f"/api/jobs/{engine_id}")

    async def why_one_worker(self) -> str:
        return ""

    async def check(self) -> Sequence[Finding]:
        try:
            version = await self._call("GET", "/api/version")
        except LatheError as error:
            advice = "Start Ray there, or correct jobs' launcher.ray_address."
            return [Finding("ray", False, error.message, advice)]
        named = str((version or {}).get("ray_version") or "of an unknown version")
        return [Finding("ray", True, f"Ray {named} answers at {self.address}.")]

    async def close(self) -> None:
        """Nothing to do: the engines belong to the cluster and outlive this process."""

    async def _find(self, engine_id: str) -> dict[str, Any] | None:
        found = await self._call("GET", f"/api/jobs/{engine_id}", missing=None)
        return dict(found) if found is not None else None

    async def _engine(self, job: Mapping[str, Any]) -> LaunchedEngine:
        engine_id, status = str(job["submission_id"]), str(job.get("status"))
        if status in _RUNNING:
            return LaunchedEngine(engine_id, running=True)
        said = str(job.get("message") or "")
        logs = await self._call("GET", f"/api/jobs/{engine_id}/logs", missing={})
        lines = [line.strip() for line in str(logs.get("logs") or "").splitlines() if line.strip()]
        # STOPPED: somebody stopped it from outside.
        return LaunchedEngine(
            engine_id,
            running=False,
            exit_status=f"Ray says {status}: {said}" if said else f"Ray says {status}",
            killed=status == "STOPPED",
            last_log_line=lines[-1] if lines else "",
        )

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        timeout_s: float | None = None,
        **missing: Any,
    ) -> Any:
        """The answer's JSON. missing: what to answer for 404. Raises Unavailable."""
        try:
            return await asyncio.to_thread(self._request, method, path, body, timeout_s or self.timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 404 and "missing" in missing:
                return missing["missing"]
            raise Unavailable(f"Ray refused {method} {path}: {_detail(error)}", reason="RAY") from error
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"Ray's job API at {self.address} does not answer: {error}", reason="RAY"
            ) from error

    def _request(self, method: str, path: str, body: Mapping[str, object] | None, timeout_s: float) -> Any:
        request = urllib.request.Request(
            self.address.rstrip("/") + path,
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json"},
            method=method,
        )
        # The cluster's own network: a proxy for the Internet has no business here.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout_s) as response:
            text = response.read()
        return json.loads(text) if text else None


def _detail(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace").strip()
    return text.splitlines()[-1] if text else str(error)
