"""What jobs, attempts and engines are, and the rules about them that need nothing from outside."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.jobs.figures import JobEstimate
from lathe.jobs.training import AUTO, Hyperparameters, TrainingSpec

MAX_SEED = 2**31 - 1
# The only engine class where an operator has named none; also that of what was made before there were classes.
DEFAULT_CLASS = "default"


class JobState(StrEnum):
    """The states of the architecture; the ways between them are in transitions.py."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    PREEMPTING = "preempting"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
# States in which an attempt may hold a lease.
LEASED_STATES = frozenset(
    {JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.PREEMPTING, JobState.CANCELLING}
)


class Outcome(StrEnum):
    """How an attempt ended; LOST means that its lease ran out, or that its engine died or lost a worker."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RELEASED = "released"
    CANCELLED = "cancelled"
    RETRYABLE = "retryable"
    LOST = "lost"


class EngineState(StrEnum):
    """LAUNCHING: started, not heard of yet. READY: registered. STOPPING: told to end."""

    LAUNCHING = "launching"
    READY = "ready"
    STOPPING = "stopping"


class EventType(StrEnum):
    MESSAGE = "message"
    METRICS = "metrics"


class EventLevel(StrEnum):
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class Action(StrEnum):
    """What a heartbeat's answer tells an engine to do with one attempt."""

    CANCEL = "cancel"
    PAUSE = "pause"
    PREEMPT = "preempt"
    LEASE_LOST = "lease_lost"


@dataclass(frozen=True, slots=True)
class JobError:
    """code: such as `invalid_training_file`; param: the field of the request that it is about."""

    code: str
    message: str
    param: str = ""


@dataclass(frozen=True, slots=True)
class AdapterObject:
    """An adapter's folder in the object store, and the SHA-256 of its manifest.json."""

    prefix: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class TokenObject:
    """One Arrow object of tokens and loss masks in the object store."""

    object_key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """What makes numbers repeatable beside the seed; fixed at the job's first report."""

    train_tokens_per_slice: int
    threads: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class WeightComparison:
    """Two adapters' weights; `largest_difference` is absolute, and `tensor` has it.

    not_compared_reason: why there is nothing to say; empty when the rest says it.
    """

    bit_identical: bool = False
    largest_difference: float = 0.0
    tensor: str = ""
    not_compared_reason: str = ""


@dataclass(frozen=True, slots=True)
class EngineReceipt:
    """What only the engine knows of how an attempt was computed.

    versions: package -> version. flags: what else decides the bits. halvings: (step, how often its slices were halved
    for want of memory), as the contract counts them. fused: some slice shared its pass with another job's.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    halvings: tuple[tuple[int, int], ...] = ()
    fused: bool = False
    weights_sha256: str = ""


@dataclass(frozen=True, slots=True)
class DatasetRef:
    """A dataset of the job's project, by id, with the digest it had when the job was made."""

    id: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class BaseRef:
    """The base model under a job, as `models` described it when the job was made."""

    id: str
    digest: str
    parameter_count: int = 0
    target_modules: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"baseModels/{self.id}"


@dataclass(frozen=True, slots=True)
class ComputeSpec:
    """Where a job runs. engine_class: one of the operator's. dedicated: on an engine that serves nobody else.

    workers: processes that train it together; with more than one, dedicated is set.
    """

    engine_class: str = DEFAULT_CLASS
    dedicated: bool = False
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Engines that are alike: of one base model and class, and for one job alone if `job_id` is set."""

    base_digest: str
    engine_class: str = DEFAULT_CLASS
    job_id: str = ""

    @property
    def shared(self) -> Place:
        """The pool that such engines are counted and retried in."""
        return Place(self.base_digest, self.engine_class)


@dataclass(frozen=True, slots=True)
class EngineClasses:
    """The classes of engines that the operator has named, and the one for who asks for none."""

    known: tuple[str, ...] = (DEFAULT_CLASS,)
    default: str = DEFAULT_CLASS

    def choose(self, asked: str) -> str:
        """The class of a new job. Raises InvalidArgument, naming the field and the known classes."""
        if not asked or asked in self.known:
            return asked or self.default
        path = "job.compute.engine_class"
        text = f"{path}: there is no engine class {asked!r}; choose from {', '.join(self.known)}."
        raise InvalidArgument(text, violations=[FieldViolation(path, text)])

    def to_start(self, wanted: str) -> str:
        """The class to start an engine by: one that the operator has taken away since is the default's."""
        return wanted if wanted in self.known else self.default


