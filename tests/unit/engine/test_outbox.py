"""The order in which jobs hears of an attempt."""

from __future__ import annotations

from lathe.engine.model import AdapterRef, CheckpointReport, Progress, StepMetrics
from lathe.engine.outbox import Outbox


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 9, 1.5, 0.5, 1e-3, 100.0, 40, 0.25, 1.0, 1)


def checkpoint(step: int) -> CheckpointReport:
    return CheckpointReport(step, AdapterRef(f"step-{step}", "0"), metrics(step))


def test_a_checkpoint_waits_for_its_steps_and_what_it_gives_up_for_it() -> None:
    box = Outbox(rows=2)
    box.metrics.extend(map(metrics, (1, 2, 3)))
    box.checkpoints.extend(map(checkpoint, (2, 3)))
    box.dropped.append(2)
    first = box.next_report()
    assert ([row.step for row in first.metrics], [item.step for item in first.checkpoints]) == ([1, 2], [2])
    assert first.dropped_checkpoints == ()
    box.told(first)
    second = box.next_report()
    assert ([item.step for item in second.checkpoints], second.dropped_checkpoints) == ([3], (2,))
    assert box.pending() and not box.given_up
    box.told(second)
    assert not box.pending() and box.given_up == {2}


def test_what_came_while_a_report_was_on_its_way_stays() -> None:
    box = Outbox(rows=9, first=Progress(total_steps=9))
    report = box.next_report()
    assert report.total_steps == 9
    box.metrics.append(metrics(1))
    box.told(report)
    assert box.pending() and box.next_report() == Progress((metrics(1),))
    box.clear()
    assert not box.pending()
