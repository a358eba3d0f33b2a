"""What the engine's shell speaks about: attempts, leases, plans, metrics, snapshots. No torch, no gRPC."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from lathe.common.errors import FailedPrecondition, InvalidArgument, LatheError, Unavailable
from lathe.engine.watch import Evaluations, LossHistory

# Where the weights of an adapter are, and those of a whole tuned model.
WEIGHTS_FILES = ("adapter_model.safetensors", "model.safetensors")
# Of the optimizer's state and dropout's seed: what an adapter that is trained on has beside its weights.
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """What fixes the order of floating-point operations of a job; chosen at its first step, then kept.

    dtype: `bfloat16` or `float32`, followed by `+nf4` for a base in 4 bits. device: `cpu` or `cuda`.
    """

    train_tokens_per_slice: int
    threads: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Where an adapter's files are: a prefix of the store (no trailing slash) and its manifest's SHA-256."""

    prefix: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class TokenRef:
    """One Arrow object of tokens and masks."""

    object_key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Supervised:
    """Maximum likelihood of the trained tokens."""


@dataclass(frozen=True, slots=True)
class Dpo:
    """Direct preference optimisation. beta: how closely the reference is kept to; loss_type: `sigmoid` or `ipo`.

    label_smoothing: the share of the preferences taken to be wrong (cDPO), with `sigmoid` only.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True)
class Orpo:
    """Odds ratio preference optimisation. beta: the weight of the odds ratio, the paper's lambda."""

    beta: float = 0.1


@dataclass(frozen=True, slots=True)
class Kto:
    """Kahneman-Tversky optimisation. beta: how closely the reference is kept to; weights: of rows of either kind."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


Method = Supervised | Dpo | Orpo | Kto


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Resolved hyperparameters. learning_rate is the peak; base_model is written into adapter_config.json.

    eval_every: steps between validations of one batch; 0: about 20 times a job. The whole validation file is gone
    through at each epoch's end. early_stopping_patience: 0 is off; else the job ends after so many evaluations in a
    row without a lower validation loss, each of them of the whole file, and its result is the best one.
    sample_prompts: how many held-out prompts are answered at each checkpoint. keep_checkpoints: how many of the
    epochs' checkpoints are kept beside the best one; 0 keeps all.
    """

    n_epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_r: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] = ()
    base_model: str = ""
    method: Method = Supervised()
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    eval_every: int = 0
    early_stopping_patience: int = 0
    keep_checkpoints: int = 0
    sample_prompts: int = 0
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    full_parameter: bool = False


@dataclass(frozen=True, slots=True)
class Attempt:
    """One lease of a job. output_prefix ends with a slash: `jobs/{job}/{attempt}/`.

    Of a rerun: halvings are those of the first time, as in Start; compare_with is the adapter that it made.
    """

    attempt_id: str
    lease_token: str
    job: str
    output_prefix: str
    training: TokenRef
    config: TrainingConfig
    validation: TokenRef | None = None
    slice_plan: SlicePlan | None = None
    earlier_prefixes: tuple[str, ...] = ()
    initial_adapter: AdapterRef | None = None
    halvings: tuple[tuple[int, int], ...] = ()
    compare_with: AdapterRef | None = None


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimizer step measured. step and epoch are 1-based.

    Losses are those of the method (supervised: the mean over trained tokens). figures: what else the method measures,
    under TRL's names; those of validation begin with `eval_`, of the whole validation file with `full_eval_`.
    """

    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    tokens_per_second: float
    trained_tokens: int
    step_seconds: float
    grad_norm: float
    epoch: int
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the job's user. kind: `out_of_memory`, `early_stopping`, `generation`,
    `checkpoint_damaged`, `sharded`, or `memory`, which `jobs` keeps for estimates; data: its parts."""

    step: int
    kind: str
    message: str
    data: Mapping[str, str] = field(default_factory=dict)


class SnapshotKind(StrEnum):
    """epoch: shown to the user; resume: only for going on after a loss; final: the job's result.

    best: stays with the attempt; the other kinds bring its files along.
    """

    EPOCH = "epoch"
    RESUME = "resume"
    FINAL = "final"
    BEST = "best"


