"""Files of base models and adapters on their way out of the object store."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from lathe.common.errors import NotFound
from lathe.common.objectstore.base import ObjectStore
from lathe.common.rpc.principal import Principal
from lathe.gateway.bytestreams import opened
from lathe.gateway.model import ServedModel
from lathe.gateway.ports import ModelResolver

# What engines write; nothing that could lead out of the adapter's own prefix.
_ADAPTER_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ModelDownloads:
    """Whoever may use a model may take it away: base models are the platform's, adapters the project's own."""

    def __init__(self, models: ModelResolver, store: ObjectStore) -> None:
        self._models = models
        self._store = store

    async def download(
        self, principal: Principal, model: str, path: str, *, offset: int = 0
    ) -> AsyncIterator[bytes]:
        """The bytes of one file from `offset`; what can be refused is raised before the first byte.

        model: a base model's id for its files, a tuned model's for its adapter's. Raises NotFound, OutOfRange,
        Unavailable.
        """
        key = _key(await self._models.resolve(principal, model), path)
        if key is None:
            raise NotFound(f"The model {model!r} has no file {path!r}.")
        return await opened(self._store, key, offset, f"{path} of {model}")


def _key(model: ServedModel, path: str) -> str | None:
    if model.adapter is not None:
        return f"{model.adapter.prefix}/{path}" if _ADAPTER_FILE.fullmatch(path) else None
    stored = (file.object_key for file in model.base.files if file.path == path)
    return next(stored, None) or None
