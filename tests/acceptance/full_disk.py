"""Fills the disk under `lathe up` while a job trains, for a while, and frees it again.

    mount -t tmpfs -o size=40m tmpfs /mnt/small
    PYTHONPATH=.:services python -m tests.acceptance.full_disk /mnt/small --seconds 30

The folder must be on a small file system of its own: all of its room is taken. Calls must be refused with a hint, and
the job must end with the same attempt and the same bytes as one that had room. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from lathe.client import Client
from lathe.common.errors import LatheError, Unavailable
from tests.e2e.data import jsonl, lessons
from tests.e2e.survival import (
    check_history,
    final_adapter,
    start_long,
    upload_long,
    wait_for_step,
    wait_for_success,
)
from tests.fixtures.platforms import Platform, embedded
from tests.fixtures.tiny_chat import write_tiny_chat

# Taking the room of anything larger would be a mistake.
_LARGEST_BYTES = 1 << 30


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte of room on the folder's file system while inside."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 10, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                continue  # nothing of this size fits any more
    try:
        yield
    finally:
        filler.unlink()


def refusals(platform: Platform, calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    """What each call was answered; "refused" is right."""
    found = {}
    for name, call in calls.items():
        try:
            answer = call()
        except Unavailable as error:
            found[name] = "refused" if error.retry_after else "refused without a hint"
        except LatheError as error:
            found[name] = repr(error)
        else:
            found[name] = f"answered {str(answer)[:80]!r}"
    content = ("a.jsonl", jsonl(lessons(8)))
    answer = httpx.post(
        f"{platform.http}/v1/files",
        headers={"authorization": f"Bearer {platform.api_key}"},
        data={"purpose": "fine-tune"},
        files={"file": content},
        timeout=20,
    )
    hinted = answer.status_code == 503 and "retry-after" in answer.headers
    found["HTTP upload"] = "refused" if hinted else f"{answer.status_code} {answer.text[:80]!r}"
    return found


def run(folder: Path, seconds: float) -> bool:
    """Whether all was as it should be; prints what was seen."""
    with embedded(folder) as platform, Client(platform.grpc, platform.api_key, timeout=5) as client:
        with tempfile.TemporaryDirectory() as tiny:
            client.models.import_folder(write_tiny_chat(Path(tiny)), "tiny", license="Apache-2.0")
        dataset = upload_long(client)
        whole = final_adapter(platform, client, wait_for_success(client, start_long(client, "tiny", dataset)))
        job = wait_for_step(client, start_long(client, "tiny", dataset), 60)
        calls: dict[str, Callable[[], object]] = {
            "upload": lambda: client.datasets.upload(jsonl(lessons(8))),
            "create a job": lambda: start_long(client, "tiny", dataset),
        }
        with full(folder):
            end = time.monotonic() + seconds
            found = refusals(platform, calls)
            time.sleep(max(0.0, end - time.monotonic()))
        job = wait_for_success(client, job)
        check_history(client, job)
        same = final_adapter(platform, client, job) == whole
    report = {"calls": found, "attempts": job.attempt_count, "lost": job.lost_lease_count, "same_bytes": same}
    print(json.dumps(report))
    return same and job.attempt_count == 1 and set(found.values()) == {"refused"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    if _size(given.folder) > _LARGEST_BYTES:
        print(f"{given.folder} is on a file system above 1 GiB; mount a small one there.", file=sys.stderr)
        return 2
    return 0 if run(given.folder, given.seconds) else 1


def _size(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_frsize * found.f_blocks


if __name__ == "__main__":
    sys.exit(main())
