"""What an attempt has still to tell jobs. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lathe.engine.model import CheckpointReport, Note, Progress, StepMetrics


@dataclass(slots=True)
class Outbox:
    """Everything in order; told twice where an answer was lost.

    first: the plan, which goes with the first report. dropped: steps of checkpoints that are given up; given_up: those
    that jobs knows to be. rows: of metrics, at most, in one report.
    """

    rows: int
    first: Progress | None = None
    metrics: deque[StepMetrics] = field(default_factory=deque)
    notes: deque[Note] = field(default_factory=deque)
    checkpoints: deque[CheckpointReport] = field(default_factory=deque)
    dropped: deque[int] = field(default_factory=deque)
    given_up: set[int] = field(default_factory=set)

    def pending(self) -> bool:
        waiting = self.metrics or self.notes or self.checkpoints or self.dropped
        return bool(waiting) or self.first is not None

    def next_report(self) -> Progress:
        """What to tell now; `told` takes it out."""
        rows, checkpoints = tuple(self.metrics)[: self.rows], tuple(self.checkpoints)
        if len(rows) < len(self.metrics):
            # A checkpoint brings its step's metrics: it must not come before the steps that lead to it.
            checkpoints = tuple(item for item in checkpoints if item.step <= rows[-1].step)
        # One that is given up may be among those that were not told of yet.
        dropped = tuple(self.dropped) if len(checkpoints) == len(self.checkpoints) else ()
        first = self.first or Progress()
        return Progress(rows, checkpoints, first.slice_plan, first.total_steps, tuple(self.notes), dropped)

    def told(self, report: Progress) -> None:
        """jobs has the report that `next_report` gave; more may have come since."""
        self.first = None
        for queue, count in (
            (self.metrics, len(report.metrics)),
            (self.notes, len(report.notes)),
            (self.checkpoints, len(report.checkpoints)),
            (self.dropped, len(report.dropped_checkpoints)),
        ):
            for _ in range(count):
                queue.popleft()
        self.given_up.update(report.dropped_checkpoints)

    def clear(self) -> None:
        """Nothing more is told."""
        self.first = None
        for queue in (self.metrics, self.notes, self.checkpoints, self.dropped):
            queue.clear()
