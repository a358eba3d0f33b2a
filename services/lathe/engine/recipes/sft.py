"""Supervised LoRA: for each step of the plan, for each of its slices forward_backward, then optim_step.

The recipe is a generator, so that the model thread can sample between any two of its turns. What it computes
depends on the data, the configuration and the slice plan alone: never on time, other jobs or open streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile, rmtree

import torch

from lathe.common.clock import Clock
from lathe.common.errors import DataLoss, FailedPrecondition, InvalidArgument
from lathe.engine.engine import SliceResult, TrainRow, TrainSlice, trained_tokens
from lathe.engine.lora_config import LoraSpec, read_spec
from lathe.engine.model import SlicePlan, Snapshot, SnapshotKind, StepMetrics, TrainingConfig, is_disk_full
from lathe.engine.optim import Schedule
from lathe.engine.packing import Slice, Step, cut, halve, slice_plan
from lathe.engine.ports import TrainVerbs

# Between full validations (one an epoch), one batch is validated about this often over the whole job.
VALIDATIONS_PER_JOB = 20
DISK_FULL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class SliceDone:
    """One turn of the model thread went to this many tokens."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Blocked:
    """Nothing can be done for this attempt now; go on with it in `seconds`."""

    seconds: float
    reason: str


RecipeEvent = SliceDone | StepMetrics | Snapshot | Blocked


