"""What goes in the background: the files of what was deleted, and uploads that nobody finished."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta

from lathe.common.clock import Clock
from lathe.common.names import IMPORT_STAGING, import_staging
from lathe.common.objectstore.base import ObjectStore
from lathe.models.model import BaseModel, BaseModelState, file_key, manifest_key
from lathe.models.ports import ModelStore

log = logging.getLogger(__name__)

ABANDONED_AFTER = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Cleaner:
    """Each step can be repeated: a process that dies anywhere leaves a row that says what is still to do."""

    store: ModelStore
    objects: ObjectStore
    clock: Clock

    async def sweep(self) -> None:
        """Delete all there is to delete now. Raises Unavailable if the database or the store is away."""
        for base_model_id in await self.store.abandoned_uploads(self.clock.now() - ABANDONED_AFTER):
            log.info("The import of baseModels/%s was not finished within a day; it goes.", base_model_id)
            await self.store.begin_delete_base_model(base_model_id)
        for model in await self.store.deleting_base_models():
            await self._remove(model)
        for adapter in await self.store.deleting_adapters():
            await self.objects.delete_prefix(adapter.object.prefix + "/")
            await self.store.remove_adapter(adapter.project, adapter.id)
        await self._sweep_staging()

    async def _sweep_staging(self) -> None:
        """What a stream stored when its import was over already: nothing else would ever look there."""
        before = self.clock.now() - ABANDONED_AFTER
        late = {
            info.key.split("/")[1].removeprefix("import-")
            async for info in self.objects.list(IMPORT_STAGING)
            if info.modified < before
        }
        for base_model_id in sorted(late):
            model = await self.store.get_base_model(base_model_id)
            if model is None or model.state is not BaseModelState.UPLOADING:
                await self.objects.delete_prefix(import_staging(base_model_id))

    async def _remove(self, model: BaseModel) -> None:
        await self.objects.delete_prefix(import_staging(model.id))
        # The claim is committed before anyone looks whether another model lists the file, and a new model's row
        # before it looks for claims: whichever comes second sees the other.
        keys = {model.digest: manifest_key(model.digest)}
        keys |= {file.sha256: file_key(file.sha256) for file in model.files}
        for digest, key in keys.items():
            if await self.store.claim(digest, model.id):
                await self.objects.delete(key)
        await self.store.remove_base_model(model.id)
