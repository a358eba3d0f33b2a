"""How much memory a piece of work takes, how much is left, and what was learned of it before.

On CUDA the allocator counts. On a CPU it is the process's resident memory: Linux remembers its highest level, and lets
a process begin anew. Where neither is there nothing is measured (None), and memory is found out by running out of it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# glibc's mallopt(3), and the most it takes for the first.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _MAPPED_BYTES = 256 << 20, 32 << 20
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): the peak resident set size becomes the present one


def peak_bytes(device: torch.device, work: Callable[[], None]) -> int | None:
    """How much more than now is held at the worst moment of `work`, in bytes; None where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back_heap()
    resident, resets = _resident("VmRSS"), _reset_peak()
    work()
    peak = _resident("VmHWM")
    return max(0, peak - resident) if resets and resident is not None and peak is not None else None


def free_bytes(device: torch.device) -> int | None:
    """How much more this process may take: what the device, or the machine and its control group, have left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    _give_back_heap()
    found = [left for left in (_machine_left(), *_group_left(Path("/sys/fs/cgroup"))) if left is not None]
    return max(0, min(found)) if found else None


def keep_heap() -> None:
    """Lets freed memory stay with the process, up to 256 MiB: by itself glibc gives it back after each pass and asks
    for it anew in the next, page by page (14,000 pages, 25 of 550 ms, in a pass of 200 tokens)."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    except (OSError, AttributeError):
        return


def _give_back_heap() -> None:
    """What is freed but kept for later would hide what the work takes, and count as taken."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    return _kilobytes(Path("/proc/self/status"), name)


def _machine_left() -> int | None:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _group_left(root: Path) -> Iterator[int | None]:
    """What the process's control group may still take, by version 2 and by version 1; page cache is given up first."""
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            yield most - now + _statistic(folder / "memory.stat", cache)


def _kilobytes(path: Path, name: str) -> int | None:
    found = _statistic(path, f"{name}:")
    return found * 1024 or None


def _statistic(path: Path, name: str) -> int:
    """The number behind a name, 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next(
        (
            int(line.split()[1])
            for line in lines
            if line.startswith(f"{name} ") or line.startswith(f"{name}\t")
        ),
        0,
    )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


@dataclass(frozen=True, slots=True)
class Load:
    """What a pass's memory depends on. tokens: all of its rows'; longest: of one row; trained: that reach the head;
    padded: the rows in attention, where each is as long as the longest."""

    tokens: int
    longest: int
    trained: int
    padded: int

    def covers(self, other: Load) -> bool:
        """Whether a pass of this load takes at least as much as one of the other."""
        return all(mine >= its for mine, its in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a pass of a load took at its worst moment, beyond what was held before it."""

    load: Load
    bytes: int


def bound(known: Sequence[Measurement], load: Load) -> int | None:
    """The least that a pass of the load is known not to exceed; None where no measured one covers it."""
    return min((item.bytes for item in known if item.load.covers(load)), default=None)


class MemoryBook:
    """Measurements that outlive a process: lines of JSON in the engine's cache, shared by all engines on it.

    A cache that is emptied costs a measurement more for each kind of adapter, nothing else. A torn line is passed over.
    profile: what beside the load decides (base, adapter, dtype, device), as one text.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def known(self, profile: str) -> list[Measurement]:
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return []
        return [found for line in lines if (found := _measurement(line, profile)) is not None]

    def learn(self, profile: str, measured: Measurement) -> None:
        """Keeps it. A cache that cannot be written is no reason to stop."""
        line = json.dumps({"profile": profile, **asdict(measured.load), "bytes": measured.bytes}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending: engines that share the cache do not mix their lines.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:
            logger.warning("the measured memory is not kept: %s", error)


def _measurement(line: bytes, profile: str) -> Measurement | None:
    try:
        content = json.loads(line)
        if content["profile"] != profile:
            return None
        load = Load(*(int(content[part.name]) for part in fields(Load)))
        return Measurement(load, int(content["bytes"]))
    except (ValueError, KeyError, TypeError):
        return None
