"""What jobs, attempts and engines are, and the rules about them that need nothing from outside."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from lathe.common.errors import FieldViolation, InvalidArgument

MAX_SEED = 2**31 - 1
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
# OpenAI keeps the checkpoints of the last three epochs.
KEPT_CHECKPOINTS = 3
# The only engine class where an operator has named none; also that of what was made before there were classes.
DEFAULT_CLASS = "default"

_SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HYPERPARAMETERS = "job.method.supervised.hyperparameters"
_LORA = "job.method.supervised.lora"


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
    """How an attempt ended; LOST means that its lease ran out or its engine died."""

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
class SupervisedSpec:
    """The hyperparameters as asked for; None means auto."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    lora_r: int | None = None
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What auto became. learning_rate is the peak, already multiplied."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    lora_r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


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
    """Where a job runs. engine_class: one of the operator's. dedicated: on an engine that serves nobody else."""

    engine_class: str = DEFAULT_CLASS
    dedicated: bool = False


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
class Job:
    """One job, with everything that is decided about it."""

    id: str
    project: str
    model: str
    base: BaseRef
    training: DatasetRef
    seed: int
    create_time: datetime
    spec: SupervisedSpec = SupervisedSpec()
    compute: ComputeSpec = ComputeSpec()
    validation: DatasetRef | None = None
    suffix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    initial_adapter: AdapterObject | None = None
    state: JobState = JobState.VALIDATING_FILES
    state_reason: str = ""
    # Set when the files are valid; kept for good, so that a retried job does not go to the end of the line.
    queue_time: datetime | None = None
    start_time: datetime | None = None
    finish_time: datetime | None = None
    estimated_finish_time: datetime | None = None
    # No attempt before this time (back-off after a retryable error).
    hold_until: datetime | None = None
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
    def place(self) -> Place:
        """Which engines may run it."""
        return Place(self.base.digest, self.compute.engine_class, self.id if self.compute.dedicated else "")


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


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What a user is told. metrics: of the step that a METRICS event is about."""

    id: str
    job_id: str
    sequence: int
    create_time: datetime
    message: str
    type: EventType = EventType.MESSAGE
    level: EventLevel = EventLevel.INFO
    step: int = 0
    metrics: StepMetrics | None = None


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that has no id and place yet."""

    message: str
    type: EventType = EventType.MESSAGE
    level: EventLevel = EventLevel.INFO
    step: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter as it was after `step`."""

    id: str
    job_id: str
    step: int
    create_time: datetime
    object: AdapterObject
    metrics: StepMetrics | None = None


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A CreateJob, before anything was looked up. Datasets are ids of the same project."""

    project: str
    model: str
    training: str
    validation: str = ""
    suffix: str = ""
    seed: int | None = None
    spec: SupervisedSpec = SupervisedSpec()
    # An empty class is the operator's default.
    compute: ComputeSpec = ComputeSpec("")
    metadata: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""


def check_request(request: JobRequest) -> None:
    """Raise InvalidArgument with one violation per wrong field of a CreateJob."""
    wrong = [*_basic_violations(request), *_metadata_violations(request.metadata)]
    wrong += _spec_violations(request.spec)
    if wrong:
        message = " ".join(violation.description for violation in wrong)
        raise InvalidArgument(message, violations=wrong)


def _basic_violations(request: JobRequest) -> list[FieldViolation]:
    wrong = []
    if not request.model:
        wrong.append(FieldViolation("job.model", "job.model is required: name a base or tuned model."))
    if not request.training:
        wrong.append(FieldViolation("job.training_dataset", "job.training_dataset is required."))
    if request.suffix and not _SUFFIX.fullmatch(request.suffix):
        wrong.append(
            FieldViolation(
                "job.suffix", "job.suffix must be 1 to 64 letters, digits, hyphens or underscores."
            )
        )
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        wrong.append(FieldViolation("job.seed", f"job.seed is {request.seed}; it must be 0 to {MAX_SEED}."))
    if len(request.request_id) > 128:
        wrong.append(FieldViolation("request_id", "request_id must have at most 128 characters."))
    return wrong


def _metadata_violations(metadata: Mapping[str, str]) -> list[FieldViolation]:
    if len(metadata) > MAX_METADATA_PAIRS:
        text = f"job.metadata has {len(metadata)} pairs; at most {MAX_METADATA_PAIRS} are allowed."
        return [FieldViolation("job.metadata", text)]
    wrong = []
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY:
            text = f"job.metadata: a key must have 1 to {MAX_METADATA_KEY} characters, {key[:80]!r} has {len(key)}."
            wrong.append(FieldViolation("job.metadata", text))
        elif len(value) > MAX_METADATA_VALUE:
            text = (
                f"job.metadata[{key}] has {len(value)} characters; at most {MAX_METADATA_VALUE} are allowed."
            )
            wrong.append(FieldViolation(f"job.metadata[{key}]", text))
    return wrong


def _spec_violations(spec: SupervisedSpec) -> list[FieldViolation]:
    rules: tuple[tuple[str, float | None, float, float, str], ...] = (
        (f"{_HYPERPARAMETERS}.n_epochs", spec.n_epochs, 1, 50, "1 to 50"),
        (f"{_HYPERPARAMETERS}.batch_size", spec.batch_size, 1, 256, "1 to 256"),
        (
            f"{_HYPERPARAMETERS}.learning_rate_multiplier",
            spec.learning_rate_multiplier,
            math.ulp(0.0),
            1000,
            "above 0 and at most 1000",
        ),
        (f"{_LORA}.r", spec.lora_r, 1, 256, "1 to 256"),
        (f"{_LORA}.lora_alpha", spec.lora_alpha, math.ulp(0.0), 4096, "above 0 and at most 4096"),
    )
    wrong = []
    for path, value, low, high, words in rules:
        # Written so that NaN is refused too.
        if value is not None and not low <= value <= high:
            wrong.append(FieldViolation(path, f"{path} is {value}; it must be {words}."))
    return wrong


def check_target_modules(spec: SupervisedSpec, base: BaseRef) -> None:
    """Raise InvalidArgument if LoRA was asked for on modules that the base model does not list."""
    unknown = [module for module in spec.target_modules if module not in base.target_modules]
    if unknown:
        path = f"{_LORA}.target_modules"
        text = f"{path}: {base.id} has no module {', '.join(unknown)}; choose from {', '.join(base.target_modules)}."
        raise InvalidArgument(text, violations=[FieldViolation(path, text)])


def choose_seed(job_id: str) -> int:
    """The seed of a job that gave none: a pure function of its id, 0 to 2147483647."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4], "big") & MAX_SEED


def tuned_model_id(job: Job) -> str:
    """`ft:<base>:<project>:<suffix>:<id>`; the id is the end of the job's own, 12 characters (71 bits)."""
    return f"ft:{job.base.id}:{job.project}:{job.suffix}:{job.id[-12:]}"


def checkpoint_model_id(job: Job, step: int) -> str:
    """The id under which a checkpoint's adapter answers."""
    return f"{tuned_model_id(job)}:ckpt-step-{step}"
