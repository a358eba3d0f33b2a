"""Checkpoints in the object store: files first, `manifest.json` last. One exists when its manifest does.

jobs/<job>/<attempt>/checkpoints/step-<n>/   adapter_config.json, adapter_model.safetensors, optimizer.safetensors,
                                             best-* (the best adapter so far), reference.safetensors (DPO, KTO)
jobs/<job>/<attempt>/final/                  adapter_config.json, adapter_model.safetensors

A whole model has config.json and model.safetensors in the adapter's place.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shutil import rmtree
from typing import Any

from lathe.common.errors import DataLoss, NotFound
from lathe.common.objectstore.base import ObjectStore
from lathe.engine.model import (
    OPTIMIZER_FILE,
    AdapterRef,
    CheckpointReport,
    RunState,
    SlicePlan,
    Snapshot,
    SnapshotKind,
    StepMetrics,
)
from lathe.engine.retention import Stored
from lathe.engine.watch import Evaluations, LossHistory

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What a method measures the trained model against.
REFERENCE = "reference.safetensors"
# A checkpoint brings the best adapter so far along, under these names.
BEST = "best-"
_VERSION = 1
# What an engine writes; a path would let a manifest reach out of the folder it is fetched into.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FOLDER = re.compile(r"step-(\d+)")
_MANIFEST_KEY = re.compile(r"checkpoints/step-\d+/manifest\.json$")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a folder in the store. sha256: lower-case hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint or a final adapter consists of, and what going on from it needs."""

    kind: SnapshotKind
    step: int
    epoch: int
    total_steps: int
    trained_tokens: int
    slice_plan: SlicePlan
    files: tuple[FileEntry, ...]
    metrics: StepMetrics | None = None
    halvings: Mapping[int, int] | None = None
    # Steps measured but not yet heard by jobs when this was written: the next attempt reports them.
    unreported: tuple[StepMetrics, ...] = ()
    state: RunState = field(default_factory=RunState)

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same manifest is the same bytes."""
        content = asdict(self) | {"version": _VERSION, "kind": str(self.kind)}
        content["halvings"] = {str(step): times for step, times in sorted((self.halvings or {}).items())}
        return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises DataLoss if it is not a manifest that this version can read."""
        try:
            content = json.loads(data)
            if content.pop("version") != _VERSION:
                raise ValueError("another version of the format")
            content["kind"] = SnapshotKind(content["kind"])
            content["slice_plan"] = SlicePlan(**content["slice_plan"])
            content["files"] = tuple(FileEntry(**entry) for entry in content["files"])
            metrics = content["metrics"]
            content["metrics"] = StepMetrics(**metrics) if metrics is not None else None
            content["unreported"] = tuple(StepMetrics(**row) for row in content["unreported"])
            content["state"] = _run_state(content.get("state"))
            content["halvings"] = {int(step): int(n) for step, n in content["halvings"].items()}
            for entry in content["files"]:
                if not _FILE_NAME.fullmatch(entry.path):
                    raise ValueError(f"{entry.path!r} is no plain file name")
            unknown = set(content) - {item.name for item in fields(cls)}
            if unknown:
                raise ValueError(f"unknown fields {sorted(unknown)}")
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataLoss(f"A checkpoint's manifest cannot be read: {error}.") from error


def is_of_training(name: str) -> bool:
    """Whether a checkpoint's file is only for going on with its job: its adapter is whole without it."""
    return name in {OPTIMIZER_FILE, REFERENCE} or name.startswith(BEST)


@dataclass(frozen=True, slots=True)
class Found:
    """A complete checkpoint, its files verified and in a local folder.

    epochs: every epoch's checkpoint up to it, oldest first; some may never have been reported. stored: all checkpoints
    up to it, of equal steps the older attempt's first.
    """

    ref: AdapterRef
    manifest: Manifest
    folder: Path
    epochs: tuple[CheckpointReport, ...] = ()
    stored: tuple[Stored, ...] = ()


def checkpoint_prefix(output_prefix: str, snapshot: Snapshot) -> str:
    """Where a snapshot of the attempt with this output prefix goes; without a slash at the end."""
    base = output_prefix.rstrip("/")
    return (
        f"{base}/final"
        if snapshot.kind is SnapshotKind.FINAL
        else f"{base}/checkpoints/step-{snapshot.step:08d}"
    )


def digest_file(path: Path) -> str:
    """The file's SHA-256 in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(snapshot: Snapshot, plan: SlicePlan, unreported: Sequence[StepMetrics] = ()) -> Manifest:
    """The manifest of a snapshot's folder. Blocks while it hashes."""
    entries = tuple(
        FileEntry(name, (snapshot.folder / name).stat().st_size, digest_file(snapshot.folder / name))
        for name in sorted(snapshot.files)
    )
    return Manifest(
        kind=snapshot.kind,
        step=snapshot.step,
        epoch=snapshot.epoch,
        total_steps=snapshot.total_steps,
        trained_tokens=snapshot.trained_tokens,
        slice_plan=plan,
        files=entries,
        metrics=snapshot.metrics,
        halvings=snapshot.halvings,
        unreported=tuple(row for row in unreported if row.step <= snapshot.step),
        state=snapshot.state,
    )


def _run_state(content: Any) -> RunState:
    """Of a manifest's JSON; one of an earlier version has none."""
    if content is None:
        return RunState()
    losses, unfinished = content["losses"], content["unfinished"]
    return RunState(
        LossHistory(tuple(losses["recent"]), losses["lowest"]),
        Evaluations(**content["evaluations"]),
        StepMetrics(**unfinished) if unfinished is not None else None,
        content.get("fused", False),
    )


