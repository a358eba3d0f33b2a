"""What may be imported from: URLs, buckets that the operator lists, a hub's datasets."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from lathe.common.errors import InvalidArgument, NotFound, Unavailable
from lathe.common.objectstore.base import ObjectStore, validate_key
from lathe.datasets.fetching import FetchBroke, Fetcher, FetchRefused, Secret, checked, shown
from lathe.datasets.model import MAX_NAME, invalid

_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.+)")
_HUB = re.compile(
    r"hf:([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::(\w[\w.-]{0,95})/(\w[\w.-]{0,95}))?", re.ASCII
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_LISTING = 1 << 20
_MAX_FILES = 1000

Source = Callable[[], AsyncGenerator[bytes, None]]
"""Begins to read one file. Raises FetchRefused, FetchBroke."""


def check_source(source: str) -> str:
    """A name for the file. Raises InvalidArgument for what is no source."""
    if bucket := _BUCKET.fullmatch(source):
        try:
            return PurePosixPath(validate_key(bucket[2])).name
        except InvalidArgument as error:
            raise invalid("source", f"source: {error.message}") from error
    if hub := _HUB.fullmatch(source):
        return f"{hub[1].replace('/', '-')}-{hub[3] or 'train'}.parquet"
    try:
        parts = checked(source)
    except FetchRefused as error:
        raise invalid(
            "source", f"source: {error} Or use s3://bucket/key, or hf:owner/name[:config/split]."
        ) from error
    name = _CONTROL.sub("_", PurePosixPath(unquote(parts.path)).name)
    # The ending says what a file is.
    return name[-MAX_NAME:] or (parts.hostname or "import")


def shown_source(source: str) -> str:
    """As anybody in the project may see it."""
    return shown(source) if "://" in source else source


@dataclass(frozen=True, slots=True)
class Sources:
    """buckets: those that may be read, by name; never the platform's own. hub: the URL of a Hugging Face hub, secret:
    what it is told of who asks."""

    fetcher: Fetcher
    hub: str
    buckets: Mapping[str, ObjectStore] = field(default_factory=dict)
    secret: Secret | None = None

    @property
    def max_bytes(self) -> int:
        """Of all that one source names."""
        return self.fetcher.max_bytes

    async def files(self, source: str) -> Sequence[Source]:
        """What a source names: one file, or several that are one dataset in this order. Raises FetchRefused,
        FetchBroke, as reading one does."""
        if bucket := _BUCKET.fullmatch(source):
            return [partial(self._from_bucket, bucket[1], bucket[2])]
        if hub := _HUB.fullmatch(source):
            urls = await self._hub_files(hub[1], hub[2], hub[3])
            return [partial(self.fetcher.fetch, url, self.secret) for url in urls]
        return [partial(self.fetcher.fetch, source)]

    async def _from_bucket(self, name: str, key: str) -> AsyncGenerator[bytes, None]:
        if name not in self.buckets:
            raise FetchRefused(f"The bucket {name} is none that the operator lets imports read.")
        try:
            async for chunk in self.buckets[name].stream(key):
                yield chunk
        except NotFound as error:
            raise FetchRefused(f"There is no object {key[:200]!r} in {name}.", "import_failed") from error
        except Unavailable as error:
            raise FetchBroke(error.message) from error

    async def _hub_files(self, dataset: str, config: str | None, split: str | None) -> list[str]:
        """The URLs of the Parquet files that the hub has for a split (https://huggingface.co/docs/dataset-viewer/parquet)."""
        listing = bytearray()
        named = f"/{config}/{split}" if config is not None else ""
        url = f"{self.hub.rstrip('/')}/api/datasets/{dataset}/parquet{named}"
        async for chunk in self.fetcher.fetch(url, self.secret):
            listing += chunk
            if len(listing) > _MAX_LISTING:
                less = "" if named else f" Name its config and split: hf:{dataset}:config/split."
                raise FetchRefused(f"The hub's list of files is too long.{less}", "import_failed")
        try:
            files = json.loads(listing)
        except (ValueError, RecursionError) as error:
            raise FetchRefused("The hub's list of files is not JSON.", "import_failed") from error
        if not named:
            files = _train_split(dataset, files)
        if not isinstance(files, list) or not files or not all(map(_is_parquet, files)):
            raise FetchRefused(f"The hub has no Parquet files of {dataset}{named}.", "import_failed")
        if len(files) > _MAX_FILES:
            raise FetchRefused(
                f"{dataset}{named} is {len(files)} files; at most {_MAX_FILES} are imported.",
                "import_too_large",
            )
        return files


def _train_split(dataset: str, configs: object) -> object:
    """The files of a whole dataset's train split: of its config `default`, or the only one. configs: config -> split ->
    files. Raises FetchRefused."""
    if not isinstance(configs, dict) or not configs:
        return None
    config = "default" if "default" in configs or len(configs) > 1 else next(iter(configs))
    splits = configs.get(config)
    if isinstance(splits, dict) and "train" in splits:
        return splits["train"]
    found = [
        f"hf:{dataset}:{config}/{split}"
        for config, splits in configs.items()
        for split in (splits if isinstance(splits, dict) else ())
    ]
    raise FetchRefused(f"Say which of its splits is meant: {', '.join(found[:10])}.", "import_failed")


def _is_parquet(url: object) -> bool:
    return isinstance(url, str) and urlsplit(url).path.endswith(".parquet")
