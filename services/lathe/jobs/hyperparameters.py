"""The published rules for hyperparameters that a user leaves at auto; docs/hyperparameters.md has their sources."""

from __future__ import annotations

import math
from typing import TypeVar

from lathe.jobs.model import BaseRef
from lathe.jobs.training import KEPT_CHECKPOINTS, Hyperparameters, Method, TrainingSpec

T = TypeVar("T")

DEFAULT_LORA_R = 16
# What an adapter is multiplied by; the learning rates below are for this scale.
LORA_SCALE = 2.0
DEFAULT_BETA = 0.1
WARMUP_FRACTION = 0.1
VALIDATIONS_PER_JOB = 20
# The peak learning rate beside that of supervised training of the same weights.
_METHOD_FACTOR = {Method.SUPERVISED: 1.0, Method.ORPO: 1 / 4, Method.DPO: 1 / 40, Method.KTO: 1 / 40}
_FULL_FACTOR = 1 / 10


def auto_n_epochs(examples: int) -> int:
    """OpenAI's published rule (its fine-tuning cookbook): 3, but at least 100 and at most 25000 examples seen.

    The lower bound stops at 25 epochs.
    """
    if 3 * examples < 100:
        return max(1, min(25, 100 // max(1, examples)))
    if 3 * examples > 25_000:
        return max(1, 25_000 // examples)
    return 3


def auto_batch_size(examples: int) -> int:
    """0.2 % of the examples, at least 8 and at most 32, never more than there are.

    LoRA bears large batches less well than full-parameter training does, whatever its rank: below 32 nothing was
    lost (Schulman et al. 2025, "LoRA Without Regret").
    """
    return max(1, min(32, max(8, round(0.002 * examples)), examples))


def base_learning_rate(parameter_count: int) -> float:
    """The peak learning rate of supervised LoRA (scale 2) with a multiplier of 1.

    1.1e-3 at a billion parameters, and with the inverse square root of the size around it, at most 3e-3: that at 135
    million (there 3e-3 beat 2e-3, and 1e-3 was far off, on docs/examples/tickets), 3.9e-4 at 8 billion.
    """
    return min(3e-3, 1.1e-3 * math.sqrt(1e9 / max(1, parameter_count)))


def auto_learning_rate(method: Method, parameter_count: int, *, full_parameter: bool = False) -> float:
    """The peak learning rate of a method with a multiplier of 1.

    It does not depend on the rank: with a fixed scale the best one is nearly the same for all (Schulman et al. 2025).
    Full-parameter training takes a tenth of LoRA's (the same). DPO and KTO take a fortieth of supervised training's,
    ORPO, which has a likelihood term of its own, a quarter.
    """
    rate = base_learning_rate(parameter_count) * _METHOD_FACTOR[method]
    return rate * _FULL_FACTOR if full_parameter else rate


def auto_lora_alpha(rank: int, *, use_rslora: bool = False) -> float:
    """The alpha that makes the scale 2: it is alpha / r, or alpha / sqrt(r) with rank stabilisation."""
    return LORA_SCALE * (math.sqrt(rank) if use_rslora else rank)


def auto_eval_every(total_steps: int) -> int:
    """Steps between validations: about 20 of them in a job."""
    return max(1, total_steps // VALIDATIONS_PER_JOB)


def resolve(spec: TrainingSpec, base: BaseRef, examples: int) -> Hyperparameters:
    """Replace every auto by what the rules say for `examples` examples (pairs, for DPO and ORPO) on `base`."""
    multiplier = _or(spec.learning_rate_multiplier, 1.0)
    full, rslora = _or(spec.full_parameter, False), _or(spec.use_rslora, False)
    rate = auto_learning_rate(spec.method, base.parameter_count, full_parameter=full)
    epochs, batch = (
        _or(spec.n_epochs, auto_n_epochs(examples)),
        _or(spec.batch_size, auto_batch_size(examples)),
    )
    rank = 0 if full else _or(spec.lora_r, DEFAULT_LORA_R)
    preference = spec.method is not Method.SUPERVISED
    dpo, kto = spec.method is Method.DPO, spec.method is Method.KTO
    return Hyperparameters(
        n_epochs=epochs,
        batch_size=batch,
        learning_rate_multiplier=multiplier,
        learning_rate=multiplier * rate,
        lora_r=rank,
        lora_alpha=0.0 if full else _or(spec.lora_alpha, auto_lora_alpha(rank, use_rslora=rslora)),
        target_modules=() if full else spec.target_modules or base.target_modules,
        warmup_fraction=_or(spec.warmup_fraction, WARMUP_FRACTION),
        weight_decay=_or(spec.weight_decay, 0.0),
        max_grad_norm=_or(spec.max_grad_norm, 1.0),
        method=spec.method,
        beta=_or(spec.beta, DEFAULT_BETA) if preference else 0.0,
        loss_type=_or(spec.loss_type, "sigmoid") if dpo else "",
        label_smoothing=_or(spec.label_smoothing, 0.0) if dpo else 0.0,
        desirable_weight=_or(spec.desirable_weight, 1.0) if kto else 0.0,
        undesirable_weight=_or(spec.undesirable_weight, 1.0) if kto else 0.0,
        lora_dropout=_or(spec.lora_dropout, 0.0),
        use_rslora=rslora,
        use_dora=_or(spec.use_dora, False),
        full_parameter=full,
        schedule=_or(spec.schedule, "cosine"),
        early_stopping_patience=_or(spec.early_stopping_patience, 0),
        eval_every=_or(spec.eval_every, auto_eval_every(steps_of(epochs, batch, examples))),
        keep_checkpoints=_or(spec.keep_checkpoints, KEPT_CHECKPOINTS),
        sample_prompts=_or(spec.sample_prompts, 0),
    )


def _or(given: T | None, otherwise: T) -> T:
    return otherwise if given is None else given


def steps_of(n_epochs: int, batch_size: int, examples: int) -> int:
    """Optimizer steps; the last batch of an epoch may be smaller."""
    return n_epochs * math.ceil(examples / batch_size)


def total_steps(hyperparameters: Hyperparameters, examples: int) -> int:
    """Optimizer steps of the whole job."""
    return steps_of(hyperparameters.n_epochs, hyperparameters.batch_size, examples)
