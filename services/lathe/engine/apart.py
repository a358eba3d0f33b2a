"""Torch's work outside the model thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def apart(work: Callable[[], T]) -> T:
    """What `work` answers or raises, from a thread that ends with it.

    libgomp gives each thread that computes workers of its own, for as long as it lives, and lets none of the process's
    workers spin once they are more than the cores: beside one more such thread, idle as it is (as `asyncio.to_thread`
    keeps it), the model thread slept and woke 30,000 times a step of 8 rows instead of 300, and took 1.7 times as long.
    """
    pool = ThreadPoolExecutor(1, "apart")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)
