"""Tokenizers of base models: from the object store into a folder by digest, and into memory."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

from lathe.common.errors import DataLoss, FailedPrecondition
from lathe.common.objectstore.base import ObjectStore
from lathe.gateway.model import BaseModelRef
from lathe.text.tokenizer import Tokenizer

_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "config.json",
    }
)
_TEMPLATES = "additional_chat_templates/"


class TokenizerCache:
    """The TokenizerSource port. Keeps the last `max_items` in memory; one load per model at a time."""

    def __init__(self, store: ObjectStore, folder: Path, max_items: int = 8) -> None:
        self._store = store
        self._folder = folder / "tokenizers"
        self._max_items = max_items
        self._loaded: OrderedDict[str, Tokenizer] = OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}

    async def get(self, base: BaseModelRef) -> Tokenizer:
        """Raises Unavailable while the store is away, FailedPrecondition for a model without tokenizer."""
        async with self._locks.setdefault(base.digest, asyncio.Lock()):
            found = self._loaded.get(base.digest)
            if found is None:
                folder = await self._fetched(base)
                found = await asyncio.to_thread(Tokenizer.from_folder, folder)
            self._loaded[base.digest] = found
            self._loaded.move_to_end(base.digest)
            while len(self._loaded) > self._max_items:
                self._loaded.popitem(last=False)
            return found

    async def _fetched(self, base: BaseModelRef) -> Path:
        target = self._folder / base.digest
        if await asyncio.to_thread(target.is_dir):
            return target
        files = [file for file in base.files if file.path in _FILES or file.path.startswith(_TEMPLATES)]
        if not any(file.path == "tokenizer.json" for file in files):
            raise FailedPrecondition(f"{base.name} has no tokenizer.json; import it again with one.")
        made = await asyncio.to_thread(self._temporary)
        try:
            for file in files:
                path = made / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                await self._store.fetch(file.object_key, path)
                if await asyncio.to_thread(_sha256, path) != file.sha256:
                    raise DataLoss(f"{base.name}: the stored {file.path} does not match its digest.")
            await asyncio.to_thread(_publish, made, target)
        finally:
            await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)
        return target

    def _temporary(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".fetch-", dir=self._folder))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:
        # Another gateway that shares the folder was first: the same digest, the same files.
        if not target.is_dir():
            raise
