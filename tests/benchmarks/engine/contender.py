"""The process of one contender: python -m tests.benchmarks.engine.contender module:function (see rounds.py)."""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import TextIO

from tests.benchmarks.engine.rounds import Setting, clock


class PipeTurns:
    """Turns over stdin and a private copy of stdout."""

    def __init__(self, answers: TextIO, threads: int) -> None:
        self._answers, self._threads = answers, threads
        self._ready = False
        self._began = 0.0

    def wait(self) -> bool:
        if not self._ready:
            self._ready = True
            self.say(ready=True)
        if sys.stdin.readline().strip() != "round":
            return False
        self._began = clock(self._threads)
        return True

    def report(self, *, seconds: float | None = None, **figures: float) -> None:
        whole = clock(self._threads) - self._began
        self.say(seconds=whole if seconds is None else seconds, figures=figures)

    def say(self, **answer: object) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def main() -> None:
    # What libraries print goes to stderr: stdout is the parent's.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, function = sys.argv[1].split(":")
    given = json.loads(sys.stdin.readline())
    setting = Setting(Path(given["folder"]), given["threads"], given["rounds"])
    turns = PipeTurns(answers, setting.threads)
    getattr(importlib.import_module(module), function)(setting, turns)
    turns.say(peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
