"""What preference methods measure the trained model against: the model that the job began with.

It is the same base without the adapter, or, where the job goes on from a tuned model, with a frozen copy of that
model's adapter; no second base is held. A batch is scored the first time that it is met, whole, and its values are
kept in the snapshots: no pass over the data delays the first step, later epochs compute nothing again, and an attempt
that goes on after a loss has the same bits as one that was not stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from lathe.common.errors import DataLoss
from lathe.engine.batch import TrainRow
from lathe.engine.checkpoints import REFERENCE
from lathe.engine.recipes.recipe import Batch, Job, Recipe
from lathe.engine.recipes.turns import Turns


class Reference:
    """log p of the data's rows under the reference; NaN while a row has not been met."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._key = f"{job.key}/reference" if job.initial is not None else ""
        self._known = {
            "training": torch.full((len(job.data.training),), torch.nan, dtype=torch.float64),
            "validation": torch.full((len(job.data.validation),), torch.nan, dtype=torch.float64),
        }

    def begin(self) -> None:
        """Loads the frozen copy, where there is one."""
        if self._job.initial is not None:
            self._job.engine.load_reference(self._key, self._job.initial)

    def close(self) -> None:
        if self._key in self._job.engine.adapter_keys():
            self._job.engine.drop_adapter(self._key)

    def of(self, batch: Batch) -> Turns[list[float]]:
        """log p of each of the batch's rows."""
        known = self._known["training" if batch.training else "validation"]
        places = torch.tensor(batch.indices)
        if known[places].isnan().any():
            scores = yield from self.score(batch.rows)
            known[places] = torch.tensor(scores, dtype=torch.float64)
        return known[places].tolist()

    def score(self, rows: Sequence[TrainRow]) -> Turns[list[float]]:
        """log p of rows that are not the data's own; they are not remembered."""
        return (yield from self._job.score(rows, self._key))

    def save(self, folder: Path) -> tuple[str, ...]:
        (folder / REFERENCE).write_bytes(to_safetensors(self._known))
        return (REFERENCE,)

    def restore(self, folder: Path) -> None:
        """Raises DataLoss for a file that is missing, torn, or of other data."""
        try:
            stored = load_file(str(folder / REFERENCE))
        except (OSError, SafetensorError) as error:
            raise DataLoss(f"The checkpoint's {REFERENCE} cannot be read: {error}") from error
        if {name: value.shape for name, value in stored.items()} != {
            name: value.shape for name, value in self._known.items()
        }:
            raise DataLoss(f"The checkpoint's {REFERENCE} is of other data than this job's.")
        self._known = stored


class ReferencedRecipe(Recipe):
    """A method that measures the model against `reference`."""

    needs_initial = True

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.reference = Reference(job)

    def begin(self) -> Turns[None]:
        self.reference.begin()
        yield from ()

    def save(self, folder: Path) -> tuple[str, ...]:
        return self.reference.save(folder)

    def restore(self, folder: Path) -> None:
        self.reference.restore(folder)

    def close(self) -> None:
        self.reference.close()