async def upload(store: ObjectStore, prefix: str, folder: Path, manifest: Manifest) -> AdapterRef:
    """Put the files, then the manifest. Repeating it after any failure is safe."""
    for entry in manifest.files:
        await store.put_file(f"{prefix}/{entry.path}", folder / entry.path)
    data = manifest.to_bytes()
    await store.put(f"{prefix}/{MANIFEST}", data)
    return AdapterRef(prefix, hashlib.sha256(data).hexdigest())


async def delete(store: ObjectStore, prefix: str) -> None:
    """Remove a checkpoint: its manifest first, so that it never looks whole while it is not."""
    await store.delete(f"{prefix}/{MANIFEST}")
    await store.delete_prefix(f"{prefix}/")


async def sweep(
    store: ObjectStore, output_prefix: str, kept_steps: Collection[int], unneeded: Collection[str]
) -> None:
    """Remove an attempt's checkpoints, half-deleted ones too, but for those of the steps to keep; `unneeded`: prefixes
    that go whatever their step."""
    base = f"{output_prefix.rstrip('/')}/checkpoints/"
    names = {item.key.removeprefix(base).partition("/")[0] async for item in store.list(base)}
    for name in sorted(names):
        step = _FOLDER.fullmatch(name)
        if step is None or int(step[1]) not in kept_steps or base + name in unneeded:
            await delete(store, base + name)


async def fetch_files(store: ObjectStore, prefix: str, entries: Sequence[FileEntry], folder: Path) -> None:
    """Bring files below `prefix` into `folder`. Raises DataLoss when one is gone or not what was written."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    for entry in entries:
        key, path = f"{prefix}/{entry.path}", folder / entry.path
        try:
            await store.fetch(key, path)
        except NotFound as error:
            raise DataLoss(f"{key} is gone from the object store.") from error
        if await asyncio.to_thread(digest_file, path) != entry.sha256:
            raise DataLoss(f"{key} does not have the SHA-256 that its manifest states.")


async def newest_complete(
    store: ObjectStore,
    prefixes: Sequence[str],
    scratch: Path,
    damaged: Callable[[str, DataLoss], None] | None = None,
) -> Found | None:
    """The complete checkpoint with the most steps under `prefixes` (newest attempt first), files verified.

    Whether it was ever reported does not matter. A damaged one is passed over with a line in the log; `damaged` hears
    of it too: its prefix, and what is wrong. scratch: a folder for the files. Raises Unavailable while the store is
    away.
    """

    told: set[str] = set()
    failed: dict[tuple[str, str], DataLoss] = {}

    def pass_over(prefix: str, error: DataLoss) -> None:
        if prefix in told:
            return
        told.add(prefix)
        logger.warning("checkpoint %s is damaged and passed over: %s", prefix, error)
        if damaged is not None:
            damaged(prefix, error)

    while True:
        # Anew after each that failed: an attempt that has lost its lease may have stored newer ones, and removed these.
        candidates = []
        for candidate in await _candidates(store, prefixes, pass_over):
            prefix, _, digest = candidate
            if (prefix, digest) in failed:
                pass_over(prefix, failed[prefix, digest])
            else:
                candidates.append(candidate)
        if not candidates:
            return None
        prefix, manifest, digest = candidates[0]
        folder = scratch / f"from-{manifest.step:08d}-{digest[:12]}"
        try:
            await fetch_files(store, prefix, manifest.files, folder)
        except DataLoss as error:
            failed[prefix, digest] = error
            await asyncio.to_thread(rmtree, folder, ignore_errors=True)
        else:
            before = [candidate for candidate in candidates if candidate[1].step <= manifest.step]
            return Found(AdapterRef(prefix, digest), manifest, folder, _epochs(before), _stored(before))


_Candidate = tuple[str, Manifest, str]


def _epochs(candidates: Sequence[_Candidate]) -> tuple[CheckpointReport, ...]:
    """Each epoch's once, oldest first: the one that was written first, which jobs heard of first."""
    reports = {
        manifest.step: CheckpointReport(manifest.step, AdapterRef(prefix, sha256), manifest.metrics)
        for prefix, manifest, sha256 in candidates
        if manifest.kind is SnapshotKind.EPOCH
    }
    return tuple(reports[step] for step in sorted(reports))


def _stored(candidates: Sequence[_Candidate]) -> tuple[Stored, ...]:
    return tuple(
        Stored(
            prefix,
            manifest.step,
            manifest.kind,
            manifest.metrics.full_valid_loss if manifest.metrics is not None else None,
        )
        for prefix, manifest, _ in reversed(candidates)
    )


async def _candidates(
    store: ObjectStore, prefixes: Sequence[str], pass_over: Callable[[str, DataLoss], None]
) -> list[_Candidate]:
    """Of the most steps first, of equal steps the newest attempt's first, each with its manifest's SHA-256."""
    found: list[tuple[int, int, str, Manifest, str]] = []
    for age, attempt in enumerate(prefixes):
        async for item in store.list(attempt.rstrip("/") + "/checkpoints/"):
            if _MANIFEST_KEY.search(item.key) is None:
                continue
            prefix = item.key.removesuffix(f"/{MANIFEST}")
            try:
                data = await store.get(item.key)
                manifest = Manifest.from_bytes(data)
            except NotFound:
                continue  # it is just being deleted
            except DataLoss as error:
                pass_over(prefix, error)
                continue
            if any(entry.path == OPTIMIZER_FILE for entry in manifest.files):
                found.append((-manifest.step, age, prefix, manifest, hashlib.sha256(data).hexdigest()))
    return [(prefix, manifest, digest) for *_, prefix, manifest, digest in sorted(found, key=lambda f: f[:2])]
