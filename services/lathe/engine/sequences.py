"""What the engine keeps of a sequence that is being sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

from lathe.common.errors import Internal, LatheError
from lathe.engine.sampling import Sampled, Sampler


@dataclass(eq=False)
class SequenceState:
    """One sequence being sampled. `finished`: None, "stop" (a stop id, last of `tokens`), "length", or "error", for
    which `failure` says why."""

    key: str
    prompt: tuple[int, ...]
    sampler: Sampler
    limit: int
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    failure: LatheError | None = None
    cached_tokens: int = 0
    kv_slot: int | None = None
    done: int = 0  # tokens whose keys and values are in the slot
    far: bool | None = (
        None  # whether they are rotated as beyond longrope's original context; None before the first slot
    )
    closed: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def total(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def pending(self) -> list[int]:
        """Tokens to be put through the model, the newest sampled one included."""
        return self.all_tokens()[self.done :]

    def all_tokens(self) -> list[int]:
        return [*self.prompt, *self.tokens]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """A token for one sequence; `state.finished` tells whether it was the last."""

    state: SequenceState
    sampled: Sampled


def slot_of(state: SequenceState) -> int:
    """Its slot in the cache, which it must have."""
    assert state.kv_slot is not None
    return state.kv_slot


def emit(state: SequenceState, sampled: Sampled) -> StepOutput:
    """Takes a token into the sequence, and sees whether it was the last."""
    state.tokens.append(sampled.token)
    if sampled.token in state.sampler.params.stop_ids:
        state.finished = "stop"
    elif len(state.tokens) >= state.limit:
        state.finished = "length"
    return StepOutput(state, sampled)


def spoil(state: SequenceState) -> None:
    """Ends a sequence for which the model gave NaN or infinity: there is no next token."""
    state.finished = "error"
    state.failure = Internal(
        f"The model gave no next token after {len(state.prompt)} tokens of prompt and {len(state.tokens)} of the "
        "answer: what it computed is not finite (NaN or infinity), because its weights are too large. Use an earlier "
        "checkpoint, or tune it again with a lower learning rate.",
        reason="MODEL_NOT_FINITE",
    )
