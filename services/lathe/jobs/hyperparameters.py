"""The published rules for hyperparameters that a user leaves at auto."""

from __future__ import annotations

import math

from lathe.jobs.model import BaseRef, Hyperparameters, SupervisedSpec

DEFAULT_LORA_R = 16
# Scale alpha / r = 2, as in the measurements that the learning rate below comes from.
DEFAULT_ALPHA_PER_R = 2.0


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
    """0.2 % of the examples, at least 8 and at most 64, never more than there are."""
    return max(1, min(64, max(8, round(0.002 * examples)), examples))


def base_learning_rate(parameter_count: int) -> float:
    """The peak learning rate of LoRA (alpha = 2 r) with a multiplier of 1.

    1.1e-3 at a billion parameters, and with the inverse square root of the size around it, at most 3e-3: that at 135
    million (there 3e-3 beat 2e-3, and 1e-3 was far off, on docs/examples/tickets), 3.9e-4 at 8 billion.
    """
    return min(3e-3, 1.1e-3 * math.sqrt(1e9 / max(1, parameter_count)))


def resolve(spec: SupervisedSpec, base: BaseRef, examples: int) -> Hyperparameters:
    """Replace every auto by what the rules say for `examples` rows on `base`."""
    multiplier = 1.0 if spec.learning_rate_multiplier is None else spec.learning_rate_multiplier
    rank = DEFAULT_LORA_R if spec.lora_r is None else spec.lora_r
    return Hyperparameters(
        n_epochs=auto_n_epochs(examples) if spec.n_epochs is None else spec.n_epochs,
        batch_size=auto_batch_size(examples) if spec.batch_size is None else spec.batch_size,
        learning_rate_multiplier=multiplier,
        learning_rate=multiplier * base_learning_rate(base.parameter_count),
        lora_r=rank,
        lora_alpha=DEFAULT_ALPHA_PER_R * rank if spec.lora_alpha is None else spec.lora_alpha,
        target_modules=spec.target_modules or base.target_modules,
    )


def total_steps(hyperparameters: Hyperparameters, examples: int) -> int:
    """Optimizer steps of the whole job; the last batch of an epoch may be smaller."""
    return hyperparameters.n_epochs * math.ceil(examples / hyperparameters.batch_size)
