"""One attempt at a job, by any recipe: for each step of the plan, for each of its slices a pass, then optim_step.

The run is a generator, so that the model thread can join its passes with others' and sample between them. What it
trains depends on the data, the configuration, the slice plan and its recorded halvings alone: never on time, other
jobs or open streams. That goes for what it measures in a validation too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lathe.common.clock import Clock
from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.engine.batch import SliceResult, TrainRow, TrainSlice, total, trained_tokens
from lathe.engine.model import (
    Note,
    RunState,
    SlicePlan,
    Snapshot,
    SnapshotKind,
    StepMetrics,
    TrainingConfig,
)
from lathe.engine.optim import Schedule
from lathe.engine.packing import Slice, Step, cut, halve, slice_plan
from lathe.engine.passes import is_out_of_memory
from lathe.engine.ports import TrainVerbs
from lathe.engine.recipes.preflight import Memory, Room, find_room
from lathe.engine.recipes.recipe import Batch, Job, Recipe, TrainData, no_room
from lathe.engine.recipes.samples import Speech, held_out, sampled
from lathe.engine.recipes.saving import Saver, Start
from lathe.engine.recipes.turns import Turns, forward
from lathe.engine.watch import offenders

# Between full validations (one an epoch), one batch is validated about this often over the whole job.
VALIDATIONS_PER_JOB = 20


class Run:
    """`turns` does the work; `snapshot` saves the last whole step at any moment between turns."""

    def __init__(
        self,
        recipe: Callable[[Job], Recipe],
        *,
        engine: TrainVerbs,
        key: str,
        data: TrainData,
        config: TrainingConfig,
        plan: SlicePlan,
        folder: Callable[[SnapshotKind, int], Path],
        clock: Clock,
        start: Start | None = None,
        initial_adapter: Path | None = None,
        halvings: Sequence[tuple[int, int]] = (),
        memory: Memory | None = None,
        checkpoint_interval_s: float = 60.0,
        speech: Speech | None = None,
    ) -> None:
        """folder(kind, step): where a snapshot goes. initial_adapter: PEFT's folder that the job begins from.

        halvings: as in Snapshot, of an earlier run that is repeated, for the same slices. memory: for
        the preflight; without it there is none. speech: for the answers to held-out prompts; without it there are none.

        Raises InvalidArgument for data or a configuration that cannot be trained.
        """
        if not data.training:
            raise InvalidArgument("The training file has no rows.", reason="INVALID_TRAINING_FILE")
        self._engine, self._key, self._data, self._config = engine, key, data, config
        self._clock = clock
        self._recipe = recipe(Job(engine, key, data, config, plan.train_tokens_per_slice, initial_adapter))
        self._budget, self._unit = plan.train_tokens_per_slice, self._recipe.unit
        self.plan = slice_plan(
            [len(row.tokens) for row in data.training],
            n_epochs=config.n_epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            max_tokens_per_slice=self._budget,
            unit=self._unit,
        )
        self.total_steps = self.plan.total_steps
        warmup = round(config.warmup_fraction * self.total_steps)
        self._schedule = Schedule(config.schedule, config.learning_rate, self.total_steps, warmup)
        self._saver = Saver(
            engine,
            key,
            config,
            self._recipe,
            folder=folder,
            clock=clock,
            start=start,
            initial=initial_adapter,
            interval_s=checkpoint_interval_s,
        )
        self.step = start.step if start is not None else 0
        self.trained_tokens = start.trained_tokens if start is not None else 0
        self._halvings: dict[int, int] = dict(start.halvings if start is not None else halvings)
        self._state = start.state if start is not None else RunState()
        self._metrics: StepMetrics | None = None
        self._speech = speech
        self._prompts = held_out(data.validation, config.sample_prompts)
        self._memory, self._room = memory, Room()

    def turns(self) -> Turns[None]:
        """The whole attempt, a turn at a time. Raises FailedPrecondition when the loss has diverged."""
        self._saver.begin()
        yield from self._recipe.begin()
        yield from self._preflight()
        if self._state.unfinished is not None:
            yield from self._finish(self.plan.step(self.step - 1), self._state.unfinished)
        while self.step < self.total_steps and not self._enough():
            step = self.plan.step(self.step)
            metrics = yield from self._train(step)
            yield from self._finish(step, metrics)
        yield from self._saver.saved(lambda: self._snapshot(SnapshotKind.FINAL, self._state))

    def snapshot(self) -> Snapshot | None:
        """Save the last whole step for a later attempt; None when it is saved already or nothing was done."""
        if self.step <= self._saver.saved_step:
            return None
        return self._snapshot(SnapshotKind.RESUME, self._state)

    def close(self) -> None:
        """Forget the adapter."""
        self._recipe.close()
        if self._key in self._engine.adapter_keys():
            self._engine.drop_adapter(self._key)

    def _preflight(self) -> Turns[None]:
        if self._memory is None or self.step == self.total_steps:
            return
        self._room = yield from find_room(
            self._memory,
            self._key,
            self._data.training,
            unit=self._unit,
            batch_size=self._config.batch_size,
            slice_tokens=self._budget,
        )
        if self._room.memory_note is not None:
            yield self._room.memory_note
        if self._room.note is not None and not self.step:
            yield self._room.note

    # One step.

    def _train(self, step: Step) -> Turns[StepMetrics]:
        started = self._clock.monotonic()
        batch = self._batch(self._data.training, step.rows, training=True)
        if not any(trained_tokens(row) for row in batch.rows):
            raise InvalidArgument(f"No token of step {step.index + 1}'s rows is trained.")
        self._fit(step)
        while True:
            try:
                sums = yield from self._pass(batch, self._pieces(step))
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            yield self._halve(step)
        lr = self._schedule.lr(step.index)
        norm = self._engine.optim_step(
            self._key, lr, clip=self._config.max_grad_norm, weight_decay=self._config.weight_decay
        )
        self._watch(step, batch, sums, norm)
        self.step = step.index + 1
        self.trained_tokens += sums.tokens
        seconds = self._clock.monotonic() - started
        metrics = StepMetrics(
            step=self.step,
            total_steps=self.total_steps,
            train_loss=sums.loss,
            train_mean_token_accuracy=sums.correct / sums.tokens,
            learning_rate=lr,
            tokens_per_second=sums.input_tokens / seconds if seconds > 0 else 0.0,
            trained_tokens=sums.tokens,
            step_seconds=seconds,
            grad_norm=norm,
            epoch=step.epoch + 1,
            figures=sums.figures,
        )
        self._state = replace(
            self._state,
            losses=self._state.losses.after(sums.loss),
            unfinished=metrics,
            fused=self._state.fused or sums.fused,
        )
        return metrics

    def _pass(self, batch: Batch, pieces: Sequence[Slice]) -> Turns[SliceResult]:
        """The batch, a slice for each worker at a time. pieces: its rows, in its order."""
        objectives = yield from self._recipe.objectives(batch)
        slices: list[TrainSlice] = []
        done = 0
        for piece in pieces:
            places = range(done, done + len(piece.rows))
            rows = tuple(batch.rows[place] for place in places)
            slices.append(TrainSlice(self._key, rows, objectives(places)))
            done += len(places)
        results: list[SliceResult] = []
        workers = self._engine.workers
        for first in range(0, len(slices), workers):
            together = slices[first : first + workers]
            results += yield from forward(together, training=batch.training)
        return total(results)

    def _batch(self, rows: Sequence[TrainRow], indices: Sequence[int], *, training: bool) -> Batch:
        return Batch(tuple(rows[index] for index in indices), tuple(indices), training)

    def _fit(self, step: Step) -> None:
        """Halves the step's slices until each has room, as far as its units let it."""
        room = self._room.tokens
        while room is not None and any(
            len(piece.rows) > self._unit and sum(self.plan.lengths[row] for row in piece.rows) > room
            for piece in self._pieces(step)
        ):
            self._halvings[step.index] = self._halvings.get(step.index, 0) + 1

    def _pieces(self, step: Step) -> tuple[Slice, ...]:
        pieces = step.slices
        for _ in range(self._halvings.get(step.index, 0)):
            pieces = tuple(half for piece in pieces for half in halve(piece, self._unit))
        return pieces

    def _halve(self, step: Step) -> Note:
        """Plan the step again with half slices, recorded so that a replay cuts the same."""
        self._engine.zero_grad(self._key)
        if all(len(piece.rows) == self._unit for piece in self._pieces(step)):
            raise no_room(max(self.plan.lengths[row] for row in step.rows))
        self._halvings[step.index] = self._halvings.get(step.index, 0) + 1
        slices = len(self._pieces(step))
        return Note(
            step.index + 1,
            "out_of_memory",
            f"Step {step.index + 1} did not fit into the engine's memory; it is computed again in {slices} slices. "
            "The batch stays the same.",
        )

    def _watch(self, step: Step, batch: Batch, sums: SliceResult, norm: float) -> None:
        """Raises FailedPrecondition, naming rows, when the loss is no number or has diverged."""
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            what = "is not a number any more" if not math.isfinite(sums.loss) else "has no finite gradient"
        elif self._state.losses.after(sums.loss).diverged:
            what = f"has diverged to {sums.loss:.3g} (its lowest level was {self._state.losses.lowest:.3g})"
        else:
            return
        worst = offenders(sums.row_losses, [trained_tokens(row) for row in batch.rows])
        lines = ", ".join(str(batch.rows[i].line or batch.indices[i] + 1) for i in worst)
        raise FailedPrecondition(
            f"The loss {what} at step {step.index + 1} of {self.total_steps}; look at lines {lines} of the training "
            f"file, or try a lower learning_rate_multiplier.",
            reason="TRAINING_DIVERGED",
        )

    # What follows a step: validation, then the checkpoints.

    def _finish(self, step: Step, metrics: StepMetrics) -> Turns[None]:
        # Until all of it is done a snapshot says `unfinished`, and the next attempt does it again.
        metrics = yield from self._validated(step, metrics)
        state = replace(self._state, unfinished=None)
        patience = self._config.early_stopping_patience
        if patience and metrics.full_valid_loss is not None:
            evaluations = state.evaluations.after(self.step, metrics.full_valid_loss)
            state = replace(state, evaluations=evaluations)
            if evaluations.best_step == self.step:
                yield from self._saver.keep_best(self.step)
        self._metrics = metrics
        yield metrics
        if step.ends_epoch:
            yield from self._saver.saved(lambda: self._snapshot(SnapshotKind.EPOCH, state))
            self._state = state
            if self._speech is not None:
                yield from sampled(self._key, self.step, self._prompts, self._speech)
        else:
            self._state = state
            if self._saver.is_due():
                yield from self._saver.saved_if_room(lambda: self._snapshot(SnapshotKind.RESUME, state))
        self._saver.forget_best_but(state.evaluations.best_step)
        if self._enough() and self.step < self.total_steps:
            yield self._stopped_early()

    def _enough(self) -> bool:
        patience = self._config.early_stopping_patience
        return bool(patience) and self._state.evaluations.since_best >= patience

    def _stopped_early(self) -> Note:
        evaluations = self._state.evaluations
        return Note(
            self.step,
            "early_stopping",
            f"Stopped after step {self.step} of {self.total_steps}: the validation loss has not fallen for "
            f"{evaluations.since_best} evaluations. The result is that of step {evaluations.best_step}, with a "
            f"validation loss of {evaluations.best_loss:.4f}.",
        )

    def _validated(self, step: Step, metrics: StepMetrics) -> Turns[StepMetrics]:
        """The step's metrics with what validation adds: one batch now and then, the whole file at an epoch's end."""
        rows, config = self._data.validation, self._config
        every = config.eval_every or max(1, self.total_steps // VALIDATIONS_PER_JOB)
        due = (step.index + 1) % every == 0
        if not rows or not (due or step.ends_epoch):
            return metrics
        size, count = config.batch_size * self._unit, len(rows)
        first = (step.index // every) % -(-count // size) * size
        in_full = [range(count)] if step.ends_epoch or config.early_stopping_patience else []
        part, *rest = yield from self._evaluations([range(first, min(first + size, count)), *in_full])
        metrics = replace(
            metrics,
            valid_loss=_mean_loss(part),
            valid_mean_token_accuracy=_accuracy(part),
            figures={**metrics.figures, **_prefixed("eval_", part.figures)},
        )
        for whole in rest:
            metrics = replace(
                metrics,
                full_valid_loss=_mean_loss(whole),
                full_valid_mean_token_accuracy=_accuracy(whole),
                figures={**metrics.figures, **_prefixed("full_eval_", whole.figures)},
            )
        return metrics

    def _evaluations(self, parts: Sequence[range]) -> Turns[list[SliceResult]]:
        """A step's validations, all in slices of one size: a rerun knows only which size the step came to."""
        while True:
            results: list[SliceResult] = []
            sizes: set[int] = set()
            for chosen in parts:
                results.append((yield from self._evaluate(chosen)))
                sizes.add(self._validation_tokens())
            if len(sizes) == 1:
                return results

    def _evaluate(self, chosen: range) -> Turns[SliceResult]:
        rows = self._data.validation
        lengths = [len(row.tokens) for row in rows]
        batch = self._batch(rows, chosen, training=False)
        while True:
            pieces = cut(chosen, lengths, self._validation_tokens(), self._unit)
            try:
                return (yield from self._pass(batch, pieces))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            if all(len(piece.rows) == self._unit for piece in pieces):
                raise no_room(max(len(row.tokens) for row in batch.rows))
            # A longer row is a slice by itself whatever the budget: halved each time, the others soon are too.
            longest = max(sum(lengths[row] for row in piece.rows) for piece in pieces)
            self._halve_validation(min(longest, self._validation_tokens()) - 1)

    def _validation_tokens(self) -> int:
        """Of a slice: no more than there is room for, and never more than before."""
        room = self._room.tokens
        if room is not None:
            self._halve_validation(room)
        return max(1, self._budget >> self._validation_halvings())

    def _validation_halvings(self) -> int:
        """How often they were halved by now. They stand beside those of the steps, under -n from step n's on."""
        return max((times for n, times in self._halvings.items() if -self.step <= n < 0), default=0)

    def _halve_validation(self, room: int) -> None:
        """Plan its slices, from now on, with at most `room` tokens."""
        while self._budget >> self._validation_halvings() > max(1, room):
            self._halvings[-self.step] = self._validation_halvings() + 1

    def _snapshot(self, kind: SnapshotKind, state: RunState) -> Snapshot:
        best = state.evaluations.best_step if self._config.early_stopping_patience else 0
        folder, files = self._saver.write(kind, self.step, best=best if best != self.step else 0)
        return Snapshot(
            kind=kind,
            step=self.step,
            epoch=self.plan.step(self.step - 1).epoch + 1 if self.step else 0,
            total_steps=self.total_steps,
            trained_tokens=self.trained_tokens,
            folder=folder,
            files=files,
            metrics=self._metrics,
            halvings=dict(self._halvings),
            state=state,
        )


def _mean_loss(sums: SliceResult) -> float | None:
    return sums.loss if sums.tokens else None


def _accuracy(sums: SliceResult) -> float | None:
    return sums.correct / sums.tokens if sums.tokens else None


def _prefixed(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in figures.items()}
