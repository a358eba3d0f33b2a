"""What the engine's shell needs: the verbs of the numerical core, and jobs. Each has a real adapter and a fake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lathe.engine.batch import SliceResult, TrainRow, TrainSlice
from lathe.engine.engine import EngineMemory
from lathe.engine.full import FullSpec
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import (
    AdapterRef,
    Attempt,
    AttemptError,
    EngineReceipt,
    HeartbeatReply,
    HeldLease,
    Outcome,
    Progress,
    Registration,
    Terms,
)
from lathe.engine.sampling import SamplingParams
from lathe.engine.sequences import SequenceState, StepOutput


class TrainVerbs(Protocol):
    """What a recipe calls itself; passes it asks for (recipes/turns.py). See `lathe.engine.engine.Engine`."""

    @property
    def workers(self) -> int: ...
    def create_adapter(self, key: str, config: LoraSpec | FullSpec, seed: int) -> None: ...
    def continue_adapter(
        self, key: str, folder: Path, seed: int, lora_dropout: float | None = None
    ) -> None: ...
    def load_reference(self, key: str, folder: Path) -> None: ...
    def drop_adapter(self, key: str) -> None: ...
    def adapter_keys(self) -> tuple[str, ...]: ...
    def optim_step(self, key: str, lr: float, *, clip: float = 1.0, weight_decay: float = 0.0) -> float: ...
    def zero_grad(self, key: str) -> None: ...
    def save(
        self, key: str, folder: Path, *, with_optimizer: bool, base_model: str = ""
    ) -> tuple[str, ...]: ...
    def restore(self, key: str, folder: Path) -> int: ...


class ModelVerbs(Protocol):
    """What the model loop is written with: the passes, and sampling."""

    def joins(self, key: str) -> bool: ...
    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]: ...
    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]: ...
    def measure(self, key: str, rows: Sequence[TrainRow]) -> int | None: ...
    def load_adapter(self, key: str, folder: Path) -> None: ...
    def drop_adapter(self, key: str) -> None: ...
    def adapter_keys(self) -> tuple[str, ...]: ...
    def open_sequence(self, key: str, prompt: Sequence[int], params: SamplingParams) -> SequenceState: ...
    def step(self, sequences: Sequence[SequenceState], *, prefill_tokens: int = 256) -> list[StepOutput]: ...
    def close_sequence(self, state: SequenceState) -> None: ...
    def memory(self) -> EngineMemory: ...


class Jobs(Protocol):
    """What an engine says to jobs. Raises Unavailable or DeadlineExceeded while jobs is away, and Aborted for
    a lease token that is not valid any more."""

    async def register(self, registration: Registration) -> Terms: ...

    async def heartbeat(
        self,
        engine_id: str,
        leases: Sequence[HeldLease],
        *,
        active_sequences: int,
        memory_bytes: int,
        draining: bool,
    ) -> HeartbeatReply: ...

    async def lease(self, engine_id: str) -> Attempt | None: ...

    async def report(self, lease: HeldLease, progress: Progress) -> None: ...

    async def complete(
        self,
        lease: HeldLease,
        outcome: Outcome,
        *,
        step: int,
        trained_tokens: int,
        final_adapter: AdapterRef | None = None,
        error: AttemptError | None = None,
        receipt: EngineReceipt | None = None,
    ) -> None: ...

    async def deregister(self, engine_id: str) -> None: ...
