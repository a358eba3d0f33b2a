"""The receipt of a job that has succeeded, and the job that repeats it. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

from lathe.jobs import messages, model
from lathe.jobs.model import Attempt, DatasetRef, Job, TokenObject

# Rises when a member changes its meaning; a new member alone does not.
SCHEMA_VERSION = 1


def document(job: Job, attempt: Attempt) -> str:
    """The receipt as JSON; docs/api.md says what each member is. attempt: the one that succeeded.

    The same from the moment the training is complete: what the result file says, GetJobReceipt says for good.
    """
    # An engine of version 0.1 says nothing of how it computed.
    engine = attempt.receipt
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "job": job.id,
        "model": job.model,
        "base_model": {"id": job.base.id, "digest": job.base.digest},
        "parent": _parent(job),
        "training_file": _file(job.training, job.training_tokens),
        "validation_file": _file(job.validation, job.validation_tokens)
        if job.validation is not None
        else None,
        "audit_key": job.audit_key,
        "seed": job.seed,
        "hyperparameters": asdict(job.hyperparameters) if job.hyperparameters is not None else None,
        "slice_plan": asdict(job.slice_plan) if job.slice_plan is not None else None,
        "workers": job.compute.workers,
        "steps": job.step,
        "trained_tokens": job.trained_tokens,
        "attempts": {
            "count": job.attempt_count,
            "lost_leases": job.lost_lease_count,
            "retries": job.retry_count,
            "succeeded": attempt.id,
        },
        "engine": {
            "code_version": attempt.code_version,
            "versions": _sorted(engine.versions) if engine is not None else None,
            "flags": _sorted(engine.flags) if engine is not None else None,
            "halvings": [_halving(step, times) for step, times in engine.halvings]
            if engine is not None
            else None,
            "fused": engine.fused if engine is not None else None,
        },
        "adapter": {
            "model": model.tuned_model_id(job),
            "manifest_sha256": attempt.final_adapter.manifest_sha256 if attempt.final_adapter else "",
            "weights_sha256": engine.weights_sha256 if engine is not None else None,
        },
        "rerun_of": job.rerun_of or None,
        "comparison": asdict(job.comparison) if job.comparison is not None else None,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _parent(job: Job) -> dict[str, str] | None:
    if job.initial_adapter is None:
        return None
    return {"model": job.parent, "manifest_sha256": job.initial_adapter.manifest_sha256}


def _file(dataset: DatasetRef, tokens: TokenObject | None) -> dict[str, str]:
    return {"id": dataset.id, "sha256": dataset.sha256, "tokens_sha256": tokens.sha256 if tokens else ""}


def _halving(step: int, times: int) -> dict[str, int]:
    """The contract's steps from 0 down are those from which validations were halved (worker.proto)."""
    return {"step": step, "times": times} if step > 0 else {"validations_from_step": 1 - step, "times": times}


def _sorted(values: Mapping[str, str]) -> dict[str, str]:
    return dict(sorted(values.items()))


def rerun(first: Job, attempt: Attempt, job_id: str, now: datetime) -> Job:
    """The job that repeats `first`, which `attempt` ended: everything that decides its numbers is what it was."""
    return Job(
        id=job_id,
        project=first.project,
        model=first.model,
        base=first.base,
        training=first.training,
        validation=first.validation,
        seed=first.seed,
        create_time=now,
        spec=first.spec,
        hyperparameters=first.hyperparameters,
        compute=replace(first.compute, dedicated=True),
        suffix=first.suffix,
        metadata=first.metadata,
        parent_model=first.parent_model,
        initial_adapter=first.initial_adapter,
        slice_plan=first.slice_plan,
        training_tokens=first.training_tokens,
        validation_tokens=first.validation_tokens,
        rerun_of=first.id,
        halvings=attempt.receipt.halvings if attempt.receipt is not None else (),
        compare_with=attempt.final_adapter,
        state_reason=messages.VALIDATING,
    )
