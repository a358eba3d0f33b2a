"""peak_mb_1gb: resident memory (10^6 bytes, the process's highest) of the service's validation of a 1 GB file.

The whole pass, in a process of its own: the staged file out of a folder store, hash, rows, what is stored beside it,
the blob, SQLite.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.datasets.corpus import Setting, chat_file

MEGABYTES = 1000


def measure(setting: Setting) -> dict[str, float]:
    path = chat_file(setting, MEGABYTES)
    command = [sys.executable, "-m", "tests.benchmarks.datasets.memory", str(path)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(found))


async def _validate(path: Path, size: int, digest: str, folder: Path) -> dict[str, float]:
    from lathe.common.clock import SystemClock
    from lathe.common.db import Database, migrate
    from lathe.common.ids import RandomIds
    from lathe.common.objectstore.folder import FolderStore
    from lathe.datasets.blobs import Blobs
    from lathe.datasets.model import DatasetState
    from lathe.datasets.service import DatasetsService
    from lathe.datasets.store import SqlDatasetStore
    from lathe.datasets.validation import Validation
    from tests.fakes.datasets import FakeBaseModels
    from tests.fakes.ids import FakeIds

    db = Database(f"sqlite+aiosqlite:///{folder}/datasets.sqlite")
    await migrate(db, "lathe.datasets")
    store, objects = SqlDatasetStore(db), FolderStore(folder / "store")
    service = DatasetsService(store, objects, FakeBaseModels(), SystemClock(), FakeIds())
    dataset = await service.create("bench", path.name, "fine-tune", None, "")
    await objects.put_file(dataset.staging_key, path)
    await service.commit_upload("bench", dataset.id, dataset.staging_key, size, digest)
    began = time.monotonic()
    await Validation(Blobs(store, objects, SystemClock(), RandomIds())).step()
    seconds = time.monotonic() - began
    dataset = await service.get("bench", dataset.id)
    assert dataset.state is DatasetState.READY, dataset.report
    await db.close()
    return {"peak_mb_1gb": _peak_bytes() / 1e6, "validation_seconds_1gb": seconds}


def _peak_bytes() -> int:
    """The most that this process has had resident; getrusage's figure would begin with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (kibibytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024


if __name__ == "__main__":
    source = Path(sys.argv[1])
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with tempfile.TemporaryDirectory(dir=source.parent) as temporary:
        print(json.dumps(asyncio.run(_validate(source, source.stat().st_size, sha256, Path(temporary)))))
