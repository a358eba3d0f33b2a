"""Contenders take turns, round by round, each in a process of its own.

On a machine whose load changes, figures that were taken one after another say little; here every round of one
contender has a round of each other beside it, and what is reported is the median of the rounds' ratios. A process of
its own gives each contender's own peak memory, and lets the first round be a cold one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """What every contender is given. folder: the base model's Hugging Face folder."""

    folder: Path
    threads: int
    rounds: int


class Turns(Protocol):
    """A contender's side: `wait` for a round (False: no more), do it, `report` its figures.

    A round's seconds are those from `wait`'s answer to `report`, unless it says others. Set-up before the first
    `wait` belongs to no round.
    """

    def wait(self) -> bool: ...
    def report(self, *, seconds: float | None = None, **figures: float) -> None: ...


Contender = Callable[[Setting, Turns], None]


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one contender: its seconds (see `clock`), and what it says of itself."""

    seconds: float
    figures: Figures


@dataclass(frozen=True, slots=True)
class Result:
    """One contender's rounds, the first of which was cold; peak resident memory of its process in MiB."""

    rounds: tuple[Round, ...]
    peak_mib: float

    @property
    def warm(self) -> tuple[Round, ...]:
        return self.rounds[1:]

    def speed(self, what: str) -> list[float]:
        """Of each warm round, `what` of its figures a second."""
        return [row.figures[what] / row.seconds for row in self.warm]


def clock(threads: int) -> float:
    """Seconds: of the wall; of the process's CPU where it has one thread, which other load hardly touches."""
    return time.process_time() if threads == 1 else time.perf_counter()


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def alternate(contenders: Mapping[str, str], setting: Setting) -> dict[str, Result]:
    """Runs them in turn: one cold round each, then `setting.rounds` warm ones.

    contenders: name -> "module:function" of a Contender. Raises RuntimeError when one of them dies.
    """
    processes = {name: _Process(name, where, setting) for name, where in contenders.items()}
    try:
        rounds: dict[str, list[Round]] = {name: [] for name in processes}
        for _ in range(setting.rounds + 1):
            for name, process in processes.items():
                rounds[name].append(process.round())
        return {name: Result(tuple(rounds[name]), process.end()) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


class _Process:
    def __init__(self, name: str, where: str, setting: Setting) -> None:
        self._name = name
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(setting.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.engine.contender", where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._tell(json.dumps({**asdict(setting), "folder": str(setting.folder)}))
        self._hear()

    def round(self) -> Round:
        self._tell("round")
        answer = self._hear()
        return Round(answer["seconds"], answer["figures"])

    def end(self) -> float:
        self._tell("end")
        peak = float(self._hear()["peak_mib"])
        self._process.wait(60)
        return peak

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} died with status {self._process.wait()}; see its output above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def timed(threads: int, work: Callable[[], object]) -> float:
    """Seconds of a call (see `clock`)."""
    start = clock(threads)
    work()
    return clock(threads) - start
