"""The use cases of models."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from lathe.common.background import Wakeup
from lathe.common.clock import Clock
from lathe.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from lathe.common.ids import IdFactory
from lathe.common.names import import_staging
from lathe.common.objectstore.base import ObjectStore
from lathe.models import model as rules
from lathe.models.inspection import inspect
from lathe.models.model import Adapter, AdapterObject, BaseModel, BaseModelState, Lineage, ModelFile
from lathe.models.ports import Finish, ModelStore

log = logging.getLogger(__name__)

# What a tuned model is made of: PEFT's two files, or a whole model's after a full-parameter training.
TUNED_FILES = (
    ("adapter_config.json", "adapter_model.safetensors"),
    ("config.json", "model.safetensors"),
)


@dataclass(frozen=True, slots=True)
class NewBaseModel:
    """What an operator says of a model to import."""

    id: str
    display_name: str
    files: tuple[ModelFile, ...]
    license: str = ""
    training_cutoff: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a model id means: a base model, and the adapter on it for a tuned one."""

    base_model: BaseModel
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class ModelsService:
    """Imports, what is registered, and what a model id means. `cleanup` is set when there is something to delete."""

    store: ModelStore
    objects: ObjectStore
    clock: Clock
    ids: IdFactory
    cleanup: Wakeup = field(default_factory=Wakeup)

    # --- base models ------------------------------------------------------------------------------------------

    async def create_base_model(self, new: NewBaseModel, request_key: str) -> BaseModel:
        """Start an import; files that are stored already need no upload (`stored`).

        A READY model of the same digest answers instead, whatever its id, and so does the first answer to
        request_key. Raises InvalidArgument, and AlreadyExists if the id stands for another digest.
        """
        rules.check_base_model_id(new.id)
        rules.check_files(new.files)
        texts = {f"base_model.{key}": getattr(new, key) for key in ("display_name", "license", "source")}
        rules.check_texts({**texts, "base_model.training_cutoff": new.training_cutoff})
        earlier = await self.store.find_by_request(request_key) if request_key else None
        if earlier is not None:
            return earlier
        digest = rules.folder_digest(new.files)
        ready = await self.store.find_ready(digest)
        if ready is not None:
            return ready
        model = BaseModel(
            id=new.id,
            display_name=new.display_name or new.id,
            state=BaseModelState.UPLOADING,
            digest=digest,
            files=tuple(
                sorted((replace(file, stored=False) for file in new.files), key=lambda file: file.path)
            ),
            license=new.license,
            training_cutoff=new.training_cutoff,
            source=new.source,
            create_time=self.clock.now(),
        )
        if not await self.store.add_base_model(model, request_key):
            model = await self._standing(new.id, request_key, digest)
        if model.state is BaseModelState.READY:
            return model
        return await self._with_stored_files(model)

    async def _standing(self, base_model_id: str, request_key: str, digest: str) -> BaseModel:
        """The model that kept a new one from being added, if the caller may go on with it."""
        earlier = await self.store.find_by_request(request_key) if request_key else None
        if earlier is not None:
            return earlier
        standing = await self.store.get_base_model(base_model_id)
        if standing is None:
            raise Unavailable(
                f"baseModels/{base_model_id} is being deleted. Try again in a moment.", retry_after=2
            )
        if standing.digest != digest:
            raise AlreadyExists(
                f"{standing.name} stands for a model of digest {standing.digest} ({standing.state}), "
                f"and this folder's is {digest}. Choose another id, or delete that model first.",
                metadata={"digest": standing.digest, "given_digest": digest},
            )
        return standing

    async def _with_stored_files(self, model: BaseModel) -> BaseModel:
        missing = [file for file in model.files if not file.stored]
        claimed = await self.store.claimed({file.sha256 for file in missing})
        found = {file.path for file in missing if file.sha256 not in claimed and await self._is_stored(file)}
        if found:
            await self.store.set_stored(model.id, found)
        files = tuple(replace(file, stored=file.stored or file.path in found) for file in model.files)
        return replace(model, files=files)

    async def _is_stored(self, file: ModelFile) -> bool:
        info = await self.objects.head(file.object_key)
        return info is not None and info.size == file.size_bytes

    async def commit_file(
        self, base_model_id: str, path: str, staging_key: str, size_bytes: int, sha256: str
    ) -> ModelFile:
        """Take one uploaded file over from staging; the caller vouches for the digest. Repeating it is no error.

        Raises NotFound for an unknown model or path, InvalidArgument if the bytes are not those announced.
        """
        model = await self.get_base_model(base_model_id)
        file = model.file(path)
        if file is None:
            raise NotFound(f"{model.name} has no file {path!r}.")
        if (size_bytes, sha256) != (file.size_bytes, file.sha256):
            await self.objects.delete(staging_key)
            raise InvalidArgument(
                f"{path} was announced with {file.size_bytes} bytes and sha256 {file.sha256}; "
                f"{size_bytes} bytes with sha256 {sha256} came. Send the file again.",
                reason="DIGEST_MISMATCH",
            )
        if await self.store.claimed({sha256}):
            raise Unavailable(
                f"An earlier copy of {path} is being deleted. Try again in a moment.", retry_after=2
            )
        if not await self._is_stored(file):
            await self._take_over(file, staging_key)
        await self.store.set_stored(model.id, {path})
        await self.objects.delete(staging_key)
        return replace(file, stored=True)

    async def _take_over(self, file: ModelFile, staging_key: str) -> None:
        staged = await self.objects.head(staging_key)
        if staged is None or staged.size != file.size_bytes:
            raise FailedPrecondition(f"The upload of {file.path} is not there any more. Send the file again.")
        await self.objects.copy(staging_key, file.object_key)

    async def commit_base_model(self, base_model_id: str) -> BaseModel:
        """Check the uploaded folder and make it usable. A READY model answers as it is.

        If another id became READY with the same digest meanwhile, that model answers and this one goes.
        Raises FailedPrecondition while files are missing, InvalidArgument for a folder that cannot be used.
        """
        model = await self.get_base_model(base_model_id)
        if model.state is BaseModelState.READY:
            return model
        if await self.store.claimed({model.digest, *(file.sha256 for file in model.files)}):
            raise Unavailable("Files of this model are being deleted. Try again in a moment.", retry_after=2)
        missing = [file.path for file in model.files if not await self._is_stored(file)]
        if missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise FailedPrecondition(
                f"{len(missing)} of {len(model.files)} files of {model.name} are not uploaded yet: {shown}.",
                reason="FILES_MISSING",
            )
        facts = await inspect(model, self.objects)
        await self.objects.put(rules.manifest_key(model.digest), rules.manifest(model))
        # All files are taken over: what a broken upload left there would stay for as long as the model.
        await self.objects.delete_prefix(import_staging(model.id))
        outcome = await self.store.finish(model.id, facts)
        if outcome is Finish.DUPLICATE:
            twin = await self.store.find_ready(model.digest)
            await self.store.begin_delete_base_model(model.id)
            self.cleanup.set()
            if twin is not None:
                return twin
        return await self.get_base_model(base_model_id)

    async def get_base_model(self, base_model_id: str) -> BaseModel:
        """Raises NotFound."""
        model = await self.store.get_base_model(base_model_id)
        if model is None:
            raise NotFound(f"baseModels/{base_model_id} was not found.")
        return model

    async def list_base_models(self, *, after: str, limit: int) -> Sequence[BaseModel]:
        """By id, the ones after `after`; those still uploading too."""
        return await self.store.list_base_models(after=after, limit=limit)

    async def delete_base_model(self, base_model_id: str) -> None:
        """Raises NotFound, and FailedPrecondition while an adapter is built on it."""
        model = await self.get_base_model(base_model_id)
        if not await self.store.begin_delete_base_model(model.id):
            raise FailedPrecondition(
                f"Adapters are built on {model.name}. Delete the tuned models first.",
                reason="BASE_MODEL_IN_USE",
            )
        self.cleanup.set()

    # --- adapters ---------------------------------------------------------------------------------------------

    async def resolve(self, project: str, model_id: str) -> Resolved:
        """What `model_id` means in a project: `<base>`, `baseModels/<base>` or a tuned model's id.

        Raises NotFound, in the same words for what does not exist, is not usable yet, or is another project's.
        """
        unknown = NotFound(
            f"The model {model_id!r} was not found; `lathe models list`, or GET /v1/models, shows those there are.",
            reason="MODEL_NOT_FOUND",
        )
        tuned = rules.parse_tuned_id(model_id)
        if tuned is None:
            base = await self.store.get_base_model(model_id.removeprefix("baseModels/"))
            if base is None or base.state is not BaseModelState.READY:
                raise unknown
            return Resolved(base)
        adapter = await self.store.find_adapter(project, model_id)
        base = await self.store.get_base_model(adapter.base_model) if adapter is not None else None
        if adapter is None or base is None or base.state is not BaseModelState.READY:
            raise unknown
        return Resolved(base, adapter)

    async def register_adapter(
        self,
        project: str,
        model_id: str,
        base_model_id: str,
        files: AdapterObject,
        lineage: Lineage,
        *,
        is_final: bool,
    ) -> Adapter:
        """Register what a job produced; the same model_id again answers with what is registered.

        Raises InvalidArgument, NotFound for an unknown base model, FailedPrecondition unless the files are there
        and the manifest has its digest.
        """
        earlier = await self.store.find_adapter(project, model_id)
        if earlier is not None:
            return earlier
        adapter = Adapter(
            project=project,
            id=self.ids.new("adp"),
            model_id=model_id,
            base_model=base_model_id,
            object=AdapterObject(files.prefix.rstrip("/"), files.manifest_sha256),
            lineage=lineage,
            create_time=self.clock.now(),
            is_final=is_final,
        )
        rules.check_adapter(adapter)
        await self._check_objects(adapter.object)
        return await self.store.add_adapter(adapter)

    async def _check_objects(self, files: AdapterObject) -> None:
        try:
            manifest = await self.objects.get(f"{files.prefix}/manifest.json")
        except NotFound as error:
            raise FailedPrecondition(
                f"There is no manifest under {files.prefix}: the adapter is not complete.",
                reason="ADAPTER_INCOMPLETE",
            ) from error
        if hashlib.sha256(manifest).hexdigest() != files.manifest_sha256:
            raise FailedPrecondition(
                f"The manifest under {files.prefix} has another digest than the one given.",
                reason="DIGEST_MISMATCH",
            )
        try:
            json.loads(manifest)
        except ValueError as error:
            raise FailedPrecondition(f"The manifest under {files.prefix} is not JSON.") from error
        missing = []
        for names in TUNED_FILES:
            heads = [await self.objects.head(f"{files.prefix}/{name}") for name in names]
            missing.append([name for name, head in zip(names, heads, strict=True) if head is None])
        if all(missing):
            name = min(missing, key=len)[0]
            raise FailedPrecondition(f"{files.prefix}/{name} is missing.", reason="ADAPTER_INCOMPLETE")

    async def get_adapter(self, project: str, adapter_id: str) -> Adapter:
        """Raises NotFound."""
        adapter = await self.store.get_adapter(project, adapter_id)
        if adapter is None:
            raise NotFound(f"projects/{project}/adapters/{adapter_id} was not found.")
        return adapter

    async def list_adapters(
        self, project: str, *, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Adapter]:
        """Oldest first, the ones after (create_time, id); checkpoints too."""
        return await self.store.list_adapters(project, after=after, limit=limit)

    async def delete_adapter(self, project: str, adapter_id: str) -> None:
        """It is gone at once for every caller; its files go in the background. Raises NotFound."""
        if not await self.store.begin_delete_adapter(project, adapter_id):
            raise NotFound(f"projects/{project}/adapters/{adapter_id} was not found.")
        self.cleanup.set()

    # --- jobs that have ended ---------------------------------------------------------------------------------

    async def sweep_job_files(self, job: str, kept: Collection[str]) -> None:
        """Remove what the job with this id left in the store, but for the folders `kept` and registered adapters. Call
        when nothing of it runs any more. What an error leaves there goes when it is repeated."""
        folder = rules.job_folder(job)
        stay = rules.folders_to_keep(folder, kept)
        keys = [info.key async for info in self.objects.list(folder)]
        gone = rules.not_below(keys, stay | await self.store.adapter_prefixes(folder))
        for key in gone:
            await self.objects.delete(key)
        if gone:
            log.info("Removed %d files that job %s left.", len(gone), job)