@dataclass(frozen=True, slots=True)
class RunState:
    """What going on from a snapshot needs beside the adapter, its optimizer and the step.

    unfinished: the last step's metrics when it was not validated, or its epoch's checkpoint not written, yet. fused: a
    step shared a pass with other jobs.
    """

    losses: LossHistory = field(default_factory=LossHistory)
    evaluations: Evaluations = field(default_factory=Evaluations)
    unfinished: StepMetrics | None = None
    fused: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after `step` optimizer steps, written to a local folder by the model thread.

    halvings: step index -> how often its slices were halved for want of memory; -n: those of the validations from step
    n on, counted from 1, so that a run that is repeated cuts each validation as it was cut. trained_tokens: of all
    steps so far, those of earlier attempts included. state: what else going on needs.
    """

    kind: SnapshotKind
    step: int
    epoch: int
    total_steps: int
    trained_tokens: int
    folder: Path
    files: tuple[str, ...]
    metrics: StepMetrics | None
    halvings: Mapping[int, int] = field(default_factory=dict)
    state: RunState = field(default_factory=RunState)


class Outcome(StrEnum):
    """How an attempt ended, as jobs counts it."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RELEASED = "released"
    CANCELLED = "cancelled"
    RETRYABLE = "retryable"
    WORKER_LOST = "worker_lost"


@dataclass(frozen=True, slots=True)
class AttemptError:
    """What the user reads when an attempt failed. code as in OpenAI's job errors."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Environment:
    """What a process computes with. versions: package -> version; flags: whatever else decides the bits."""

    versions: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WeightComparison:
    """How a rerun's adapter differs from the first one's; tensor: the one with the largest absolute difference.

    not_compared_reason: why there is nothing to say; the rest is unset then.
    """

    bit_identical: bool
    largest_difference: float = 0.0
    tensor: str = ""
    not_compared_reason: str = ""


@dataclass(frozen=True, slots=True)
class EngineReceipt:
    """What only the engine knows of how a job's adapter was computed.

    halvings: as in Snapshot, those of earlier attempts included. fused: a slice shared its pass with
    another job's, so that the bits need not come again. weights_sha256: of the file with the final weights.
    """

    environment: Environment
    halvings: tuple[tuple[int, int], ...] = ()
    fused: bool = False
    weights_sha256: str = ""
    comparison: WeightComparison | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt runs no more on this engine."""

    outcome: Outcome
    step: int
    trained_tokens: int = 0
    error: AttemptError | None = None


AttemptEvent = StepMetrics | Snapshot | Note | Ended


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint whose manifest is in the store."""

    step: int
    ref: AdapterRef
    metrics: StepMetrics | None


class Action(StrEnum):
    """What jobs asks for in a heartbeat's answer."""

    CANCEL = "cancel"
    PAUSE = "pause"
    PREEMPT = "preempt"
    LEASE_LOST = "lease_lost"


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease that the engine holds."""

    attempt_id: str
    lease_token: str


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """directives: (attempt id, action)."""

    directives: tuple[tuple[str, Action], ...] = ()
    reregister: bool = False
    shut_down: bool = False


@dataclass(frozen=True, slots=True)
class Registration:
    """What an engine says of itself."""

    engine_id: str
    base_model: str
    base_digest: str
    address: str
    max_attempts: int
    max_sequences: int
    device: str
    threads: int
    code_version: str
    engine_class: str = ""
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """What jobs asks of an engine, in seconds."""

    heartbeat_interval: float
    lease_term: float


@dataclass(frozen=True, slots=True)
class Progress:
    """One report. slice_plan and total_steps go with the first one.

    dropped_checkpoints: steps of those that keep_checkpoints gives up; their files go once jobs has heard of it.
    """

    metrics: tuple[StepMetrics, ...] = ()
    checkpoints: tuple[CheckpointReport, ...] = ()
    slice_plan: SlicePlan | None = None
    total_steps: int = 0
    notes: tuple[Note, ...] = ()
    dropped_checkpoints: tuple[int, ...] = ()


class RankLost(Unavailable):
    """A worker that trains a job with others is gone or fell out of step: this step cannot be finished, what was done
    before it is whole."""


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room: that passes, and is no fault of a job."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def outcome_of(error: BaseException) -> tuple[Outcome, AttemptError]:
    """How an attempt that raised `error` ended: what the input causes fails the job, all else is tried again."""
    if isinstance(error, (InvalidArgument, FailedPrecondition)):
        return Outcome.FAILED, AttemptError(error.reason.lower(), error.message)
    if isinstance(error, LatheError):
        outcome = Outcome.WORKER_LOST if isinstance(error, RankLost) else Outcome.RETRYABLE
        return outcome, AttemptError("server_error", error.message)
    return Outcome.RETRYABLE, AttemptError("server_error", f"{type(error).__name__}: {error}"[:500])
