"""Jobs on several workers: how many there may be, and whether what starts engines can start them."""

from __future__ import annotations

from lathe.common.errors import FieldViolation, InvalidArgument, Unavailable
from lathe.jobs.ports import Launcher

DEFAULT_MAX_WORKERS = 8
_FIELD = "job.compute.workers"


class Gangs:
    """most: workers that one job may have. starts_engines: whether there will be a launcher.

    launcher: set once it is there, which is after the server that needs this.
    """

    def __init__(self, most: int = DEFAULT_MAX_WORKERS, *, starts_engines: bool = True) -> None:
        self._most = most
        self._starts_engines = starts_engines
        self.launcher: Launcher | None = None

    async def check(self, workers: int) -> None:
        """Raises InvalidArgument, naming the field, for what cannot be started; Unavailable if nobody knows now."""
        if workers == 1:
            return
        why = await self._why_not(workers)
        if why:
            text = f"{_FIELD} is {workers}: {why}"
            raise InvalidArgument(text, violations=[FieldViolation(_FIELD, text)])

    async def _why_not(self, workers: int) -> str:
        if workers > self._most:
            return f"a job may have {self._most} at most; an operator can allow more (max_workers of jobs)."
        if self.launcher is None:
            if self._starts_engines:
                raise Unavailable("jobs is just starting; try again.")
            return "this platform does not start engines itself, so a job has one worker."
        return await self.launcher.why_one_worker()
