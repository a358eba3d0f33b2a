"""Where a run begins and what it leaves behind: its adapter from nothing, from another one or from a checkpoint, and
its snapshots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile, rmtree

from lathe.common.clock import Clock
from lathe.common.errors import DataLoss
from lathe.engine.checkpoints import BEST
from lathe.engine.full import FullSpec
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import RunState, Snapshot, SnapshotKind, TrainingConfig, is_disk_full
from lathe.engine.ports import TrainVerbs
from lathe.engine.recipes.recipe import Recipe
from lathe.engine.recipes.turns import Blocked, T, Turns

DISK_FULL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Start:
    """Where an attempt begins: a checkpoint of an earlier one, verified and in a local folder."""

    folder: Path
    step: int
    trained_tokens: int = 0
    halvings: tuple[tuple[int, int], ...] = ()
    state: RunState = field(default_factory=RunState)


class Saver:
    """The files of one run. saved_step: the last step that a snapshot was written of."""

    def __init__(
        self,
        engine: TrainVerbs,
        key: str,
        config: TrainingConfig,
        recipe: Recipe,
        *,
        folder: Callable[[SnapshotKind, int], Path],
        clock: Clock,
        start: Start | None,
        initial: Path | None,
        interval_s: float,
    ) -> None:
        self._engine, self._key, self._config, self._recipe = engine, key, config, recipe
        self._folder, self._clock, self._interval = folder, clock, interval_s
        self._start, self._initial = start, initial
        self._best: dict[int, Path] = {}
        self.saved_step = start.step if start is not None else 0
        self._saved_at = clock.monotonic()

    def begin(self) -> None:
        """Makes the adapter. Raises DataLoss for a checkpoint whose parts are not of one step."""
        if self._start is not None:
            self._go_on(self._start)
        elif self._initial is not None:
            config = self._config
            self._engine.continue_adapter(self._key, self._initial, config.seed, config.lora_dropout)
        else:
            self._engine.create_adapter(self._key, spec_of(self._config), self._config.seed)

    def is_due(self) -> bool:
        """Whether a resume checkpoint is."""
        return self._clock.monotonic() - self._saved_at >= self._interval

    def write(self, kind: SnapshotKind, step: int, *, best: int = 0) -> tuple[Path, tuple[str, ...]]:
        """Writes the files of a snapshot; answers their folder and names. Raises OSError.

        best: the step of the best adapter, where that is another one: it is the final one, and the others bring it
        along.
        """
        folder = self._folder(kind, step)
        try:
            files = self._write(folder, kind, best)
        except OSError:
            # The disk is full, most likely: half a snapshot would take what room there is.
            rmtree(folder, ignore_errors=True)
            raise
        self.saved_step, self._saved_at = step, self._clock.monotonic()
        return folder, files

    def keep_best(self, step: int) -> Turns[None]:
        """Keeps the adapter as the best so far, beside the one before."""
        self._best[step] = yield from _patiently(lambda: self._save_best(step))

    def forget_best_but(self, step: int) -> None:
        for other in [other for other in self._best if other != step]:
            rmtree(self._best.pop(other), ignore_errors=True)

    def saved(self, make: Callable[[], Snapshot]) -> Turns[None]:
        """Tells of the snapshot; waits while the disk is full."""
        yield (yield from _patiently(make))

    def saved_if_room(self, make: Callable[[], Snapshot]) -> Turns[None]:
        """Tells of the snapshot, or leaves it out while the disk is full."""
        try:
            snapshot = make()
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._saved_at = self._clock.monotonic()
        else:
            yield snapshot

    def _go_on(self, start: Start) -> None:
        done = self._engine.restore(self._key, start.folder)
        if done != start.step:
            raise DataLoss(f"The checkpoint says step {start.step}, its optimizer {done}.")
        self._recipe.restore(start.folder)
        best = start.state.evaluations.best_step
        if best == start.step and best:
            self._best[best] = self._save_best(best)
        elif best:
            self._best[best] = self._folder(SnapshotKind.BEST, best)
            _copy(start.folder, self._best[best], prefix=BEST)

    def _write(self, folder: Path, kind: SnapshotKind, best: int) -> tuple[str, ...]:
        if kind is SnapshotKind.FINAL and best:
            return _copy(self._best[best], folder)
        resumable = kind in {SnapshotKind.EPOCH, SnapshotKind.RESUME}
        files = self._engine.save(
            self._key, folder, with_optimizer=resumable, base_model=self._config.base_model
        )
        if resumable:
            files += self._recipe.save(folder)
            if best:
                files += _copy(self._best[best], folder, to=BEST)
        return files

    def _save_best(self, step: int) -> Path:
        folder = self._folder(SnapshotKind.BEST, step)
        self._engine.save(self._key, folder, with_optimizer=False, base_model=self._config.base_model)
        return folder


def spec_of(config: TrainingConfig) -> LoraSpec | FullSpec:
    """What the configuration asks to be trained."""
    if config.full_parameter:
        return FullSpec()
    return LoraSpec(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_dropout=config.lora_dropout,
    )


def _patiently(write: Callable[[], T]) -> Turns[T]:
    """What `write` answers; it is tried again while the disk is full."""
    while True:
        try:
            return write()
        except OSError as error:
            if not is_disk_full(error):
                raise
        yield Blocked(DISK_FULL_WAIT_S, "the engine's disk is full")


def _copy(source: Path, target: Path, *, prefix: str = "", to: str = "") -> tuple[str, ...]:
    """Copies the files whose name begins with `prefix`, which is replaced by `to`; answers the new names."""
    target.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(prefix):
            names.append(to + path.name.removeprefix(prefix))
            copyfile(path, target / names[-1])
    return tuple(names)
