"""The training half of the model thread: attempts go on to their next request, and passes serve those requests.

One turn is at most one pass. A pass joins whole slices of several attempts (see sharing.py). What goes wrong in
a joined pass is found out by running its slices one by one, so that each attempt hears of its own errors alone.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lathe.common.clock import Clock
from lathe.common.errors import Internal, LatheError
from lathe.common.metrics import Metrics
from lathe.engine.model import AttemptEvent, Ended, Outcome, Snapshot, StepMetrics, outcome_of
from lathe.engine.passes import is_out_of_memory
from lathe.engine.ports import ModelVerbs
from lathe.engine.recipes.turns import Blocked, Forward, Generate, Measure, Request, Turns
from lathe.engine.sampling import SamplingParams
from lathe.engine.sequences import SequenceState
from lathe.engine.sharing import PassCost, Share, credit_after, join, spare

logger = logging.getLogger(__name__)

# Passes after one that ran out of memory until joined ones may be larger again.
_ROOM_GROWS_AFTER = 200

# Another attempt goes on where this one ended.
_GOES_ON = (Outcome.RELEASED, Outcome.WORKER_LOST)


class Runnable(Protocol):
    """An attempt as the loop runs it; see recipes/run.py."""

    step: int
    trained_tokens: int

    def turns(self) -> Turns[None]: ...
    def snapshot(self) -> Snapshot | None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Training:
    """One attempt. request: what it waits for; answer or error: what it goes on with when it waits for nothing.

    credit: seconds that others may take while it is the oldest (see sharing.py).
    """

    attempt_id: str
    run: Runnable
    turns: Turns[None]
    emit: Callable[[AttemptEvent], None]
    order: int
    consumed: int
    credit: float = 0.0
    suspended: bool = False
    blocked_until: float = float("-inf")
    request: Request | None = None
    answer: Any = None
    error: Exception | None = None
    sequences: list[SequenceState] = field(default_factory=list)

    def answered(self, answer: Any) -> None:
        self.request, self.answer = None, answer

    def failed(self, error: Exception) -> None:
        forget_frames(error)
        self.request, self.error = None, error


def forget_frames(error: BaseException) -> None:
    """An exception that is kept keeps every frame of what failed alive, and so a whole pass's activations."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


