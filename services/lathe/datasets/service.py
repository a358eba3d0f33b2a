"""The use cases of datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from lathe.common.background import Wakeup
from lathe.common.clock import Clock
from lathe.common.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from lathe.common.ids import IdFactory
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets import model as rules
from lathe.datasets.model import (
    Audit,
    AuditOptions,
    AuditState,
    AuditTask,
    Dataset,
    DatasetState,
    ImportOptions,
    Overlap,
    Report,
    blob_key,
)
from lathe.datasets.ports import BaseModels, DatasetStore
from lathe.text import VERSION
from lathe.text.findings import tally_of
from lathe.text.render import RenderOptions


@dataclass(slots=True)
class TokenUse:
    """told: when jobs last said which tokens it needs; None before it has done so to this process."""

    told: datetime | None = None


@dataclass(frozen=True, slots=True)
class DatasetsService:
    """Files in and out, and audits. The wake-ups are set when there is something to do in the background."""

    store: DatasetStore
    objects: ObjectStore
    base_models: BaseModels
    clock: Clock
    ids: IdFactory
    validation: Wakeup = field(default_factory=Wakeup)
    auditing: Wakeup = field(default_factory=Wakeup)
    cleanup: Wakeup = field(default_factory=Wakeup)
    indexing: Wakeup = field(default_factory=Wakeup)
    comparing: Wakeup = field(default_factory=Wakeup)
    preparing: Wakeup = field(default_factory=Wakeup)
    token_use: TokenUse = field(default_factory=TokenUse)

    # --- datasets ---------------------------------------------------------------------------------------------

    async def create(
        self,
        project: str,
        display_name: str,
        purpose: str,
        expire_time: datetime | None,
        request_id: str,
        *,
        import_options: ImportOptions | None = None,
        source: str = "",
        original_name: str = "",
    ) -> Dataset:
        """A new dataset, UPLOADING; the same request_id again answers with the first. import_options: how it is
        converted; None to go by its name. source: where it is imported from, and original_name what it is called there.
        Raises InvalidArgument."""
        now = self.clock.now()
        key = rules.request_key("import" if source else "create", request_id)
        earlier = await self.store.find_by_request(project, key) if key else None
        if earlier is not None:
            return earlier
        rules.check_new(display_name, purpose, expire_time, now)
        dataset = Dataset(
            project=project,
            id=self.ids.new("file"),
            display_name=display_name,
            purpose=purpose,
            state=DatasetState.UPLOADING,
            create_time=now,
            expire_time=expire_time,
            staging_key=self.new_staging_key(),
            import_options=rules.resolve_import(display_name, purpose, import_options, original_name),
            source=source,
        )
        return await self.store.add(dataset, key)

    def new_staging_key(self) -> str:
        """Where the bytes of one upload may lie until they are validated."""
        return f"staging/{self.ids.token(24)}"

    async def get(self, project: str, dataset_id: str) -> Dataset:
        """Raises NotFound."""
        dataset = await self.store.get(project, dataset_id)
        if dataset is None:
            raise NotFound(f"projects/{project}/datasets/{dataset_id} was not found.")
        return dataset

    async def page(
        self,
        project: str,
        *,
        purpose: str = "",
        after: tuple[datetime, str] | None = None,
        ascending: bool = False,
        limit: int,
    ) -> Sequence[Dataset]:
        """By creation, newest first unless `ascending`; the ones after `after` (create_time, id) in that order."""
        return await self.store.page(project, purpose=purpose, after=after, ascending=ascending, limit=limit)

    async def commit_upload(
        self, project: str, dataset_id: str, staging_key: str, size_bytes: int, sha256: str
    ) -> Dataset:
        """Take a finished upload over: VALIDATING at once. Repeating it answers with the dataset as it is.

        Raises NotFound, InvalidArgument, and FailedPrecondition if another upload was committed before.
        """
        rules.check_upload(size_bytes, sha256)
        dataset = await self.get(project, dataset_id)
        if dataset.state is DatasetState.UPLOADING:
            if not rules.same_staging(staging_key, dataset.staging_key):
                raise InvalidArgument(f"staging_key is not the one that {dataset.name} was given.")
            await self.store.begin_validation(project, dataset_id, size_bytes, sha256)
            dataset = await self.get(project, dataset_id)
            self.validation.set()
        size, digest = dataset.uploaded
        # Of what was not what it was announced as no digest is kept.
        same = digest == sha256 or (digest == "" and dataset.state is DatasetState.ERROR)
        if size != size_bytes or not same:
            raise FailedPrecondition(
                f"{dataset.name} is {dataset.state} with other bytes; a dataset never changes. Make a new one.",
                reason="DATASET_IMMUTABLE",
            )
        return dataset

    async def create_result_file(
        self, project: str, display_name: str, content: bytes, request_id: str
    ) -> Dataset:
        """Keep a small file that the platform made, READY; the same request_id again answers with the first.

        Raises InvalidArgument for a missing request_id or too much content.
        """
        if not request_id:
            raise rules.invalid(
                "request_id", "request_id is required here: jobs repeat this call after a crash."
            )
        if len(content) > rules.MAX_RESULT_BYTES:
            raise rules.invalid(
                "content", f"content has {len(content)} bytes; at most {rules.MAX_RESULT_BYTES} fit."
            )
        sha256 = hashlib.sha256(content).hexdigest()
        new = Dataset(
            project=project,
            id=self.ids.new("file"),
            display_name=display_name,
            purpose=rules.RESULTS_PURPOSE,
            state=DatasetState.VALIDATING,
            create_time=self.clock.now(),
            size_bytes=len(content),
            sha256=sha256,
        )
        # The row first: from here on nobody deletes the blob.
        dataset = await self.store.add(new, rules.request_key("result", request_id))
        if dataset.state is DatasetState.VALIDATING:
            await self.store.begin_validation(project, dataset.id, len(content), sha256)
            if await self.store.is_claimed(sha256):
                raise Unavailable(
                    "An earlier copy of this file is being deleted. Try again in a moment.", retry_after=1
                )
            await self.objects.put(blob_key(sha256), content)
            await self.store.finish_validation(project, dataset.id, DatasetState.READY, sha256, None)
        return await self.get(project, dataset.id)

    async def delete(self, project: str, dataset_id: str) -> None:
        """It is gone at once for every caller; its bytes go in the background. Raises NotFound, and FailedPrecondition
        for a frozen one."""
        if not await self.store.begin_delete(project, dataset_id):
            dataset = await self.get(project, dataset_id)
            raise FailedPrecondition(
                f"{dataset.name} is the frozen held-out set {dataset.frozen_as!r}; an admin has to thaw it first.",
                reason="FROZEN",
            )
        self.cleanup.set()

    # --- audits -----------------------------------------------------------------------------------------------

    async def ensure_audit(
        self,
        project: str,
        dataset_id: str,
        base_model: str,
        options: AuditOptions,
        *,
        held_out: bool = False,
        validation: str = "",
    ) -> Audit:
        """The audit of a dataset for a base model; it is begun if there is none. Call again while RUNNING.

        validation: the id of a validation file in the same project: what both hold is then found too. A validation
        file that cannot be audited (its own call says why) is left out.

        A dataset that is not READY answers for it: RUNNING while it is validated, ERROR with its findings. ERROR too
        where the method does not train on files of its format, and where it has rows of a frozen held-out set, unless
        it is `held_out` itself: a file on which nothing is trained.
        Raises NotFound for the dataset or the base model, FailedPrecondition, InvalidArgument, Unimplemented.
        """
        audit = await self._audit(project, dataset_id, base_model, options, held_out)
        if not validation or not audit.tokens_key:
            return audit
        other = await self._audit(project, validation, base_model, options, True)
        if other.state is AuditState.RUNNING:
            return Audit("", AuditState.RUNNING)
        if not other.tokens_key:
            return audit
        return rules.with_overlap(audit, await self._compared(audit, other))

    async def keep_tokens(self, digests: Sequence[str]) -> None:
        """Unfinished jobs need these token objects and, without a dataset of its own, no other. Raises Unavailable."""
        now = self.clock.now()
        await self.store.use_tokens(digests, now)
        self.token_use.told = now

    async def _compared(self, audit: Audit, other: Audit) -> Audit:
        """What two finished audits both hold, as an audit of its own."""
        key = rules.comparison_key(audit.key, other.key, VERSION)
        found = await self.store.get_audit(key, self.clock.now())
        if found is None:
            task = await self.store.audit_task(audit.key)
            if task is None:
                raise Unavailable("The audit was removed just now. Try again.", retry_after=1)
            now = self.clock.now()
            await self.store.add_audit(replace(task, key=key, compared=(audit.key, other.key), now=now))
            found = Audit(key, AuditState.RUNNING)
        if found.state is AuditState.RUNNING:
            self.auditing.set()
        return found

    async def _audit(
        self, project: str, dataset_id: str, base_model: str, options: AuditOptions, held_out: bool
    ) -> Audit:
        dataset = await self.get(project, dataset_id)
        _check_trainable(dataset)
        if dataset.state is DatasetState.VALIDATING:
            return Audit("", AuditState.RUNNING)
        if dataset.state is DatasetState.ERROR:
            return Audit("", AuditState.ERROR, dataset.report or Report())
        base = await self.base_models.resolve(project, base_model)
        if not base.tunable:
            raise FailedPrecondition(
                f"{base.name} cannot be tuned: {base.not_tunable_reason}", reason="NOT_TUNABLE"
            )
        resolved = rules.resolve_options(options, base)
        wrong = rules.check_format(resolved.method, dataset.report or Report())
        if wrong is not None:
            return Audit("", AuditState.ERROR, rules.report_of(0, tally_of([wrong])))
        if not held_out:
            overlaps = await self._overlaps(dataset)
            leak = rules.leaked(overlaps)
            if leak is not None:
                return Audit("", AuditState.ERROR, leak)
            if any(overlap.count is None for _, overlap in overlaps):
                self.comparing.set()
                return Audit("", AuditState.RUNNING)
        key = rules.audit_key(
            dataset.sha256,
            base.tokenizer_digest,
            base.template_digest,
            render_options(resolved).canonical(),
            VERSION,
        )
        audit = await self.store.get_audit(key, self.clock.now())
        if audit is None:
            task = AuditTask(
                key=key,
                dataset_sha256=dataset.sha256,
                base_model=base.name,
                tokenizer_digest=base.tokenizer_digest,
                template_digest=base.template_digest,
                options=resolved,
                files=base.files,
                now=self.clock.now(),
            )
            await self.store.add_audit(task)
            audit = Audit(key, AuditState.RUNNING)
        if audit.state is AuditState.RUNNING:
            self.auditing.set()
        return audit

    async def _overlaps(self, dataset: Dataset) -> list[tuple[str, Overlap]]:
        """What it shares with each frozen set of its project, by the set's name."""
        return [
            (frozen.frozen_as, await self.store.overlap(frozen.sha256, dataset.sha256))
            for frozen in await self.store.frozen(dataset.project)
        ]


def render_options(options: AuditOptions) -> RenderOptions:
    """Resolved options as lathe.text takes them."""
    return RenderOptions(
        context_limit=options.context_limit, truncation="error" if options.truncation == "error" else "end"
    )


def _check_trainable(dataset: Dataset) -> None:
    if dataset.purpose != "fine-tune":
        raise FailedPrecondition(
            f"{dataset.name} has the purpose {dataset.purpose}; training needs a file of purpose fine-tune.",
            reason="WRONG_PURPOSE",
        )
    if dataset.state is DatasetState.UPLOADING:
        raise FailedPrecondition(f"{dataset.name} has not been uploaded yet.", reason="NOT_UPLOADED")