ONE_CLASS = EngineClasses()


@dataclass(frozen=True, slots=True)
class NewerJob:
    """What this version reads of an unfinished job that only a newer one can read (store/rows.py, JOB_FORMAT).

    leased: an engine holds an attempt of it.
    """

    id: str
    project: str
    leased: bool

    @property
    def alone(self) -> bool:
        """It may have to be: nobody here knows."""
        return True


@dataclass(frozen=True, slots=True)
class Job:
    """One job, with everything that is decided about it."""

    id: str
    project: str
    model: str
    base: BaseRef
    training: DatasetRef
    seed: int
    create_time: datetime
    spec: TrainingSpec = AUTO
    compute: ComputeSpec = ComputeSpec()
    validation: DatasetRef | None = None
    suffix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    # The tuned model whose adapter it starts from, and that adapter; neither for a base model.
    parent_model: str = ""
    initial_adapter: AdapterObject | None = None
    # Of a rerun: the job that it repeats, what that one halved, and the adapter that the end is compared with.
    rerun_of: str = ""
    halvings: tuple[tuple[int, int], ...] = ()
    compare_with: AdapterObject | None = None
    comparison: WeightComparison | None = None
    state: JobState = JobState.VALIDATING_FILES
    state_reason: str = ""
    # Set when the files are valid; kept for good, so that a retried job does not go to the end of the line.
    queue_time: datetime | None = None
    start_time: datetime | None = None
    finish_time: datetime | None = None
    estimated_finish_time: datetime | None = None
    # Made when the files were valid, and kept: engines has the class of the job alone.
    estimate: JobEstimate | None = None
    # No attempt before this time (back-off after a retryable error).
    hold_until: datetime | None = None
    # Since when it is its turn, though no engine was empty enough for it; nobody passes it from then on.
    turn_time: datetime | None = None
    # None until the files are valid; again in a queued job that a replica of version 0.1 resolved during an upgrade.
    hyperparameters: Hyperparameters | None = None
    training_tokens: TokenObject | None = None
    validation_tokens: TokenObject | None = None
    audit_key: str = ""
    slice_plan: SlicePlan | None = None
    fine_tuned_model: str = ""
    trained_tokens: int = 0
    result_files: tuple[str, ...] = ()
    error: JobError | None = None
    attempt_count: int = 0
    lost_lease_count: int = 0
    retry_count: int = 0
    step: int = 0
    total_steps: int = 0
    # The attempt that holds the lease, and its fencing token; both empty when none does.
    attempt_id: str = ""
    lease_token: str = ""
    # The attempt that succeeded, from its report on; what is left is to register what it made.
    final_attempt_id: str = ""
    event_sequence: int = 0
    version: int = 1

    @property
    def name(self) -> str:
        return f"projects/{self.project}/jobs/{self.id}"

    @property
    def etag(self) -> str:
        return hashlib.sha256(f"{self.id}:{self.version}".encode()).hexdigest()[:16]

    @property
    def output_prefix(self) -> str:
        return f"jobs/{self.id}/"

    @property
    def parent(self) -> str:
        """The tuned model it goes on from, or empty. Version 0.1 kept it only as the model that was asked for."""
        return (self.parent_model or self.model) if self.initial_adapter is not None else ""

    @property
    def place(self) -> Place:
        """Which engines may run it."""
        return Place(self.base.digest, self.compute.engine_class, self.id if self.compute.dedicated else "")

    @property
    def alone(self) -> bool:
        """Whether its engine trains nothing else meanwhile: a rerun, whose bits are compared, and a job that trains a
        whole copy of the base, whose memory is measured when it begins."""
        return bool(self.rerun_of) or (
            self.hyperparameters is not None and self.hyperparameters.full_parameter
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at running a job. It holds the lease as long as `outcome` is None."""

    id: str
    job_id: str
    number: int
    engine_id: str
    lease_token: str
    lease_expire_time: datetime
    create_time: datetime
    end_time: datetime | None = None
    outcome: Outcome | None = None
    final_adapter: AdapterObject | None = None
    trained_tokens: int = 0
    error: JobError | None = None
    step: int = 0
    code_version: str = ""
    receipt: EngineReceipt | None = None

    @property
    def prefix(self) -> str:
        """Everything the attempt may write goes under it."""
        return f"jobs/{self.job_id}/{self.id}/"


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One engine process. `launched`: our launcher started it, and can say whether it lives.

    job_id: set for an engine that is for this job alone. waiting_for: what keeps it from starting, in words of the
    launcher, which last said so at waiting_time (written every half a minute).
    """

    id: str
    base: BaseRef
    state: EngineState
    create_time: datetime
    launched: bool = False
    address: str = ""
    max_attempts: int = 0
    max_sequences: int = 0
    device: str = ""
    threads: int = 0
    code_version: str = ""
    heartbeat_time: datetime | None = None
    active_sequences: int = 0
    memory_bytes: int = 0
    draining: bool = False
    # When it last trained or sampled.
    busy_time: datetime | None = None
    stop_time: datetime | None = None
    engine_class: str = DEFAULT_CLASS
    job_id: str = ""
    waiting_for: str = ""
    waiting_time: datetime | None = None

    @property
    def place(self) -> Place:
        """Which jobs it may run."""
        return Place(self.base.digest, self.engine_class, self.job_id)


@dataclass(frozen=True, slots=True)
class Pool:
    """All engines of one base model and class: who asked for them and how starting them went."""

    base: BaseRef
    engine_class: str = DEFAULT_CLASS
    demand_time: datetime | None = None
    start_failures: int = 0
    next_launch_time: datetime | None = None
    last_error: str = ""
    version: int = 1

    @property
    def place(self) -> Place:
        return Place(self.base.digest, self.engine_class)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Of one optimizer step; losses are per trained token, accuracies shares of trained tokens."""

    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float = 0.0
    tokens_per_second: float = 0.0
    trained_tokens: int = 0
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    step_seconds: float = 0.0
    grad_norm: float = 0.0
    epoch: int = 0
    # What the method measures besides, by TRL's names, such as rewards/margins.
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What a user is told. metrics: of the step that a METRICS event is about.

    kind: of a sentence of the engine, such as generation; data: its parts.
    """

    id: str
    job_id: str
    sequence: int
    create_time: datetime
    message: str
    type: EventType = EventType.MESSAGE
    level: EventLevel = EventLevel.INFO
    step: int = 0
    metrics: StepMetrics | None = None
    kind: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that has no id and place yet."""

    message: str
    type: EventType = EventType.MESSAGE
    level: EventLevel = EventLevel.INFO
    step: int = 0
    kind: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter as it was after `step`."""

    id: str
    job_id: str
    step: int
    create_time: datetime
    object: AdapterObject
    metrics: StepMetrics | None = None


def choose_seed(job_id: str) -> int:
    """The seed of a job that gave none: a pure function of its id, 0 to 2147483647."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4], "big") & MAX_SEED


def tuned_model_id(job: Job) -> str:
    """`ft:<base>:<project>:<suffix>:<id>`; the id is the end of the job's own, 12 characters (71 bits)."""
    return f"ft:{job.base.id}:{job.project}:{job.suffix}:{job.id[-12:]}"


def checkpoint_model_id(job: Job, step: int) -> str:
    """The id under which a checkpoint's adapter answers."""
    return f"{tuned_model_id(job)}:ckpt-step-{step}"
