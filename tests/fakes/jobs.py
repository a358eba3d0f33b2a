"""What jobs needs from outside, in memory, and all of jobs wired on it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from lathe.common.db import Database
from lathe.common.diagnosis import Finding
from lathe.common.errors import FailedPrecondition, LatheError, NotFound
from lathe.common.metrics import Metrics
from lathe.jobs.changes import Changes
from lathe.jobs.contact import Contact
from lathe.jobs.directory import EngineDirectory
from lathe.jobs.estimating import EstimatesService, Estimator
from lathe.jobs.figures import NO_PRICES, Prices
from lathe.jobs.gangs import Gangs
from lathe.jobs.leftovers import Leftovers
from lathe.jobs.model import (
    ONE_CLASS,
    AdapterObject,
    BaseRef,
    EngineClasses,
    Job,
    Outcome,
    StepMetrics,
    TokenObject,
)
from lathe.jobs.policy import Limits
from lathe.jobs.ports import (
    AdapterRegistration,
    Audit,
    AuditState,
    DatasetInfo,
    DatasetState,
    EngineLaunch,
    LaunchedEngine,
    Quota,
    ResolvedModel,
    User,
)
from lathe.jobs.progress import Progress
from lathe.jobs.quotas import Quotas
from lathe.jobs.reconciler import Reconciler
from lathe.jobs.reports import Completion, ReportsService
from lathe.jobs.requests import JobRequest
from lathe.jobs.service import JobsService
from lathe.jobs.sharedclock import SharedClock
from lathe.jobs.steps import JobSteps
from lathe.jobs.store import SqlJobStore
from lathe.jobs.store.tables import metadata
from lathe.jobs.training import Method
from lathe.jobs.workers import Lease, Registration, WorkersService
from tests.fakes.clock import FakeClock
from tests.fakes.ids import FakeIds

BASE = BaseRef("tiny", "d" * 64, 135_000_000, ("q_proj", "v_proj"))
OTHER = BaseRef("other", "e" * 64, 135_000_000, ("q_proj",))
USER = User("acme", "member", "key_1")


@dataclasses.dataclass
class FakeDatasets:
    """Answers with what a test put into `infos` and `audits`; `down` makes every call raise it."""

    infos: dict[str, DatasetInfo] = dataclasses.field(default_factory=dict)
    audits: dict[str, Audit] = dataclasses.field(default_factory=dict)
    results: dict[str, bytes] = dataclasses.field(default_factory=dict)
    # (dataset, method) of every audit that was asked for.
    audited: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    # Those on which nothing is trained.
    # (dataset, whether as a held-out one, the validation file beside it) of each audit.
    asked: list[tuple[str, bool, str]] = dataclasses.field(default_factory=list)
    # What each word about tokens named.
    kept_tokens: list[list[str]] = dataclasses.field(default_factory=list)
    down: LatheError | None = None

    def add(
        self, dataset: str, rows: int = 100, state: DatasetState = DatasetState.READY, format_: str = ""
    ) -> None:
        self.infos[dataset] = DatasetInfo(dataset, "fine-tune", state, "a" * 64, format=format_)
        self.audits[dataset] = Audit(
            f"audit-{dataset}",
            AuditState.READY,
            TokenObject(f"blobs/{dataset}", "b" * 64),
            rows,
            input_tokens=rows * 50,
            trained_tokens=rows * 10,
            max_row_tokens=80,
        )

    def _check(self) -> None:
        if self.down is not None:
            raise self.down

    async def get(self, project: str, dataset: str, user: User) -> DatasetInfo:
        self._check()
        if dataset not in self.infos or user.project != project:
            raise NotFound(f"{dataset} was not found.")
        return self.infos[dataset]

    async def ensure_audit(
        self,
        project: str,
        dataset: str,
        base_model: str,
        method: str,
        *,
        held_out: bool,
        validation: str = "",
    ) -> Audit:
        self._check()
        if dataset not in self.audits:
            raise NotFound(f"{dataset} was not found.")
        self.audited.append((dataset, method))
        self.asked.append((dataset, held_out, validation))
        return self.audits[dataset]

    async def keep_tokens(self, digests: Sequence[str]) -> None:
        self._check()
        self.kept_tokens.append(list(digests))

    async def create_result_file(
        self, project: str, display_name: str, content: bytes, request_id: str
    ) -> str:
        self._check()
        self.results.setdefault(request_id, content)
        return f"file-{request_id}"


@dataclasses.dataclass
class FakeModels:
    models: dict[str, ResolvedModel] = dataclasses.field(
        default_factory=lambda: {
            name: ResolvedModel(base, True, methods=tuple(Method))
            for base in (BASE, OTHER)
            for name in (base.id, base.name)
        }
    )
    adapters: dict[str, AdapterRegistration] = dataclasses.field(default_factory=dict)
    refused: dict[str, LatheError] = dataclasses.field(default_factory=dict)
    # Job -> the folders that stayed when its files were swept.
    swept: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    down: LatheError | None = None

    async def resolve(self, project: str, model_id: str) -> ResolvedModel:
        if self.down is not None:
            raise self.down
        if model_id not in self.models:
            raise NotFound(f"{model_id} was not found.")
        return self.models[model_id]

    async def register_adapter(self, adapter: AdapterRegistration) -> None:
        if self.down is not None:
            raise self.down
        if adapter.object.prefix in self.refused:
            raise self.refused[adapter.object.prefix]
        self.adapters.setdefault(adapter.model_id, adapter)

    async def sweep_files(self, job: Job, kept: Sequence[str]) -> None:
        if self.down is not None:
            raise self.down
        self.swept[job.id] = sorted(kept)


@dataclasses.dataclass
class FakeAccounts:
    quota: Quota = dataclasses.field(default_factory=Quota)
    down: LatheError | None = None

    async def get_quota(self, project: str) -> Quota:
        if self.down is not None:
            raise self.down
        return self.quota


@dataclasses.dataclass
class FakeLauncher:
    """Processes that live until a test (or `stop`) ends them. `fails` makes every start raise it."""

    processes: dict[str, LaunchedEngine] = dataclasses.field(default_factory=dict)
    # Every start that there ever was.
    launches: dict[str, EngineLaunch] = dataclasses.field(default_factory=dict)
    fails: LatheError | None = None
    down: LatheError | None = None
    # Why it starts no engine of several workers.
    one_worker: str = ""
    # Calls to start and stop never answer.
    hangs: bool = False

    async def start(self, launch: EngineLaunch) -> None:
        await self._answer()
        if self.fails is not None:
            raise self.fails
        if launch.workers > 1 and self.one_worker:
            raise FailedPrecondition(self.one_worker)
        self.launches[launch.engine_id] = launch
        self.processes.setdefault(launch.engine_id, LaunchedEngine(launch.engine_id, running=True))

    async def list(self) -> list[LaunchedEngine]:
        if self.down is not None:
            raise self.down
        return [*self.processes.values()]

    async def stop(self, engine_id: str) -> None:
        await self._answer()
        self.processes.pop(engine_id, None)

    async def _answer(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()

    async def why_one_worker(self) -> str:
        if self.down is not None:
            raise self.down
        return self.one_worker

    async def check(self) -> Sequence[Finding]:
        if self.down is not None:
            return [Finding("launcher", False, self.down.message, "Start it.")]
        return [Finding("launcher", True, "Engines can start.")]

    async def close(self) -> None:
        self.processes.clear()

    def wait_for(self, engine_id: str, sentence: str) -> None:
        """The engine is not started yet, for this reason; none: it runs."""
        self.processes[engine_id] = LaunchedEngine(engine_id, True, waiting_for=sentence)

    def die(
        self, engine_id: str, status: str = "exit code 1", log: str = "boom", killed: bool = False
    ) -> None:
        self.processes[engine_id] = LaunchedEngine(engine_id, False, status, killed, log)


@dataclasses.dataclass
class World:
    """All of jobs but its doors, on one database."""

    store: SqlJobStore
    clock: FakeClock
    ids: FakeIds
    limits: Limits = dataclasses.field(default_factory=Limits)
    datasets: FakeDatasets = dataclasses.field(default_factory=FakeDatasets)
    models: FakeModels = dataclasses.field(default_factory=FakeModels)
    accounts: FakeAccounts = dataclasses.field(default_factory=FakeAccounts)
    launcher: FakeLauncher = dataclasses.field(default_factory=FakeLauncher)
    classes: EngineClasses = ONE_CLASS
    prices: Prices = NO_PRICES

    def __post_init__(self) -> None:
        self.datasets.add("file-1")
        self.start()

    def start(self) -> None:
        """Wire a process anew on the same database, as after a kill."""
        changes = Changes(self.clock)
        self.metrics = metrics = Metrics()
        self.contact = Contact(self.clock, 15.0)
        quotas = Quotas(self.accounts, self.clock, ttl_s=0.0)
        gangs = Gangs()
        gangs.launcher = self.launcher
        self.service = JobsService(
            self.store,
            self.accounts,
            self.models,
            self.datasets,
            changes,
            self.clock,
            self.ids,
            self.classes,
            gangs,
        )
        self.workers = WorkersService(
            self.store, quotas, changes, self.contact, self.clock, self.ids, metrics, classes=self.classes
        )
        self.reports = ReportsService(self.store, changes, self.clock, self.ids)
        self.reconciler = Reconciler(
            self.store,
            self.launcher,
            quotas,
            changes,
            self.contact,
            SharedClock(self.clock),
            self.ids,
            metrics,
            self.limits,
            classes=self.classes,
            patience_s=0.02,
        )
        self.estimator = Estimator(self.store, quotas, self.clock, self.prices, self.classes)
        self.estimates = EstimatesService(self.service, self.estimator)
        self.steps = JobSteps(self.store, self.datasets, self.models, changes, self.clock, self.estimator)
        self.leftovers = Leftovers(self.store, self.models, self.clock)
        self.directory = EngineDirectory(
            self.store, self.models, changes, self.contact, self.clock, self.limits, self.classes
        )

    def replica(self) -> World:
        """Another process of jobs on the same database and the same launcher."""
        return dataclasses.replace(self)

    async def create(self, **fields: object) -> Job:
        request = JobRequest(project="acme", model="tiny", training="file-1")
        user = dataclasses.replace(USER, project=str(fields.get("project", "acme")))
        return await self.service.create(dataclasses.replace(request, **fields), user)  # type: ignore[arg-type]

    async def queued(self, **fields: object) -> Job:
        job = await self.create(**fields)
        await self.steps.run_once()
        return await self.job(job.id)

    async def job(self, job_id: str) -> Job:
        async with self.store.read() as session:
            job = await session.job(job_id)
        assert job is not None
        return job

    async def messages(self, job_id: str) -> list[str]:
        async with self.store.read() as session:
            return [event.message for event in await session.events(job_id, after=0, limit=1000)]

    async def register(self, engine_id: str = "eng-a", base: BaseRef = BASE, max_attempts: int = 1) -> None:
        await self.workers.register(
            Registration(engine_id, base, f"{engine_id}:1", max_attempts, 8, "cpu", 2, "0.1.0")
        )

    async def leased(self, engine_id: str = "eng-a", **fields: object) -> Lease:
        await self.queued(**fields)
        await self.register(engine_id)
        lease = await self.workers.lease(engine_id)
        assert lease is not None
        return lease

    async def report(self, lease: Lease, *steps: int, **fields: object) -> None:
        rows = [measured(step) for step in steps]
        progress = Progress(lease.attempt.id, lease.attempt.lease_token, rows, total_steps=10)
        await self.reports.report(dataclasses.replace(progress, **fields))  # type: ignore[arg-type]

    async def complete(self, lease: Lease, outcome: Outcome, **fields: object) -> None:
        final = AdapterObject(f"{lease.attempt.prefix}final", "f" * 64)
        done = Completion(
            lease.attempt.id,
            lease.attempt.lease_token,
            outcome,
            final if outcome is Outcome.SUCCEEDED else None,
        )
        await self.reports.complete(dataclasses.replace(done, **fields))  # type: ignore[arg-type]

    async def pass_time(self, seconds: float, step: float = 1.0) -> None:
        """Reconcile every `step` seconds of it."""
        for _ in range(int(seconds / step)):
            self.clock.tick(step)
            await self.reconciler.run_once()


def measured(step: int, loss: float = 1.5) -> StepMetrics:
    return StepMetrics(step, 10, loss, 0.5, trained_tokens=7, step_seconds=2.0, epoch=1)


@asynccontextmanager
async def a_world(
    url: str = "sqlite+aiosqlite://", limits: Limits | None = None, classes: EngineClasses = ONE_CLASS
) -> AsyncIterator[World]:
    """A world on a fresh database; in memory by default."""
    database = Database(url)
    async with database.write() as connection:
        await connection.run_sync(metadata.create_all)
    clock, ids = FakeClock(), FakeIds()
    try:
        yield World(SqlJobStore(database, clock, ids), clock, ids, limits or Limits(), classes=classes)
    finally:
        await database.close()


def sqlite_url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'jobs.sqlite'}"
