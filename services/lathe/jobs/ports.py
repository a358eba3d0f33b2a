"""What jobs needs from outside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from lathe.common.diagnosis import Finding
from lathe.jobs.figures import Speed
from lathe.jobs.model import (
    AdapterObject,
    Attempt,
    BaseRef,
    Checkpoint,
    DatasetRef,
    EngineRecord,
    Job,
    JobEvent,
    JobState,
    NewerJob,
    NewEvent,
    Pool,
    StepMetrics,
    TokenObject,
)
from lathe.jobs.training import TrainingSpec

# The reason of the error for a job that only a replica of a newer version can read.
NEWER_JOB = "NEWER_JOB"


@dataclass(frozen=True, slots=True)
class FileFinding:
    """One finding of a validation report; line 0 is about the whole file."""

    line: int
    field: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class FileWarning:
    """What trains, but hardly as it was meant: all findings of one code. lines: the first of them, 0 for the file as a
    whole. count: how many lines."""

    code: str
    count: int
    lines: tuple[int, ...]
    message: str
    advice: str


@dataclass(frozen=True, slots=True)
class User:
    """On whose behalf a call is made: the fields of the caller's principal."""

    project: str
    role: str
    key_id: str


class DatasetState(StrEnum):
    UPLOADING = "uploading"
    VALIDATING = "validating"
    READY = "ready"
    ERROR = "error"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What jobs looks at before it takes a dataset. format: that of its rows; empty while it is not known."""

    id: str
    purpose: str
    state: DatasetState
    sha256: str = ""
    findings: tuple[FileFinding, ...] = ()
    finding_count: int = 0
    format: str = ""


class AuditState(StrEnum):
    RUNNING = "running"
    READY = "ready"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Audit:
    """A dataset rendered and tokenised for one base model. findings: the first of finding_count errors.

    input_tokens: of all rows, of which trained_tokens are trained; max_row_tokens: of the longest row.
    """

    key: str
    state: AuditState
    tokens: TokenObject | None = None
    rows: int = 0
    input_tokens: int = 0
    trained_tokens: int = 0
    max_row_tokens: int = 0
    warnings: tuple[FileWarning, ...] = ()
    findings: tuple[FileFinding, ...] = ()
    finding_count: int = 0


class Datasets(Protocol):
    """The datasets service."""

    async def get(self, project: str, dataset: str, user: User) -> DatasetInfo:
        """Raises NotFound."""
        ...

    async def ensure_audit(
        self,
        project: str,
        dataset: str,
        base_model: str,
        method: str,
        *,
        held_out: bool,
        validation: str = "",
    ) -> Audit:
        """Start it or answer with what there is; safe to repeat. Raises NotFound.

        held_out: nothing is trained on it. validation: the validation file's dataset, with which it is compared.
        """
        ...

    async def keep_tokens(self, digests: Sequence[str]) -> None:
        """Unfinished jobs need these token objects, and no others."""
        ...

    async def create_result_file(
        self, project: str, display_name: str, content: bytes, request_id: str
    ) -> str:
        """Keep a small file; the dataset's id. The same request_id gives the same id."""
        ...


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model id that a client wrote.

    model_id and adapter: set for a tuned model, with the `lora` it was made with. chats: its base has a chat template.
    """

    base: BaseRef
    tunable: bool
    not_tunable_reason: str = ""
    methods: tuple[str, ...] = ()
    adapter: AdapterObject | None = None
    lora: TrainingSpec | None = None
    model_id: str = ""
    chats: bool = True


@dataclass(frozen=True, slots=True)
class AdapterRegistration:
    """An adapter and what it was made from."""

    project: str
    model_id: str
    base: BaseRef
    object: AdapterObject
    is_final: bool
    job: str
    attempt: str
    step: int
    dataset: DatasetRef
    audit_key: str
    hyperparameters_json: str
    seed: int
    code_version: str
    method: str
    parent_model_id: str = ""
    parent_manifest_sha256: str = ""


class Models(Protocol):
    """The models service."""

    async def resolve(self, project: str, model_id: str) -> ResolvedModel:
        """Raises NotFound."""
        ...

    async def register_adapter(self, adapter: AdapterRegistration) -> None:
        """Safe to repeat."""
        ...

    async def sweep_files(self, job: Job, kept: Sequence[str]) -> None:
        """Remove what a job that has ended left in the store, but for the folders `kept`. Safe to repeat."""
        ...


@dataclass(frozen=True, slots=True)
class Quota:
    """0 means no limit."""

    max_running_jobs: int = 0
    max_queued_jobs: int = 0


class Accounts(Protocol):
    """The accounts service."""

    async def get_quota(self, project: str) -> Quota: ...


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """The engine that a launcher is to start.

    base_model: `baseModels/<id>`. engine_class: one of the operator's. job_id: set if it is for that job alone.
    avoid: engines that were lost or died lately; where they ran may be lost too, though nobody has noticed.
    workers: processes that train together; the engine itself is the first of them.
    """

    engine_id: str
    base_model: str
    base_digest: str
    engine_class: str
    job_id: str = ""
    avoid: tuple[str, ...] = ()
    workers: int = 1


@dataclass(frozen=True, slots=True)
class LaunchedEngine:
    """A process that the launcher knows. exit_status: in words, once it has ended.

    waiting_for: one sentence while it has not started, such as that no node has a free GPU; it counts as running.
    """

    engine_id: str
    running: bool
    exit_status: str = ""
    # Ended by a signal from outside, not by itself.
    killed: bool = False
    last_log_line: str = ""
    waiting_for: str = ""


class Launcher(Protocol):
    """What starts engines. Only jobs retries; a launcher never does."""

    async def start(self, launch: EngineLaunch) -> None:
        """Start one engine process. Safe to repeat for the same id.

        Raises Unavailable if it cannot be started now, FailedPrecondition if it never can.
        """
        ...

    async def list(self) -> Sequence[LaunchedEngine]:
        """Every engine that was started and not forgotten. Raises Unavailable if that cannot be found out."""
        ...

    async def stop(self, engine_id: str) -> None:
        """End it if it runs, and forget it. Safe to repeat."""
        ...

    async def why_one_worker(self) -> str:
        """Why it starts no engine of several workers; empty if it does. Raises Unavailable if that is not known now."""
        ...

    async def check(self) -> Sequence[Finding]:
        """For `lathe doctor`: whether what it starts engines with is there. Never raises."""
        ...

    async def close(self) -> None:
        """End what would not outlive this process, and free what the launcher holds."""
        ...


class JobSession(Protocol):
    """The tables within one transaction.

    Whatever reads a job raises Unavailable (reason NEWER_JOB) for one of a newer format than this version knows.
    """

    async def add_job(self, job: Job, request_id: str, events: Sequence[NewEvent]) -> None:
        """Raises AlreadyExists if the project used the request_id before."""
        ...

    async def job_by_request(self, project: str, request_id: str) -> Job | None: ...

    async def job(self, job_id: str, *, lock: bool = False) -> Job | None:
        """lock: nobody else writes the row until the transaction ends."""
        ...

    async def job_state(self, job_id: str) -> str | None:
        """As it is written, of a job of any format."""
        ...

    async def save(self, before: Job, after: Job, events: Sequence[NewEvent] = ()) -> Job:
        """Write `after` over `before` and append events.

        Raises Aborted (reason STALE) if the row's version, state or lease token is no longer `before`'s.
        """
        ...

    async def jobs_in(self, states: Sequence[JobState]) -> Sequence[Job]:
        """Of every project, oldest first; without those of a newer format, which are for replicas that know it."""
        ...

    async def newer_jobs(self) -> Sequence[NewerJob]:
        """The unfinished jobs of a newer format, of every project. They hold places; nothing may be done to them."""
        ...

    async def list_jobs(
        self,
        project: str,
        *,
        states: Sequence[JobState] = (),
        metadata: Sequence[tuple[str, str]] = (),
        after: tuple[datetime, str] | None = None,
        limit: int,
    ) -> Sequence[Job]:
        """Newest first, without those of a newer format; `after` is the (create_time, id) of the last one seen."""
        ...

    async def count_jobs(self, project: str, states: Sequence[JobState]) -> int: ...

    async def count_by_state(self) -> dict[JobState, int]:
        """Every state that this version knows; jobs of a newer one's states are left out."""
        ...

    async def unswept(self, limit: int) -> Sequence[Job]:
        """Jobs that have ended and whose files were not swept since; the oldest first."""
        ...

    async def set_swept(self, job_id: str) -> None:
        """The job's files were swept."""
        ...

    async def lock_project(self, project: str) -> None:
        """No two transactions that lock the same project run at the same time."""
        ...

    async def add_attempt(self, attempt: Attempt) -> None: ...

    async def attempt(self, attempt_id: str) -> Attempt | None: ...

    async def attempts(self, job_id: str) -> Sequence[Attempt]:
        """Newest first."""
        ...

    async def open_attempts(self, engine_id: str | None = None) -> Sequence[Attempt]:
        """Those that hold a lease, of one engine or of all."""
        ...

    async def renew(self, attempt_id: str, lease_token: str, expire_time: datetime) -> bool:
        """Move the end of the lease; False if the attempt does not hold it any more."""
        ...

    async def end_attempt(self, ended: Attempt, *, expired_at: datetime | None = None) -> bool:
        """Record the outcome, unless there is one already.

        expired_at: only if the lease still ends at this time. False if nothing was written.
        """
        ...

    async def put_metrics(self, job_id: str, measured: Sequence[StepMetrics]) -> set[int]:
        """Insert or replace; the steps that had no row before."""
        ...

    async def metrics(self, job_id: str) -> Sequence[StepMetrics]:
        """Ascending by step."""
        ...

    async def put_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Keep it unless the job has one of that step; True if it is new."""
        ...

    async def replace_checkpoint(self, job_id: str, step: int, written: AdapterObject) -> None:
        """From now on that step's checkpoint is this object."""
        ...

    async def delete_checkpoint(self, job_id: str, step: int) -> None: ...

    async def checkpoints(
        self, job_id: str, *, before_step: int | None = None, limit: int | None = None
    ) -> Sequence[Checkpoint]:
        """Newest first."""
        ...

    async def events(
        self, job_id: str, *, before: int | None = None, after: int | None = None, limit: int
    ) -> Sequence[JobEvent]:
        """With `after`: oldest first, of a higher sequence; otherwise newest first, of a lower one than `before`."""
        ...

    async def event(self, job_id: str, event_id: str) -> JobEvent | None: ...

    async def has_note(self, job_id: str, step: int, kind: str) -> bool:
        """Whether the job has an event of that kind at that step."""
        ...

    async def has_event(self, job_id: str, event: NewEvent) -> bool:
        """Whether the job has an event of this step, kind and message."""
        ...

    async def put_speed(self, speed: Speed) -> None:
        """Insert or replace."""
        ...

    async def speed(self, attempt_id: str) -> Speed | None: ...

    async def speeds(self, limit: int) -> Sequence[Speed]:
        """Of any job, the last changed first."""
        ...

    async def put_engine(self, engine: EngineRecord) -> None:
        """Insert or replace."""
        ...

    async def engine(self, engine_id: str, *, lock: bool = False) -> EngineRecord | None: ...

    async def engines(self) -> Sequence[EngineRecord]: ...

    async def delete_engine(self, engine_id: str) -> None: ...

    async def lock_launches(self) -> None:
        """No two transactions that call this run at the same time."""
        ...

    async def put_lost_engine(self, engine_id: str, lost_time: datetime) -> None:
        """Remember an engine that was given up, so that it is not taken for a new one when it wakes."""
        ...

    async def lost_engines(self) -> dict[str, datetime]:
        """Engine id -> when it was given up."""
        ...

    async def is_lost_engine(self, engine_id: str) -> bool: ...

    async def delete_lost_engines(self, before: datetime) -> None: ...

    async def pools(self) -> Sequence[Pool]: ...

    async def save_pool(self, before: Pool | None, after: Pool) -> bool:
        """Insert (before None) or write over the same version; False if somebody else did first."""
        ...


class JobStore(Protocol):
    """The database of jobs."""

    def read(self) -> AbstractAsyncContextManager[JobSession]: ...

    def write(self) -> AbstractAsyncContextManager[JobSession]: ...

    async def clock_offset(self) -> float:
        """Seconds that the database's clock is ahead of this machine's; 0 where there is only one machine."""
        ...
