"""The model thread: one sampling step, one training turn, again and again; asleep when there is neither.

Everything that touches the model runs here. Other threads hand it commands through an inbox and hear from it
through a `TokenStream` per sequence and an `emit` callback per attempt, neither of which it ever waits for.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from lathe.common.clock import Clock
from lathe.common.errors import Aborted, LatheError, ResourceExhausted
from lathe.common.metrics import Metrics
from lathe.engine.model import AttemptEvent, Outcome
from lathe.engine.ports import ModelVerbs
from lathe.engine.sampling import SamplingParams
from lathe.engine.sequences import SequenceState, StepOutput
from lathe.engine.streams import StreamFinished, StreamStarted, TokenStream
from lathe.engine.training import Runnable, Trainer, forget_frames, sampling_error

logger = logging.getLogger(__name__)

# A sequence whose reader takes nothing for this long is cancelled.
SUSPENDED_LIMIT_S = 30.0
# How often an idle loop looks at suspended sequences, and a busy one at its memory.
TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class LoopLimits:
    """max_sequences: sampled at once; max_waiting: accepted beyond them; stream_tokens: a reader's queue.

    fused_tokens: how long the joined slices of a training pass may be; fused_slowdown: how many times as long as alone
    the oldest attempt may take for the others' sake. decode_steps: sampling's share, how many of its steps go between
    two training passes while there is both to do.
    """

    max_sequences: int = 32
    max_waiting: int = 64
    stream_tokens: int = 256
    prefill_tokens: int = 256
    fused_tokens: int = 320
    fused_slowdown: float = 1.6
    decode_steps: int = 1


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """What the loop last said of itself; any thread may read it."""

    active: int = 0
    waiting: int = 0
    adapters: int = 0
    memory_bytes: int = 0


@dataclass(slots=True)
class _Open:
    stream: TokenStream
    key: str
    prompt: Sequence[int]
    params: SamplingParams
    state: SequenceState | None = None
    started: bool = False
    suspended_at: float | None = None


class ModelLoop:
    """Commands may come from any thread; `run` (or `run_once`, in tests) belongs to one."""

    def __init__(
        self, engine: ModelVerbs, clock: Clock, limits: LoopLimits, metrics: Metrics | None = None
    ) -> None:
        self._engine, self._clock, self._limits = engine, clock, limits
        self._metrics = metrics if metrics is not None else Metrics()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[_Open] = deque()
        self._active: list[_Open] = []
        self._trainer = Trainer(
            engine,
            clock,
            self._metrics,
            fused_tokens=limits.fused_tokens,
            slowdown=limits.fused_slowdown,
        )
        self._decoded = 0
        self._stopping = False
        self._lock = Lock()
        self._accepted = 0
        self._status = LoopStatus()
        self._status_at = float("-inf")

    # Commands: any thread.

    @property
    def status(self) -> LoopStatus:
        return self._status

    @property
    def open_sequences(self) -> int:
        """Accepted and not ended yet."""
        return self._accepted

    def open(
        self, key: str, prompt: Sequence[int], params: SamplingParams, on_ready: Callable[[], None]
    ) -> TokenStream:
        """Sample a sequence with adapter `key` ("" is the base). Raises ResourceExhausted when too many wait."""
        with self._lock:
            if self._accepted >= self._limits.max_sequences + self._limits.max_waiting:
                raise ResourceExhausted(
                    f"The engine has {self._accepted} sequences open already; try again soon.",
                    retry_after=1.0,
                )
            self._accepted += 1
        stream = TokenStream(self._limits.stream_tokens, on_ready, self.wake)
        entry = _Open(stream, key, prompt, params)
        self._inbox.put(lambda: self._waiting.append(entry))
        return stream

    def cancel(self, stream: TokenStream) -> None:
        """Free a sequence whose reader has gone. Harmless when it has ended."""
        self._inbox.put(lambda: self._cancel(stream))

    def wake(self) -> None:
        """Look again: a reader made room."""
        self._inbox.put(_nothing)

    def load_adapter(self, key: str, folder: Path) -> Future[None]:
        """Bring an adapter's files into memory for sampling; loading one twice is harmless."""
        return self._call(lambda: self._load(key, folder))

    def drop_adapter(self, key: str) -> Future[None]:
        """Take an adapter out of memory. Raises FailedPrecondition while a sequence uses it."""
        return self._call(lambda: self._engine.drop_adapter(key))

    def start(self, attempt_id: str, run: Runnable, emit: Callable[[AttemptEvent], None]) -> None:
        """Train. `emit` is called in the model thread; an Ended is the last event, and the only one after
        which the attempt's adapter is gone."""
        self._inbox.put(lambda: self._trainer.start(attempt_id, run, emit))

    def cancel_attempt(self, attempt_id: str) -> None:
        """End it as CANCELLED at the next slice."""
        self._inbox.put(lambda: self._trainer.end(attempt_id, Outcome.CANCELLED))

    def release_attempt(self, attempt_id: str) -> None:
        """Snapshot the last whole step and end it as RELEASED."""
        self._inbox.put(lambda: self._trainer.end(attempt_id, Outcome.RELEASED))

    def drop_attempt(self, attempt_id: str) -> None:
        """Forget it without a word: its lease is another engine's."""
        self._inbox.put(lambda: self._trainer.end(attempt_id, None))

    def suspend_attempt(self, attempt_id: str, suspended: bool) -> None:
        """Stop at the next slice and keep the state, or go on: its lease has run out, or was renewed."""
        self._inbox.put(lambda: self._trainer.suspend(attempt_id, suspended))

    def stop(self) -> None:
        """Return from `run` after the current turn; open sequences end as Aborted."""
        self._inbox.put(self._stop)

    # The model thread.

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopping:
            if not self.run_once() and not self._stopping:
                self._wait()

    def run_once(self) -> bool:
        """Take the commands, sample a step, train a turn. False when there was nothing to compute."""
        while not self._inbox.empty():
            self._inbox.get()()
        self._expire()
        self._admit()
        sampled = self._sample()
        self._decoded += sampled
        trained = False
        if not sampled or self._decoded >= self._limits.decode_steps:
            self._decoded = 0
            trained = self._trainer.turn()
        self._refresh(force=not (sampled or trained))
        return sampled or trained

    def _wait(self) -> None:
        waiting = self._trainer.blocked or any(entry.suspended_at is not None for entry in self._active)
        try:
            self._inbox.get(timeout=TICK_S if waiting else None)()
        except queue.Empty:
            return

    def _call(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._inbox.put(command)
        return future

    def _load(self, key: str, folder: Path) -> None:
        if key not in self._engine.adapter_keys():
            self._engine.load_adapter(key, folder)

    def _stop(self) -> None:
        self._stopping = True
        self._refuse_all(Aborted("The engine stopped; ask again.", reason="ENGINE_STOPPED"))
        self._trainer.stop()

    def _refuse_all(self, error: LatheError) -> None:
        for entry in [*self._active, *self._waiting]:
            entry.stream.put(error)
            self._release(entry)
        self._active.clear()
        self._waiting.clear()

    # Sampling.

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._limits.max_sequences:
            entry = self._waiting.popleft()
            try:
                entry.state = self._engine.open_sequence(entry.key, entry.prompt, entry.params)
            except Exception as error:
                self._fail(entry, error)
            else:
                self._active.append(entry)

    def _expire(self) -> None:
        now = self._clock.monotonic()
        for entry in list(self._active):
            if entry.stream.has_room():
                entry.suspended_at = None
            elif entry.suspended_at is None:
                entry.suspended_at = now
            elif now - entry.suspended_at >= SUSPENDED_LIMIT_S:
                self._active.remove(entry)
                self._fail(entry, ResourceExhausted("The reader took no token for 30 seconds."))

    def _sample(self) -> bool:
        ready = [entry for entry in self._active if entry.suspended_at is None]
        own = self._trainer.sequences
        if not ready and not own:
            return False
        entries = {id(entry.state): entry for entry in ready}
        states = [entry.state for entry in ready if entry.state is not None]
        try:
            # Prompts are taken in this order: streams come without end, a job's held-out prompts are few.
            outputs = self._engine.step([*own, *states], prefill_tokens=self._limits.prefill_tokens)
        except Exception as error:
            self._sampling_failed(ready, error)
            return True
        for output in outputs:
            entry = entries.get(id(output.state))
            if entry is not None:
                self._deliver(entry, output)
        self._metrics.engine_tokens.labels("sampled").inc(len(outputs))
        self._end_failed([*own, *states], entries)
        return True

    def _end_failed(self, states: Sequence[SequenceState], entries: Mapping[int, _Open]) -> None:
        """Those that the model gave no number for; an attempt sees its own ones by itself."""
        for state in states:
            if state.failure is None:
                continue
            logger.warning("a sequence of %r failed: %s", state.key or "the base", state.failure)
            self._metrics.engine_failed_sequences.inc()
            entry = entries.get(id(state))
            if entry is not None:
                self._active.remove(entry)
                self._fail(entry, state.failure)

    def _deliver(self, entry: _Open, output: StepOutput) -> None:
        if not entry.started:
            entry.started = True
            cached = output.state.cached_tokens
            entry.stream.put(StreamStarted(cached))
            self._metrics.engine_tokens.labels("prompt").inc(output.state.prompt_tokens - cached)
        entry.stream.put(output.sampled)
        if output.state.finished is not None:
            entry.stream.put(StreamFinished(output.state.finished))
            self._active.remove(entry)
            self._release(entry)

    def _sampling_failed(self, ready: list[_Open], error: Exception) -> None:
        if isinstance(error, ResourceExhausted) and ready and not self._trainer.sequences:
            # Not even one fits: the one that got nothing yet is the one to go.
            victims = [next((entry for entry in ready if not entry.started), ready[-1])]
        elif isinstance(error, ResourceExhausted):
            victims = []
        else:
            logger.error("a sampling step failed", exc_info=error)
            victims = ready
        forget_frames(error)
        for entry in victims:
            self._active.remove(entry)
            self._fail(entry, error)
        self._trainer.sampling_failed(error)

    def _cancel(self, stream: TokenStream) -> None:
        for entries in (self._active, self._waiting):
            for entry in list(entries):
                if entry.stream is stream:
                    entries.remove(entry)
                    self._release(entry)

    def _fail(self, entry: _Open, error: Exception) -> None:
        entry.stream.put(sampling_error(error))
        self._release(entry)

    def _release(self, entry: _Open) -> None:
        if entry.state is not None:
            self._engine.close_sequence(entry.state)
        with self._lock:
            self._accepted -= 1

    def _refresh(self, *, force: bool) -> None:
        now = self._clock.monotonic()
        if not force and now - self._status_at < TICK_S and len(self._active) == self._status.active:
            return
        self._status_at = now
        memory = self._engine.memory()
        held = memory.base_bytes + memory.adapter_bytes + memory.optimizer_bytes + memory.kv_bytes
        adapters = len(self._engine.adapter_keys())
        self._status = LoopStatus(len(self._active), len(self._waiting), adapters, held)
        self._metrics.engine_memory_bytes.set(held)
        self._metrics.engine_adapters_loaded.set(adapters)


def _nothing() -> None:
    """A command that only wakes the loop."""
