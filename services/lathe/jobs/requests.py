"""What a CreateJob asks for, and the rules that it must keep before anything is looked up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.jobs import training
from lathe.jobs.model import MAX_SEED, ComputeSpec
from lathe.jobs.training import AUTO, TrainingSpec

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_REQUEST_ID = 128

# An empty class is the operator's default.
DEFAULT_COMPUTE = ComputeSpec("")
_SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A CreateJob, before anything was looked up. Datasets are ids of the same project."""

    project: str
    model: str
    training: str
    validation: str = ""
    suffix: str = ""
    seed: int | None = None
    spec: TrainingSpec = AUTO
    compute: ComputeSpec = DEFAULT_COMPUTE
    metadata: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""


def check_request(request: JobRequest) -> None:
    """Raise InvalidArgument with one violation per wrong field of a CreateJob."""
    wrong = [*_basic_violations(request), *_metadata_violations(request.metadata)]
    wrong += training.violations(request.spec, has_validation=bool(request.validation))
    wrong += _compute_violations(request.compute)
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
    return [*wrong, *_request_id_violations(request.request_id)]


def _request_id_violations(request_id: str) -> list[FieldViolation]:
    if len(request_id) <= MAX_REQUEST_ID:
        return []
    return [FieldViolation("request_id", f"request_id must have at most {MAX_REQUEST_ID} characters.")]


def check_request_id(request_id: str) -> None:
    """Raise InvalidArgument if it is too long."""
    for violation in _request_id_violations(request_id):
        raise InvalidArgument(violation.description, violations=[violation])


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


def _compute_violations(compute: ComputeSpec) -> list[FieldViolation]:
    if compute.workers >= 1:
        return []
    path = "job.compute.workers"
    text = f"{path} is {compute.workers}; it must be at least 1."
    return [FieldViolation(path, text)]