class Trainer:
    """Belongs to the model thread.

    fused_tokens: how many tokens slices of several attempts may be in one pass. slowdown: how many times as long as
    alone the oldest attempt may take beside others.
    """

    def __init__(
        self, engine: ModelVerbs, clock: Clock, metrics: Metrics, *, fused_tokens: int, slowdown: float
    ) -> None:
        self._engine, self._clock, self._metrics = engine, clock, metrics
        self._most_room = self._room = fused_tokens
        self._passes_in_room = 0
        self._earns, self._cost = spare(slowdown), PassCost()
        self._attempts: list[_Training] = []
        self._arrivals = 0

    @property
    def blocked(self) -> bool:
        """Whether an attempt waits for time to pass, or has by now waited long enough."""
        return any(item.request is None and not item.suspended for item in self._attempts)

    # Attempts come and go.

    def start(self, attempt_id: str, run: Runnable, emit: Callable[[AttemptEvent], None]) -> None:
        self._arrivals += 1
        # A newcomer begins level with the others, or it would hold the model until it had caught up.
        consumed = min((item.consumed for item in self._attempts), default=0)
        self._attempts.append(_Training(attempt_id, run, run.turns(), emit, self._arrivals, consumed))

    def end(self, attempt_id: str, outcome: Outcome | None) -> None:
        """RELEASED: after a snapshot of the last whole step. None: without a word."""
        for item in [item for item in self._attempts if item.attempt_id == attempt_id]:
            if outcome is None:
                self._remove(item)
            else:
                self._finish(item, outcome)

    def suspend(self, attempt_id: str, suspended: bool) -> None:
        """Stop at the next slice and keep the state, or go on."""
        for item in self._attempts:
            if item.attempt_id == attempt_id:
                item.suspended = suspended

    def stop(self) -> None:
        for item in self._attempts:
            item.turns.close()
        self._attempts.clear()

    # One turn.

    def turn(self) -> bool:
        """Let every attempt go on to its next request, then serve some in one pass. False: nothing to be done."""
        for item in self._attempts:
            self._look_at_sequences(item)
        idle = [item for item in self._runnable() if item.request is None]
        wrote = [self._charged(item) for item in idle]
        if any(wrote):
            # A snapshot may have taken as long as a pass: sampling comes first.
            return True
        waiting = [item for item in self._runnable() if isinstance(item.request, Forward | Measure)]
        if waiting:
            self._next_pass(waiting)
        return bool(idle or waiting)

    def _charged(self, item: _Training) -> bool:
        """Lets it go on; what that takes is the oldest's own time, or taken from it."""
        oldest, began = self._oldest(), self._clock.monotonic()
        wrote = self._go_on(item)
        seconds = self._clock.monotonic() - began
        if oldest is not None:
            oldest.credit += self._earns * seconds if item is oldest else -seconds
        return wrote

    def _oldest(self) -> _Training | None:
        """The one that advances by a promise: one that waits for samples, or for time to pass, is held up by nobody."""
        return next((item for item in self._runnable() if not isinstance(item.request, Generate)), None)

    def _next_pass(self, waiting: Sequence[_Training]) -> None:
        shares = [self._share(item) for item in waiting]
        oldest = waiting[0]  # attempts stand in the order of their arrival
        chosen = join(shares, self._room, self._cost, credit=oldest.credit, earns=self._earns)
        items = [waiting[index] for index in chosen]
        self._grow_room()
        began = self._clock.monotonic()
        self._serve(items, oldest)
        seconds = self._clock.monotonic() - began
        oldest.credit = credit_after(
            shares, chosen, seconds, self._room, self._cost, credit=oldest.credit, earns=self._earns
        )

    def _grow_room(self) -> None:
        """Twice as much after many passes: what took the memory may be gone, and if not one pass is lost."""
        self._passes_in_room += 1
        if self._passes_in_room > _ROOM_GROWS_AFTER and self._room < self._most_room:
            self._room, self._passes_in_room = min(2 * self._room, self._most_room), 0

    def _runnable(self) -> list[_Training]:
        now = self._clock.monotonic()
        return [item for item in self._attempts if not item.suspended and item.blocked_until <= now]

    def _go_on(self, item: _Training) -> bool:
        """To its next request, or its end. Answers whether it wrote a snapshot, which ends its turn too."""
        while True:
            answer, error, item.answer, item.error = item.answer, item.error, None, None
            try:
                turn = item.turns.send(answer) if error is None else item.turns.throw(error)
            except StopIteration:
                self._finish(item, Outcome.SUCCEEDED)
                return False
            except Exception as failure:
                logger.exception("attempt %s failed", item.attempt_id)
                self._finish(item, *outcome_of(failure))
                return False
            if isinstance(turn, Blocked):
                logger.warning("attempt %s waits: %s", item.attempt_id, turn.reason)
                item.blocked_until = self._clock.monotonic() + turn.seconds
                return False
            if isinstance(turn, Forward | Measure | Generate):
                item.request = turn
                if isinstance(turn, Generate):
                    self._open_sequences(item, turn)
                return False
            if isinstance(turn, StepMetrics):
                self._metrics.engine_step_seconds.observe(turn.step_seconds)
            item.emit(turn)
            if isinstance(turn, Snapshot):
                return True

    def _finish(self, item: _Training, outcome: Outcome, *reason: Any) -> None:
        step, tokens = item.run.step, item.run.trained_tokens
        snapshot = self._last_whole_step(item) if outcome in _GOES_ON else None
        self._remove(item)
        if snapshot is not None:
            item.emit(snapshot)
        item.emit(Ended(outcome, step, tokens, *reason))

    def _last_whole_step(self, item: _Training) -> Snapshot | None:
        try:
            return item.run.snapshot()
        except Exception as error:
            # Given back all the same: the next attempt goes on from the checkpoint before.
            logger.warning("no checkpoint of attempt %s at its end: %s", item.attempt_id, error)
            return None

    def _remove(self, item: _Training) -> None:
        self._attempts.remove(item)
        self._close_sequences(item)
        item.run.close()

    # Passes.

    def _serve(self, items: Sequence[_Training], oldest: _Training) -> None:
        """One pass for the requests of these attempts; several are training slices, joined."""
        if len(items) > 1 and self._joined(items):
            return
        for item in items:
            try:
                answer = self._timed_pass(item.request, item.order if item is oldest else None)
            except Exception as error:
                item.failed(error)
            else:
                self._count(item)
                item.answered(answer)

    def _joined(self, items: Sequence[_Training]) -> bool:
        """Whether the joined pass went well; if not, the gradients are as they were before it."""
        requests = [item.request for item in items if isinstance(item.request, Forward)]
        began = self._clock.monotonic()
        try:
            results = iter(self._engine.forward_backward([p for request in requests for p in request.pieces]))
        except Exception as error:
            forget_frames(error)
            logger.warning("a pass of %d attempts failed, its slices go one by one: %s", len(items), error)
            if is_out_of_memory(error):
                self._room = sum(request.input_tokens for request in requests) // 2
                self._passes_in_room = 0
            return False
        seconds = self._clock.monotonic() - began
        self._cost.learn(sum(request.input_tokens for request in requests), len(items), seconds)
        for item, request in zip(items, requests, strict=True):
            self._count(item)
            item.answered([replace(next(results), fused=True) for _ in request.pieces])
        return True

    def _timed_pass(self, request: Request | None, oldest: int | None) -> Any:
        began = self._clock.monotonic()
        answer = self._pass(request)
        if isinstance(request, Forward) and request.training:
            self._cost.learn(request.input_tokens, 1, self._clock.monotonic() - began, oldest)
        return answer

    def _pass(self, request: Request | None) -> Any:
        if isinstance(request, Measure):
            return self._engine.measure(request.key, request.rows)
        assert isinstance(request, Forward)
        verb = self._engine.forward_backward if request.training else self._engine.evaluate
        return verb(request.pieces)

    def _count(self, item: _Training) -> None:
        assert isinstance(item.request, Forward | Measure)
        item.consumed += item.request.input_tokens
        self._metrics.engine_tokens.labels("train").inc(item.request.input_tokens)

    def _share(self, item: _Training) -> Share:
        request = item.request
        assert isinstance(request, Forward | Measure)
        joins = (
            isinstance(request, Forward)
            and request.training
            and all(self._engine.joins(piece.key) for piece in request.pieces)
        )
        lengths = [len(row.tokens) for row in request.rows]
        return Share(item.order, item.consumed, sum(lengths), len(lengths), max(lengths), joins)

    # Answers to held-out prompts: sequences that the loop samples beside the streams'.

    @property
    def sequences(self) -> list[SequenceState]:
        """What attempts wait to be sampled."""
        return [state for item in self._attempts for state in item.sequences if state.finished is None]

    def sampling_failed(self, error: Exception) -> None:
        """The step that had `sequences` in it went wrong: each run hears a LatheError, which ends no training."""
        for item in self._attempts:
            if item.sequences:
                self._close_sequences(item)
                item.failed(sampling_error(error))

    def _open_sequences(self, item: _Training, request: Generate) -> None:
        params = SamplingParams(
            max_tokens=request.max_tokens, temperature=0.0, stop_ids=frozenset(request.stop_ids)
        )
        try:
            for prompt in request.prompts:
                item.sequences.append(self._engine.open_sequence(request.key, prompt, params))
        except Exception as error:
            self._close_sequences(item)
            item.failed(sampling_error(error))

    def _look_at_sequences(self, item: _Training) -> None:
        if not isinstance(item.request, Generate) or any(state.finished is None for state in item.sequences):
            return
        failure = next((state.failure for state in item.sequences if state.failure is not None), None)
        answers = [
            tuple(state.tokens[:-1] if state.finished == "stop" else state.tokens) for state in item.sequences
        ]
        self._close_sequences(item)
        if failure is None:
            item.answered(answers)
        else:
            item.failed(failure)

    def _close_sequences(self, item: _Training) -> None:
        for state in item.sequences:
            self._engine.close_sequence(state)
        item.sequences = []


def sampling_error(error: Exception) -> LatheError:
    """What those that wait for a sampling step hear when it fails."""
    return error if isinstance(error, LatheError) else Internal(f"Sampling failed: {error}"[:500])
