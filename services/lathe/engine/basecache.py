"""Base models and adapters on local disk, by digest.

A base model's manifest is the object `basemodels/<digest>.json`, written by the models service when it commits the
model: `{"digest": …, "files": [{"path", "size", "sha256"}, …]}`; the bytes are at `basemodels/files/<sha256>`.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path, PurePosixPath
from shutil import rmtree

from lathe.common.clock import Clock
from lathe.common.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from lathe.common.objectstore.base import LOCAL_DISK, ObjectStore, local_disk
from lathe.engine.checkpoints import MANIFEST, FileEntry, Manifest, digest_file, fetch_files, is_of_training
from lathe.engine.model import AdapterRef

_DIGEST = re.compile(r"[0-9a-f]{64}")


def base_manifest_key(digest: str) -> str:
    """Where a base model's list of files is."""
    return f"basemodels/{digest}.json"


def parse_base_manifest(data: bytes, digest: str) -> tuple[FileEntry, ...]:
    """The files of a base model. Raises DataLoss for anything that is not its manifest."""
    try:
        content = json.loads(data)
        if content["digest"] != digest:
            raise ValueError(f"it is the manifest of {content['digest']}")
        entries = tuple(
            FileEntry(str(item["path"]), int(item["size"]), str(item["sha256"])) for item in content["files"]
        )
        for entry in entries:
            parts = PurePosixPath(entry.path).parts
            if (
                not parts
                or ".." in parts
                or entry.path.startswith("/")
                or not _DIGEST.fullmatch(entry.sha256)
            ):
                raise ValueError(f"{entry.path!r} is no path inside a folder, or has no digest")
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"The manifest of base model {digest} cannot be read: {error}.") from error
    if not entries:
        raise DataLoss(f"The manifest of base model {digest} names no file.")
    return entries


async def ensure_base(store: ObjectStore, digest: str, cache: Path, clock: Clock) -> Path:
    """The folder with a base model's files, fetched if it is not there yet.

    Several engines may share `cache`: one fetches under a lock file, the others wait. Raises NotFound for a
    digest that nobody registered, DataLoss for bytes that do not match, Unavailable while the store is away,
    FailedPrecondition for a cache without room.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgument(f"base_digest must be a SHA-256 in lower-case hex, not {digest!r}.")
    target = cache / "base" / digest
    with _disk_explained(cache), local_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    async with _locked(cache / "base" / f"{digest}.lock", clock):
        if target.is_dir():
            return target
        try:
            data = await store.get(base_manifest_key(digest))
        except NotFound as error:
            raise NotFound(
                f"No base model with digest {digest} is registered in the object store."
            ) from error
        partial = target.with_name(f"{digest}.partial")
        await asyncio.to_thread(rmtree, partial, ignore_errors=True)
        for entry in parse_base_manifest(data, digest):
            path = partial / entry.path
            with _disk_explained(cache):
                with local_disk(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                await _fetch_blob(store, entry, path)
        partial.rename(target)
    return target


async def _fetch_blob(store: ObjectStore, entry: FileEntry, path: Path) -> None:
    try:
        await store.fetch(f"basemodels/files/{entry.sha256}", path)
    except NotFound as error:
        raise DataLoss(
            f"basemodels/files/{entry.sha256} ({entry.path}) is gone from the object store."
        ) from error
    if await asyncio.to_thread(digest_file, path) != entry.sha256:
        raise DataLoss(f"basemodels/files/{entry.sha256} ({entry.path}) does not have that SHA-256.")


async def ensure_adapter(store: ObjectStore, ref: AdapterRef, cache: Path, clock: Clock) -> Path:
    """The folder with an adapter's PEFT files, verified against the manifest that `ref` names.

    Of several callers, in this engine or in others on the cache, one fetches under a lock file and the others wait.
    Raises NotFound when there is no such adapter, DataLoss when its bytes are not those that were registered.
    """
    prefix = ref.prefix.rstrip("/")
    if not _DIGEST.fullmatch(ref.manifest_sha256):
        raise InvalidArgument("adapter.manifest_sha256 must be a SHA-256 in lower-case hex.")
    target = cache / "adapters" / ref.manifest_sha256
    if target.is_dir():
        return target
    try:
        data = await store.get(f"{prefix}/{MANIFEST}")
    except NotFound as error:
        raise NotFound(f"There is no adapter at {prefix}.") from error
    if hashlib.sha256(data).hexdigest() != ref.manifest_sha256:
        raise DataLoss(f"The manifest at {prefix} is not the one that was registered.")
    entries = [entry for entry in Manifest.from_bytes(data).files if not is_of_training(entry.path)]
    async with _locked(target.with_name(f"{ref.manifest_sha256}.lock"), clock):
        if not target.is_dir():
            partial = target.with_name(f"{ref.manifest_sha256}.partial")
            await asyncio.to_thread(rmtree, partial, ignore_errors=True)
            await fetch_files(store, prefix, entries, partial)
            partial.rename(target)
    return target


@contextmanager
def work_folder(cache: Path, engine_id: str) -> Iterator[Path]:
    """A folder for one engine's temporary files, gone afterwards; those of killed engines are removed first."""
    root = cache / "work"
    with _disk_explained(cache), local_disk(root):
        root.mkdir(parents=True, exist_ok=True)
    with (root / f"{engine_id}.lock").open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        for lock in root.glob("*.lock"):
            with lock.open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # it lives
                rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        folder = root / engine_id
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            rmtree(folder, ignore_errors=True)
            (root / f"{engine_id}.lock").unlink(missing_ok=True)


@contextmanager
def _disk_explained(cache: Path) -> Iterator[None]:
    """An engine that cannot fill its cache ends and says so: waiting would not help."""
    try:
        yield
    except Unavailable as error:
        if error.reason != LOCAL_DISK:
            raise
        raise FailedPrecondition(
            f"The engine's cache {cache} cannot take the base model: {error.message} "
            "That is engines.cache of the chart, or LATHE_ENGINE_CACHE_FOLDER.",
            reason=LOCAL_DISK,
        ) from error


@asynccontextmanager
async def _locked(path: Path, clock: Clock) -> AsyncIterator[None]:
    """Hold an advisory lock; it ends with the process, so a killed engine leaves none behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await clock.sleep(0.2)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
