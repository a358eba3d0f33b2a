"""Folders for work that may leave gigabytes behind."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lathe.common.objectstore.base import local_disk


@asynccontextmanager
async def work_folder(prefix: str, within: Path | None) -> AsyncIterator[Path]:
    """A new folder, removed in a thread: unlinking large files takes seconds, in which the event loop stays free.

    within: made if missing; the system's temporary folder if not given. Raises Unavailable if the disk refuses it.
    """
    path = await asyncio.to_thread(_made, prefix, within)
    try:
        yield path
    finally:
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


def _made(prefix: str, within: Path | None) -> Path:
    with local_disk((within or Path(tempfile.gettempdir())) / prefix):
        if within is not None:
            within.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=within))
