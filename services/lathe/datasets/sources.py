"""What may be imported from: URLs, buckets that the operator lists, a hub's datasets."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from lathe.common.errors import InvalidArgument, NotFound, Unavailable
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.fetching import FetchBroke, Fetcher, FetchRefused, checked, shown
from lathe.datasets.model import invalid

_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.+)")
_HUB = re.compile(
    r"hf:([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::([\w.-]{1,96})/([\w.-]{1,96}))?", re.ASCII
)
_MAX_LISTING = 1 << 20


def check_source(source: str) -> str:
    """A name for the file. Raises InvalidArgument for what is no source."""
    if bucket := _BUCKET.fullmatch(source):
        return PurePosixPath(bucket[2]).name[:255] or bucket[1]
    if hub := _HUB.fullmatch(source):
        return f"{hub[1].replace('/', '-')}-{hub[3] or 'train'}.parquet"
    try:
        parts = checked(source)
    except FetchRefused as error:
        raise invalid(
            "source", f"source: {error} Or use s3://bucket/key, or hf:owner/name[:config/split]."
        ) from error
    return unquote(PurePosixPath(parts.path).name)[:255] or (parts.hostname or "import")


def shown_source(source: str) -> str:
    """As anybody in the project may see it."""
    return shown(source) if "://" in source else source


@dataclass(frozen=True, slots=True)
class Sources:
    """buckets: those that may be read, by name; never the platform's own. hub: the address of a Hugging Face hub."""

    fetcher: Fetcher
    hub: str
    buckets: Mapping[str, ObjectStore] = field(default_factory=dict)

    async def read(self, source: str) -> AsyncIterator[bytes]:
        """The bytes. Raises FetchRefused, FetchBroke."""
        if bucket := _BUCKET.fullmatch(source):
            chunks = self._from_bucket(bucket[1], bucket[2])
        elif hub := _HUB.fullmatch(source):
            chunks = self.fetcher.fetch(await self._hub_file(hub[1], hub[2] or "default", hub[3] or "train"))
        else:
            chunks = self.fetcher.fetch(source)
        async for chunk in chunks:
            yield chunk

    async def _from_bucket(self, name: str, key: str) -> AsyncIterator[bytes]:
        if name not in self.buckets:
            raise FetchRefused(f"The bucket {name} is none that the operator lets imports read.")
        size = 0
        try:
            async for chunk in self.buckets[name].stream(key):
                size += len(chunk)
                if size > self.fetcher.max_bytes:
                    raise FetchRefused(
                        f"It is larger than {self.fetcher.max_bytes} bytes.", "import_too_large"
                    )
                yield chunk
        except (NotFound, InvalidArgument) as error:
            raise FetchRefused(f"There is no object {key[:200]!r} in {name}.", "import_failed") from error
        except Unavailable as error:
            raise FetchBroke(error.message) from error

    async def _hub_file(self, dataset: str, config: str, split: str) -> str:
        """The URL of the one Parquet file that the hub has for a split."""
        listing = bytearray()
        async for chunk in self.fetcher.fetch(
            f"{self.hub.rstrip('/')}/api/datasets/{dataset}/parquet/{config}/{split}"
        ):
            listing += chunk
            if len(listing) > _MAX_LISTING:
                raise FetchRefused("The hub's list of files is too long.", "import_failed")
        try:
            files = json.loads(listing)
        except ValueError as error:
            raise FetchRefused("The hub's list of files is not JSON.", "import_failed") from error
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files) or not files:
            raise FetchRefused(
                f"The hub has no Parquet files of {dataset} {config}/{split}.", "import_failed"
            )
        if len(files) > 1:
            raise FetchRefused(
                f"{dataset} {config}/{split} is {len(files)} files; import them one by one: "
                f"{', '.join(files[:5])}",
                "import_failed",
            )
        url: str = files[0]
        if not urlsplit(url).path.endswith(".parquet"):
            raise FetchRefused("The hub's list names no Parquet file.", "import_failed")
        return url