@dataclass(frozen=True, slots=True)
class Start:
    """Where an attempt begins: a checkpoint of an earlier one, verified and in a local folder."""

    folder: Path
    step: int
    trained_tokens: int = 0
    halvings: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SftData:
    """Rendered rows. validation may be empty."""

    training: Sequence[TrainRow]
    validation: Sequence[TrainRow] = ()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no room; torch reports the CPU's as a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class SftRun:
    """One attempt. `turns` does the work; `snapshot` saves the last whole step at any moment between turns."""

    def __init__(
        self,
        *,
        engine: TrainVerbs,
        key: str,
        data: SftData,
        config: TrainingConfig,
        plan: SlicePlan,
        folder: Callable[[SnapshotKind, int], Path],
        clock: Clock,
        start: Start | None = None,
        initial_adapter: Path | None = None,
        checkpoint_interval_s: float = 60.0,
    ) -> None:
        """folder(kind, step): where a snapshot goes. initial_adapter: PEFT's folder to begin from.

        Raises InvalidArgument for data or a configuration that cannot be trained.
        """
        if not data.training:
            raise InvalidArgument("The training file has no rows.", reason="INVALID_TRAINING_FILE")
        self._engine, self._key, self._data, self._config = engine, key, data, config
        self._lengths = [len(row.tokens) for row in data.training]
        self._trained = [trained_tokens(row) for row in data.training]
        self._budget = plan.train_tokens_per_slice
        self.plan = slice_plan(
            self._lengths,
            n_epochs=config.n_epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            max_tokens_per_slice=self._budget,
        )
        self.total_steps = self.plan.total_steps
        self._schedule = Schedule(
            "cosine", config.learning_rate, self.total_steps, round(config.warmup_fraction * self.total_steps)
        )
        self._folder, self._clock, self._interval = folder, clock, checkpoint_interval_s
        self._start, self._initial = start, initial_adapter
        self.step = start.step if start is not None else 0
        self.trained_tokens = start.trained_tokens if start is not None else 0
        self._halvings: dict[int, int] = dict(start.halvings) if start is not None else {}
        self._saved_step = self.step
        self._saved_at = clock.monotonic()
        self._metrics: StepMetrics | None = None

    def turns(self) -> Generator[RecipeEvent, None, None]:
        """The whole attempt, a turn at a time. Raises FailedPrecondition when the loss is no number any more."""
        self._begin()
        yield SliceDone(0)
        for index in range(self.step, self.total_steps):
            step = self.plan.step(index)
            metrics = yield from self._train(step)
            if self._data.validation:
                metrics = yield from self._validate(step, metrics)
            self._metrics = metrics
            yield metrics
            if step.ends_epoch:
                yield from self._saved(SnapshotKind.EPOCH)
            elif self._clock.monotonic() - self._saved_at >= self._interval:
                yield from self._saved(SnapshotKind.RESUME)
        yield from self._saved(SnapshotKind.FINAL)

    def snapshot(self) -> Snapshot | None:
        """Save the last whole step for a later attempt; None when it is saved already or nothing was done."""
        return self._save(SnapshotKind.RESUME) if self.step > self._saved_step else None

    def close(self) -> None:
        """Forget the adapter."""
        if self._key in self._engine.adapter_keys():
            self._engine.drop_adapter(self._key)

    def _begin(self) -> None:
        config, engine = self._config, self._engine
        if self._start is not None:
            done = engine.restore(self._key, self._start.folder)
            if done != self._start.step:
                raise DataLoss(f"The checkpoint says step {self._start.step}, its optimizer {done}.")
            return
        lora = LoraSpec(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
        if self._initial is not None:
            lora = read_spec(self._initial)
        engine.create_adapter(self._key, lora, config.seed)
        if self._initial is not None:
            self._take_over(self._initial)

    def _take_over(self, initial: Path) -> None:
        # A fresh optimizer with given weights is exactly a snapshot of step 0 whose weights are replaced.
        fresh = self._folder(SnapshotKind.RESUME, 0)
        self._engine.save(self._key, fresh, with_optimizer=True)
        copyfile(initial / "adapter_model.safetensors", fresh / "adapter_model.safetensors")
        self._engine.drop_adapter(self._key)
        self._engine.restore(self._key, fresh)
        rmtree(fresh)

    def _train(self, step: Step) -> Generator[RecipeEvent, None, StepMetrics]:
        started = self._clock.monotonic()
        batch_tokens = sum(self._trained[row] for row in step.rows)
        if not batch_tokens:
            raise InvalidArgument(f"No token of step {step.index + 1}'s rows is trained.")
        while True:
            try:
                total = yield from self._accumulate(step, batch_tokens)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(step)
        lr = self._schedule.lr(step.index)
        loss = total.loss_sum / total.tokens
        norm = self._engine.optim_step(
            self._key, lr, clip=self._config.max_grad_norm, weight_decay=self._config.weight_decay
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FailedPrecondition(
                f"The loss is not a number any more at step {step.index + 1} of {self.total_steps}; "
                f"try a lower learning_rate_multiplier.",
                reason="TRAINING_DIVERGED",
            )
        self.step = step.index + 1
        self.trained_tokens += total.tokens
        seconds = self._clock.monotonic() - started
        return StepMetrics(
            step=self.step,
            total_steps=self.total_steps,
            train_loss=loss,
            train_mean_token_accuracy=total.correct / total.tokens,
            learning_rate=lr,
            tokens_per_second=total.input_tokens / seconds if seconds > 0 else 0.0,
            trained_tokens=total.tokens,
            step_seconds=seconds,
            grad_norm=norm,
            epoch=step.epoch + 1,
        )

    def _accumulate(self, step: Step, batch_tokens: int) -> Generator[RecipeEvent, None, SliceResult]:
        results = []
        for piece in self._pieces(step):
            rows = tuple(self._data.training[row] for row in piece.rows)
            results.append(self._engine.forward_backward(self._key, TrainSlice(rows, batch_tokens)))
            yield SliceDone(results[-1].input_tokens)
        return _sum(results)

    def _pieces(self, step: Step) -> tuple[Slice, ...]:
        pieces = step.slices
        for _ in range(self._halvings.get(step.index, 0)):
            pieces = tuple(half for piece in pieces for half in halve(piece))
        return pieces

    def _halve(self, step: Step) -> None:
        """Plan the step again with half slices, recorded so that a replay cuts the same."""
        self._engine.zero_grad(self._key)
        if all(len(piece.rows) == 1 for piece in self._pieces(step)):
            longest = max(self._lengths[row] for row in step.rows)
            raise FailedPrecondition(
                f"A row of {longest} tokens does not fit into the engine's memory; shorten it, "
                f"or use a bigger machine.",
                reason="OUT_OF_MEMORY",
            )
        self._halvings[step.index] = self._halvings.get(step.index, 0) + 1

    def _validate(self, step: Step, metrics: StepMetrics) -> Generator[RecipeEvent, None, StepMetrics]:
        every = max(1, self.total_steps // VALIDATIONS_PER_JOB)
        if not step.ends_epoch and (step.index + 1) % every:
            return metrics
        size, count = self._config.batch_size, len(self._data.validation)
        first = (step.index // every) % -(-count // size) * size
        part = yield from self._evaluate(range(first, min(first + size, count)))
        metrics = replace(
            metrics,
            valid_loss=part.loss_sum / part.tokens if part.tokens else None,
            valid_mean_token_accuracy=part.correct / part.tokens if part.tokens else None,
        )
        if step.ends_epoch:
            whole = yield from self._evaluate(range(count))
            metrics = replace(
                metrics,
                full_valid_loss=whole.loss_sum / whole.tokens if whole.tokens else None,
                full_valid_mean_token_accuracy=whole.correct / whole.tokens if whole.tokens else None,
            )
        return metrics

    def _evaluate(self, chosen: range) -> Generator[RecipeEvent, None, SliceResult]:
        rows = self._data.validation
        results = []
        for piece in cut(chosen, [len(row.tokens) for row in rows], self._budget):
            part = tuple(rows[row] for row in piece.rows)
            tokens = sum(trained_tokens(row) for row in part)
            results.append(self._engine.evaluate(self._key, TrainSlice(part, max(1, tokens))))
            yield SliceDone(results[-1].input_tokens)
        return _sum(results)

    def _saved(self, kind: SnapshotKind) -> Generator[RecipeEvent, None, None]:
        """The snapshot. While the disk is full it waits, but for a resume checkpoint, which is left out."""
        while True:
            try:
                snapshot = self._save(kind)
            except OSError as error:
                if not is_disk_full(error):
                    raise
            else:
                yield snapshot
                return
            if kind is SnapshotKind.RESUME:
                self._saved_at = self._clock.monotonic()
                return
            yield Blocked(DISK_FULL_WAIT_S, "the engine's disk is full")

    def _save(self, kind: SnapshotKind) -> Snapshot:
        folder = self._folder(kind, self.step)
        files = self._engine.save(
            self._key,
            folder,
            with_optimizer=kind is not SnapshotKind.FINAL,
            base_model=self._config.base_model,
        )
        self._saved_step, self._saved_at = self.step, self._clock.monotonic()
        epoch = self.plan.step(self.step - 1).epoch + 1 if self.step else 0
        return Snapshot(
            kind=kind,
            step=self.step,
            epoch=epoch,
            total_steps=self.total_steps,
            trained_tokens=self.trained_tokens,
            folder=folder,
            files=files,
            metrics=self._metrics,
            halvings=dict(self._halvings),
        )


def _sum(results: Sequence[SliceResult]) -> SliceResult:
    return SliceResult(
        loss_sum=math.fsum(result.loss_sum for result in results),
        tokens=sum(result.tokens for result in results),
        correct=sum(result.correct for result in results),
        input_tokens=sum(result.input_tokens for result in results),
    )
