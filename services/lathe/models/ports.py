"""What models needs from outside, beside the object store."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from enum import Enum
from typing import Protocol

from lathe.models.model import Adapter, BaseModel, Facts


class Finish(Enum):
    """How an import ended: READY; DUPLICATE, another READY model has the digest; GONE, deleted meanwhile."""

    READY = "ready"
    DUPLICATE = "duplicate"
    GONE = "gone"


class ModelStore(Protocol):
    """The base models and adapters that are kept. What is being deleted is never returned by a getter."""

    async def add_base_model(self, model: BaseModel, request_key: str) -> bool:
        """Keep a new model and its files; False if its id or a non-empty request_key is taken."""
        ...

    async def get_base_model(self, base_model_id: str) -> BaseModel | None: ...

    async def find_by_request(self, request_key: str) -> BaseModel | None: ...

    async def find_ready(self, digest: str) -> BaseModel | None: ...

    async def list_base_models(self, *, after: str, limit: int) -> Sequence[BaseModel]:
        """By id, the ones after `after`."""
        ...

    async def set_stored(self, base_model_id: str, paths: Collection[str]) -> None:
        """Note that the bytes of these files are in the object store."""
        ...

    async def finish(self, base_model_id: str, facts: Facts) -> Finish:
        """Make an UPLOADING model READY, with what was found; a READY one stays as it is."""
        ...

    async def begin_delete_base_model(self, base_model_id: str) -> bool:
        """Mark it deleting unless an adapter is built on it; False if one is. Unknown ids are no error."""
        ...

    async def deleting_base_models(self) -> Sequence[BaseModel]: ...

    async def abandoned_uploads(self, before: datetime) -> Sequence[str]:
        """Ids of models that have been UPLOADING since before that time."""
        ...

    async def remove_base_model(self, base_model_id: str) -> None:
        """Forget a deleting model, its files and its claims."""
        ...

    async def claim(self, digest: str, owner: str) -> bool:
        """Announce that `owner`, a deleting model, is about to delete the file or manifest with this digest.

        False if another one claims it, or if a model that is not being deleted needs it.
        """
        ...

    async def claimed(self, digests: Collection[str]) -> set[str]:
        """Those of the digests that somebody is about to delete."""
        ...

    async def add_adapter(self, adapter: Adapter) -> Adapter:
        """Keep a new adapter, or answer with the one that has its model_id.

        Raises NotFound if its base model is not READY, FailedPrecondition if the model_id is being deleted.
        """
        ...

    async def get_adapter(self, project: str, adapter_id: str) -> Adapter | None: ...

    async def find_adapter(self, project: str, model_id: str) -> Adapter | None: ...

    async def list_adapters(
        self, project: str, *, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Adapter]:
        """Oldest first, the ones after (create_time, id)."""
        ...

    async def adapter_prefixes(self, below: str) -> set[str]:
        """Where the adapters whose prefix begins so have their files; without those being deleted."""
        ...

    async def begin_delete_adapter(self, project: str, adapter_id: str) -> bool:
        """Mark it deleting; False if there is none."""
        ...

    async def deleting_adapters(self) -> Sequence[Adapter]: ...

    async def remove_adapter(self, project: str, adapter_id: str) -> None: ...
