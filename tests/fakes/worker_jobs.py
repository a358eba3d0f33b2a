"""jobs as an engine sees it: one queue of attempts, fencing tokens, leases by a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lathe.common.clock import Clock
from lathe.common.errors import Aborted, LatheError
from lathe.engine.model import (
    Action,
    AdapterRef,
    Attempt,
    AttemptError,
    CheckpointReport,
    EngineReceipt,
    HeartbeatReply,
    HeldLease,
    Note,
    Outcome,
    Progress,
    Registration,
    SlicePlan,
    StepMetrics,
    Terms,
)


@dataclass
class FakeJob:
    """What jobs keeps of one job: metric rows by step, checkpoints by step, and how attempts ended."""

    metrics: dict[int, StepMetrics] = field(default_factory=dict)
    checkpoints: dict[int, CheckpointReport] = field(default_factory=dict)
    plan: SlicePlan | None = None
    total_steps: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    final: AdapterRef | None = None
    error: AttemptError | None = None
    receipt: EngineReceipt | None = None
    prefixes: list[str] = field(default_factory=list)
    # Steps and checkpoints in the order in which a user's events tell them.
    told: list[int | str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def tell(self, progress: Progress) -> None:
        """As jobs does it: a checkpoint's own metrics count as its step's; within a report all go by step."""
        rows = [*progress.metrics, *(item.metrics for item in progress.checkpoints if item.metrics)]
        fresh = {row.step for row in rows} - set(self.metrics)
        saved = {item.step for item in progress.checkpoints} - set(self.checkpoints)
        for step in sorted(fresh | saved):
            self.told += [step] if step in fresh else []
            self.told += [f"checkpoint {step}"] if step in saved else []
        self.notes += [note for note in progress.notes if note not in self.notes]
        self.metrics |= {row.step: row for row in rows}
        self.checkpoints |= {item.step: item for item in progress.checkpoints}
        for step in progress.dropped_checkpoints:
            self.checkpoints.pop(step, None)


class FakeJobs:
    """Set `outage` to an error and every call raises it. `directives` go out with the next heartbeat."""

    def __init__(self, clock: Clock, terms: Terms | None = None) -> None:
        self._clock = clock
        self._terms = terms or Terms(3.0, 15.0)
        self.outage: LatheError | None = None
        # What every report is answered with while it is set.
        self.refusal: LatheError | None = None
        self.job = FakeJob()
        self.waiting: list[Attempt] = []
        self.directives: dict[str, Action] = {}
        self.registered: list[Registration] = []
        self.deregistered: list[str] = []
        self.heartbeats: list[float] = []
        self.shut_down = False
        self.reports = 0
        self._tokens: dict[str, str] = {}

    def offer(self, attempt: Attempt) -> None:
        """Queue an attempt; the plan and the prefixes of earlier ones go with it."""
        earlier = tuple(reversed(self.job.prefixes))
        self.waiting.append(replace(attempt, slice_plan=self.job.plan, earlier_prefixes=earlier))

    def revoke(self, attempt_id: str) -> None:
        """The lease has run out."""
        self._tokens.pop(attempt_id, None)

    async def register(self, registration: Registration) -> Terms:
        self._reachable()
        self.registered.append(registration)
        return self._terms

    async def heartbeat(
        self,
        engine_id: str,
        leases: Sequence[HeldLease],
        *,
        active_sequences: int,
        memory_bytes: int,
        draining: bool,
    ) -> HeartbeatReply:
        self._reachable()
        self.heartbeats.append(self._clock.monotonic())
        lost = [lease for lease in leases if self._tokens.get(lease.attempt_id) != lease.lease_token]
        directives = [(lease.attempt_id, Action.LEASE_LOST) for lease in lost]
        directives += [(attempt, action) for attempt, action in self.directives.items()]
        return HeartbeatReply(tuple(directives), False, self.shut_down)

    async def lease(self, engine_id: str) -> Attempt | None:
        self._reachable()
        if not self.waiting:
            return None
        attempt = self.waiting.pop(0)
        self._tokens[attempt.attempt_id] = attempt.lease_token
        self.job.prefixes.append(attempt.output_prefix)
        return attempt

    async def report(self, lease: HeldLease, progress: Progress) -> None:
        self._reachable()
        self._check(lease)
        if self.refusal is not None:
            raise self.refusal
        self.reports += 1
        self.job.tell(progress)
        self.job.plan = self.job.plan or progress.slice_plan
        self.job.total_steps = self.job.total_steps or progress.total_steps

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
    ) -> None:
        self._reachable()
        self._check(lease)
        self.revoke(lease.attempt_id)
        self.job.outcomes.append(outcome)
        self.job.final, self.job.error, self.job.receipt = final_adapter, error, receipt

    async def deregister(self, engine_id: str) -> None:
        self._reachable()
        self.deregistered.append(engine_id)

    def _reachable(self) -> None:
        if self.outage is not None:
            raise self.outage

    def _check(self, lease: HeldLease) -> None:
        if self._tokens.get(lease.attempt_id) != lease.lease_token:
            raise Aborted("The lease token is not valid any more.")
