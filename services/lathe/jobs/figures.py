"""What is measured of jobs and what is expected of them: the values alone. estimates.py has the rules about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class Basis(StrEnum):
    """Where a number comes from: jobs like this one, other jobs on such engines, or a published rule."""

    MEASURED = "measured"
    SCALED = "scaled"
    RULE = "rule"


@dataclass(frozen=True, slots=True)
class Range:
    """low <= likely <= high."""

    low: float
    likely: float
    high: float
    basis: Basis = Basis.RULE


@dataclass(frozen=True, slots=True)
class Work:
    """What decides how fast a token is trained, and in how much memory, beside the engine.

    parameters: of the base model. workers: processes that train it together.
    """

    base_digest: str
    parameters: int
    method: str
    full_parameter: bool = False
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Speed:
    """What one attempt did, summed over its steps, validations apart.

    tokens: all that went through the model to be trained. held_bytes: weights, adapters and caches of the engine;
    pass_bytes: what its heaviest slice takes beside them, of pass_tokens tokens. 0 where that is not known.
    """

    attempt_id: str
    work: Work
    engine_class: str
    device: str
    threads: int
    tokens: float
    seconds: float
    steps: int
    update_time: datetime
    held_bytes: int = 0
    pass_bytes: int = 0
    pass_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prices:
    """What the operator asks for, in one currency (ISO 4217). engine_hour: engine class -> price of an engine's hour.

    hosting_hour: of serving a tuned model for an hour; None: not set.
    """

    currency: str = ""
    engine_hour: Mapping[str, float] = field(default_factory=dict)
    hosting_hour: float | None = None


NO_PRICES = Prices()


@dataclass(frozen=True, slots=True)
class Tokens:
    """The work of a job in numbers. validation: tokens, each as often as it is validated."""

    examples: int
    n_epochs: int
    batch_size: int
    steps: int
    per_epoch: int
    trained_per_epoch: int
    validation: int
    max_row: int

    @property
    def all(self) -> int:
        return self.per_epoch * self.n_epochs


@dataclass(frozen=True, slots=True)
class EngineEstimate:
    """A job on the engines of one class. None is what is not known. price: in the currency of the JobEstimate."""

    engine_class: str
    workers: int = 1
    device: str = ""
    tokens_per_second: float = 0.0
    seconds: Range | None = None
    memory_bytes: Range | None = None
    queue_seconds: float | None = None
    price: Range | None = None


@dataclass(frozen=True, slots=True)
class JobEstimate:
    """What a job is expected to take. engines: the class that it asks for comes first."""

    examples: int
    n_epochs: int
    batch_size: int
    steps: int
    tokens_per_epoch: int
    tokens: int
    trained_tokens: int
    validation_tokens: int
    engines: tuple[EngineEstimate, ...]
    currency: str = ""
    hosting_price_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class ReplacedPrompt:
    """What a request of the tuned model saves: prompt tokens at a price per million, or seconds of an engine."""

    prompt_tokens_saved: float = 0.0
    price_per_million_tokens: float | None = None
    seconds_saved: float | None = None
    requests_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class BreakEven:
    """requests: None where it never pays or a price is missing; `reason` says which."""

    requests: float | None
    reason: str = ""
    by_seconds: bool = False
    saved_per_request: float = 0.0
    net_saved_per_request: float = 0.0
    hosting_requests_per_hour: float | None = None
