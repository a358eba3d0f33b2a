"""A job's progress on a terminal: a bar, the loss falling, tokens per second; plain lines where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lathe.cli.estimates import estimate_lines
from lathe.cli.output import state_word
from lathe.v1 import jobs_pb2 as pb

_TICKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """The values as a row of blocks, the highest full; at most `width`, each then the mean of its share."""
    if not values:
        return ""
    if len(values) > width:
        edges = [index * len(values) // width for index in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_TICKS[round((value - low) / span * (len(_TICKS) - 1))] for value in values)


def metrics_line(metrics: pb.StepMetrics) -> str:
    """One step in words."""
    parts = [
        f"step {metrics.step}/{metrics.total_steps}",
        f"loss {metrics.train_loss:.3f}",
        f"accuracy {metrics.train_mean_token_accuracy:.3f}",
    ]
    if metrics.HasField("full_valid_loss"):
        parts.append(f"validation loss {metrics.full_valid_loss:.3f}")
    elif metrics.HasField("valid_loss"):
        parts.append(f"validation loss {metrics.valid_loss:.3f}")
    if "rewards/margins" in metrics.figures:
        parts.append(f"margin {metrics.figures['rewards/margins']:.3f}")
    parts.append(f"{metrics.tokens_per_second:,.0f} tokens/s")
    return ", ".join(parts)


class JobView:
    """Shows updates of one job while inside. Off a terminal each event is a line."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._losses: list[float] = []
        self._metrics: pb.StepMetrics | None = None
        self._valid: float | None = None
        self._job = pb.Job()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=8, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, update: pb.WatchJobResponse) -> None:
        """Take in a message of WatchJob."""
        if update.job.HasField("estimate") and not self._job.HasField("estimate") and not update.job.step:
            for line in estimate_lines(update.job.estimate):
                self._console.print(Text(line, style="dim"), soft_wrap=True)
        self._job = update.job
        for event in update.events:
            self._take(event)
        if self._live is not None:
            self._live.update(self._panel())

    def _take(self, event: pb.JobEvent) -> None:
        if event.type != pb.EVENT_TYPE_METRICS:
            self._console.print(Text(event.message, style="dim"))
            return
        self._losses.append(event.metrics.train_loss)
        self._metrics = event.metrics
        if event.metrics.HasField("full_valid_loss"):
            self._valid = event.metrics.full_valid_loss
        if self._live is None:
            self._console.print(Text(metrics_line(event.metrics)), soft_wrap=True)

    def _panel(self) -> Group:
        job, metrics = self._job, self._metrics
        head = Text(f"{state_word(job)}: {job.state_reason}", style="bold")
        if metrics is None:
            return Group(head)
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, metrics.total_steps), completed=metrics.step, width=_WIDTH)
        grid.add_row("steps", bar, f"{metrics.step}/{metrics.total_steps}, epoch {metrics.epoch}")
        grid.add_row(
            "loss", Text(sparkline(self._losses)), f"{self._losses[0]:.3f} → {metrics.train_loss:.3f}"
        )
        valid = "" if self._valid is None else f"validation loss {self._valid:.3f}, "
        accuracy = f"{valid}token accuracy {metrics.train_mean_token_accuracy:.3f}"
        grid.add_row("", accuracy, f"{metrics.tokens_per_second:,.0f} tokens/s")
        return Group(head, grid)
