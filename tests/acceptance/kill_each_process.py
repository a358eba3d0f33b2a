"""Kills each process of a platform in turn, ten times during a job, and compares the final adapter bit for bit.

    python -m tests.acceptance.kill_each_process [--target embedded|processes|all] [--times 10] [--seed 1]

For every process one job runs after the other until that process was killed (SIGKILL) as often as asked for, at
random moments: while rows are tokenised, while an engine starts, in the middle of a step, of a checkpoint, of the
registration. Each job must succeed, tell every step once, and make the very bytes that an undisturbed job made.
Prints a table, and one line of JSON at the end; the exit code is 1 if a job did not come through.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lathe.client import Client
from lathe.common.errors import LatheError
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.survival import (
    ENDED,
    check_history,
    final_adapter,
    start_long,
    upload_long,
    wait_for_success,
)
from tests.fixtures.platforms import SERVICES, Platform, embedded, processes
from tests.fixtures.servers import run_postgres, run_seaweedfs
from tests.fixtures.tiny_chat import write_tiny_chat

N_EPOCHS = 30
# Longer than an engine needs to start and to store a checkpoint, so that the job gets on between two kills.
LONGEST_LIFE_S = {"engine": 6.0, "jobs": 8.0, "up": 9.0}
LONGEST_LIFE_OF_OTHERS_S = 2.0
JOB_S = 300.0
ROW = "{:<10} {:<9} {:>5} {:>4} {:>8} {:>7} {:>9} {:>13}  {}"


@dataclass
class Result:
    """What became of the jobs during which one process was killed."""

    target: str
    process: str
    kills: int = 0
    jobs: int = 0
    attempts: int = 0
    seconds: float = 0.0
    identical: bool = True
    steps_told_once: bool = True
    wrong: str = ""

    @property
    def good(self) -> bool:
        return self.identical and self.steps_told_once and not self.wrong

    def line(self) -> str:
        words = ("yes" if self.identical else "NO", "yes" if self.steps_told_once else "NO")
        return ROW.format(
            *(self.target, self.process, self.kills, self.jobs, self.attempts, f"{self.seconds:.0f}"),
            *words,
            self.wrong,
        )


@dataclass(frozen=True)
class Killing:
    """One platform, the job to run on it, and what it must make."""

    target: str
    platform: Platform
    client: Client
    base_model: str
    dataset: datasets_pb2.Dataset
    expected: dict[str, bytes]
    dice: random.Random

    def process(self, name: str, times: int) -> Result:
        """Kill one process `times` times."""
        result = Result(self.target, name)
        started = time.monotonic()
        try:
            while result.kills < times and result.good:
                self._job(name, times, result)
        except (AssertionError, LatheError) as error:
            result.wrong = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        result.seconds = time.monotonic() - started
        return result

    def _job(self, name: str, times: int, result: Result) -> None:
        job = start_long(self.client, self.base_model, self.dataset, N_EPOCHS)
        result.jobs += 1
        while result.kills < times:
            if not self._lived(name, job):
                break
            self.platform.kill(name)
            result.kills += 1
            self.platform.start(name)
        job = wait_for_success(self.client, job, JOB_S)
        result.attempts += job.attempt_count
        try:
            check_history(self.client, job)
        except AssertionError:
            result.steps_told_once = False
        result.identical &= final_adapter(self.platform, self.client, job) == self.expected

    def _lived(self, name: str, job: jobs_pb2.Job) -> bool:
        """Let the process live for a random while; False when the job has ended meanwhile."""
        until = time.monotonic() + self.dice.uniform(0.1, LONGEST_LIFE_S.get(name, LONGEST_LIFE_OF_OTHERS_S))
        while time.monotonic() < until or (name == "engine" and not self.platform.engine_pids()):
            if self.client.jobs.get(job.name).state in ENDED:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def platform_of(target: str, folder: Path) -> Iterator[Platform]:
    with ExitStack() as stack:
        if target == "embedded":
            yield stack.enter_context(embedded(folder))
            return
        (folder / "s3").mkdir()
        s3 = stack.enter_context(run_seaweedfs(folder / "s3"))
        yield stack.enter_context(processes(folder, stack.enter_context(run_postgres()), s3))


def run(target: str, times: int, seed: int) -> Iterator[Result]:
    with (
        tempfile.TemporaryDirectory(prefix="lathe-kill-") as name,
        platform_of(target, Path(name)) as platform,
        Client(platform.grpc, platform.api_key, timeout=60) as client,
    ):
        model = client.models.import_folder(write_tiny_chat(Path(name) / "tiny"), "tiny")
        base_model = model.name.removeprefix("baseModels/")
        dataset = upload_long(client)
        started = time.monotonic()
        undisturbed = wait_for_success(client, start_long(client, base_model, dataset, N_EPOCHS), JOB_S)
        check_history(client, undisturbed)
        result = Result(target, "(nobody)", jobs=1, attempts=undisturbed.attempt_count)
        result.seconds = time.monotonic() - started
        yield result
        expected = final_adapter(platform, client, undisturbed)
        killing = Killing(target, platform, client, base_model, dataset, expected, random.Random(seed))
        for process in ("engine", *(SERVICES if target == "processes" else ("up",))):
            yield killing.process(process, times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=("embedded", "processes", "all"), default="all")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    targets = ("embedded", "processes") if options.target == "all" else (options.target,)
    results = []
    print(
        ROW.format(
            *("target", "killed", "kills", "jobs", "attempts", "seconds", "identical"), "told once", ""
        )
    )
    for target in targets:
        for result in run(target, options.times, options.seed):
            results.append(result)
            print(result.line(), flush=True)
    passed = all(result.good for result in results)
    print(json.dumps({"passed": passed, "seed": options.seed, "results": [asdict(one) for one in results]}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
