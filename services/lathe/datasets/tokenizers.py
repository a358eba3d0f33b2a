"""The tokenizers of base models, kept while they are used."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from lathe.common.errors import DataLoss
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.blobs import file_sha256
from lathe.datasets.model import TokenizerFile
from lathe.text.tokenizer import Tokenizer


class TokenizerCache:
    """Tokenizers by the digests of their files: the last few in memory, all that were used in a folder."""

    def __init__(self, objects: ObjectStore, folder: Path, max_items: int = 2) -> None:
        self._objects = objects
        self._folder = folder / "tokenizers"
        self._max_items = max_items
        self._loaded: OrderedDict[str, Tokenizer] = OrderedDict()

    async def get(self, files: Collection[TokenizerFile]) -> Tokenizer:
        """Raises NotFound if a file is gone, DataLoss if it is not what it was, Unavailable."""
        key = _key(files)
        if key not in self._loaded:
            folder = await self.folder(files)
            self._loaded[key] = await asyncio.to_thread(Tokenizer.from_folder, folder)
        self._loaded.move_to_end(key)
        while len(self._loaded) > self._max_items:
            self._loaded.popitem(last=False)
        return self._loaded[key]

    async def folder(self, files: Collection[TokenizerFile]) -> Path:
        """Where a tokenizer's files lie. Raises what `get` raises."""
        return await self._fetched(_key(files), files)

    async def _fetched(self, key: str, files: Collection[TokenizerFile]) -> Path:
        target = self._folder / key
        if await asyncio.to_thread(target.is_dir):
            return target
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self._folder) as temporary:
            made = Path(temporary) / "files"
            for file in files:
                path = made / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                await self._objects.fetch(file.object_key, path)
                if await asyncio.to_thread(file_sha256, path) != file.sha256:
                    raise DataLoss(f"The stored {file.path} of the tokenizer does not match its digest.")
            if not target.is_dir():
                made.rename(target)
        return target


def _key(files: Collection[TokenizerFile]) -> str:
    listed = sorted([file.path, file.sha256] for file in files)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
