"""An engine as a process: the wiring, in order. `python -m lathe.engine.main`, started by a launcher."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from threading import Thread

from lathe import __version__
from lathe.common.clock import Clock, SystemClock
from lathe.common.errors import LatheError, Unavailable
from lathe.common.metrics import Metrics
from lathe.common.objectstore.base import ObjectStore
from lathe.common.objectstore.factory import open_store
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.dialer import Dialer
from lathe.common.rpc.server import Registration, RpcServer, build_server
from lathe.common.service import RunningService, run_service
from lathe.engine.adaptercache import AdapterCache
from lathe.engine.basecache import ensure_base, work_folder
from lathe.engine.engine import Engine
from lathe.engine.jobs_client import GrpcJobs
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.memory import MemoryBook
from lathe.engine.model import Note, SlicePlan, TrainingConfig
from lathe.engine.model import Registration as EngineRegistration
from lathe.engine.preparing import AttemptSettings
from lathe.engine.receipt import environment
from lathe.engine.recipes.preflight import Memory
from lathe.engine.recipes.samples import Speech
from lathe.engine.recipes.saving import spec_of
from lathe.engine.rows import read_rows
from lathe.engine.servicer import EngineServicer, Serving
from lathe.engine.settings import EngineSettings
from lathe.engine.worker import Worker, WorkerSettings
from lathe.text.tokenizer import Tokenizer
from lathe.v1.engine_pb2_grpc import add_EngineServiceServicer_to_server

logger = logging.getLogger(__name__)

# A turn is short; a thread that is still busy after this ends with the process.
STOP_S = 30.0

Leave = Callable[[], None]


def stop_this_process() -> None:
    """Go the way that SIGTERM goes."""
    signal.raise_signal(signal.SIGTERM)


def keep_sigterm() -> None:
    """Make SIGTERM Python's again. In the main thread.

    Ray puts a handler of its own over it, abseil's for crashes: SIGABRT ends the process three seconds later, in the
    middle of its drain.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)
        signal.siginterrupt(signal.SIGTERM, False)


class ModelThread:
    """Loads the model and then runs the loop, all in one thread: torch's settings are partly per thread."""

    def __init__(
        self, load: Callable[[], Engine], loop_of: Callable[[Engine], ModelLoop], broke: Leave
    ) -> None:
        self._load, self._loop_of, self._broke = load, loop_of, broke
        self._loaded: Future[tuple[Engine, ModelLoop]] = Future()
        self._loop: ModelLoop | None = None
        self._thread = Thread(target=self._run, name="model", daemon=True)

    async def start(self) -> tuple[Engine, ModelLoop]:
        """Raises what loading raised, such as InvalidArgument for an architecture that is not supported."""
        self._thread.start()
        return await asyncio.wrap_future(self._loaded)

    def stop(self) -> None:
        """End the loop after its current turn. Blocks until then."""
        if self._loop is not None:
            self._loop.stop()
            self._thread.join(STOP_S)

    def _run(self) -> None:
        try:
            engine = self._load()
            self._loop = self._loop_of(engine)
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result((engine, self._loop))
        try:
            self._loop.run()
        except BaseException:
            logger.exception("the model thread broke")
            self._broke()


@asynccontextmanager
async def running(
    settings: EngineSettings,
    metrics: Metrics,
    *,
    clock: Clock | None = None,
    leave: Leave = stop_this_process,
) -> AsyncIterator[RunningService]:
    """An engine, registered with jobs or trying to be. NOT_SERVING while it loads; leaving it drains.

    leave: called when there is a reason to end (jobs says so or is gone, the parent died, Drain). Raises
    LatheErrors when the base model cannot be had or loaded.
    """
    os.nice(settings.nice)
    with work_folder(settings.cache_folder, settings.engine_id) as work:
        async with _running(settings, metrics, work, clock or SystemClock(), leave) as service:
            yield service


@asynccontextmanager
async def _running(
    settings: EngineSettings, metrics: Metrics, work: Path, clock: Clock, leave: Leave
) -> AsyncIterator[RunningService]:
    store = open_store(settings.store)
    shutdown = Shutdown(settings.drain_grace_s, leave)
    servicer = EngineServicer(lambda: secrets.randbits(63), shutdown.request)
    server = _server(settings, servicer, metrics)
    await server.start()
    await server.set_serving(False)
    limits = LoopLimits(
        settings.max_sequences,
        settings.max_waiting,
        fused_tokens=settings.pass_tokens(),
        fused_slowdown=settings.fused_slowdown,
        decode_steps=settings.decode_steps_per_pass,
    )
    try:
        folder = await _base_folder(settings, store, clock)
        thread = ModelThread(
            partial(_load, settings, folder, leave),
            lambda engine: ModelLoop(engine, clock, limits, metrics),
            leave,
        )
        engine, loop = await thread.start()
        keep_sigterm()
    except BaseException:
        await server.stop(0)
        raise
    channel = Dialer.of_engine(settings.rpc).connect(settings.jobs_address)
    worker = _worker(
        settings,
        engine,
        loop,
        jobs=GrpcJobs(channel),
        store=store,
        clock=clock,
        port=server.port,
        work=work,
        speech=_speech(folder),
    )
    adapters = AdapterCache(store, loop, settings.cache_folder, settings.max_adapters, clock)
    servicer.attach(_serving(settings, engine, loop, adapters, worker))
    await server.set_serving(True)
    working = asyncio.create_task(_work(worker, shutdown))
    try:
        yield RunningService("engine", server.port, server.health_port)
    finally:
        await server.set_serving(False)
        servicer.draining = True
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await asyncio.gather(
            worker.drain(shutdown.grace_s, report=shutdown.jobs_listens),
            _streams_end(loop, clock, shutdown.grace_s),
        )
        shutdown.done()
        await asyncio.to_thread(thread.stop)
        await server.stop()
        await channel.close()


class Shutdown:
    """Why and how the engine ends; `request` serves the Drain call."""

    def __init__(self, grace_s: float, leave: Leave) -> None:
        self.grace_s, self.jobs_listens = grace_s, True
        self._leave = leave
        self._drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, reason: str, *, jobs_listens: bool) -> None:
        """Start the end."""
        logger.info("The engine ends: %s.", reason)
        self.jobs_listens = jobs_listens
        if not jobs_listens:
            # Whoever started it may be starting another one already.
            self.grace_s = min(self.grace_s, 10.0)
        self._leave()

    def request(self, grace_s: float | None) -> asyncio.Future[None]:
        """Drain; the answer is done when everything was given back."""
        if grace_s is not None:
            self.grace_s = grace_s
        if not self._drained.done():
            self.begin("it was told to drain", jobs_listens=True)
        return self._drained

    def done(self) -> None:
        if not self._drained.done():
            self._drained.set_result(None)


async def _work(worker: Worker, shutdown: Shutdown) -> None:
    left = await worker.run()
    shutdown.begin(left.reason, jobs_listens=left.jobs_listens)


async def _streams_end(loop: ModelLoop, clock: Clock, grace_s: float) -> None:
    """Wait for the open streams, at most `grace_s` seconds."""
    end = clock.monotonic() + grace_s
    while loop.open_sequences and clock.monotonic() < end:
        await clock.sleep(0.1)


async def _base_folder(settings: EngineSettings, store: ObjectStore, clock: Clock) -> Path:
    """Fetch the base model, waiting for the store as long as for jobs. Raises LatheErrors."""
    end = clock.monotonic() + settings.orphan_timeout_s
    while True:
        try:
            return await ensure_base(store, settings.base_digest, settings.cache_folder, clock)
        except Unavailable as error:
            if clock.monotonic() > end or parent_died(settings.parent_pid):
                raise
            logger.warning("the base model cannot be fetched yet: %s", error)
            await clock.sleep(1.0)


def _load(settings: EngineSettings, folder: Path, leave: Leave) -> Engine:
    if settings.workers > 1:
        # Ray is an extra, and takes seconds to load.
        from lathe.engine.distributed.ray_gang import assemble

        return assemble(settings, folder, leave)
    return Engine.load(
        folder,
        device=settings.device,
        dtype=settings.dtype,
        base_quantization=settings.base_quantization,
        threads=settings.model_threads(),
        kv_budget_bytes=settings.kv_budget_mb << 20,
    )


def _speech(folder: Path) -> Speech | None:
    """What turns a job's answers to held-out prompts into text."""
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except LatheError as error:
        logger.warning("jobs will show no answers to held-out prompts: %s", error)
        return None
    return Speech(tokenizer.decode, frozenset(tokenizer.eos_ids))


def _server(settings: EngineSettings, servicer: EngineServicer, metrics: Metrics) -> RpcServer:
    credentials = ServiceCredentials.from_files(
        settings.rpc.service_token_file, settings.rpc.engine_token_file
    )
    registration = Registration(add_EngineServiceServicer_to_server, servicer, "lathe.v1.EngineService")
    return build_server([registration], settings.rpc, ServiceAuthenticator(credentials), metrics)


def _worker(
    settings: EngineSettings,
    engine: Engine,
    loop: ModelLoop,
    *,
    jobs: GrpcJobs,
    store: ObjectStore,
    clock: Clock,
    port: int,
    work: Path,
    speech: Speech | None,
) -> Worker:
    dtype = str(engine.dtype).removeprefix("torch.")
    quantization = "" if settings.base_quantization == "none" else f"+{settings.base_quantization}"
    threads = settings.model_threads()
    registration = EngineRegistration(
        engine_id=settings.engine_id,
        base_model=settings.base_model,
        base_digest=settings.base_digest,
        address=settings.advertise_address or f"{settings.rpc.host}:{port}",
        max_attempts=settings.max_attempts,
        max_sequences=settings.max_sequences,
        device=settings.device,
        threads=threads,
        code_version=__version__,
        engine_class=settings.engine_class,
        job_id=settings.job_id,
    )
    plan = SlicePlan(settings.slice_tokens(), threads, dtype + quantization, settings.device)
    attempts = AttemptSettings(
        work=work,
        cache=settings.cache_folder,
        read_rows=read_rows,
        plan=plan,
        environment=environment(plan, workers=engine.workers, sharded=engine.sharded),
        memory=partial(_memory, settings, engine, plan),
        checkpoint_interval_s=settings.checkpoint_interval_s,
        speech=speech,
        notes=_notes(engine),
    )
    return Worker(
        registration=registration,
        engine=engine,
        loop=loop,
        jobs=jobs,
        store=store,
        clock=clock,
        attempts=attempts,
        settings=WorkerSettings(settings.orphan_timeout_s, partial(parent_died, settings.parent_pid)),
    )


def _notes(engine: Engine) -> tuple[Note, ...]:
    """What its users are told before a job's first step."""
    if not engine.sharded:
        return ()
    from lathe.engine.distributed.fit import serving_note
    from lathe.engine.distributed.joining import need_of

    need = need_of(engine.spec, engine.dtype, engine.device, engine.workers)
    return (serving_note(need, world=engine.workers),)


def _memory(settings: EngineSettings, engine: Engine, plan: SlicePlan, config: TrainingConfig) -> Memory:
    """What a job's preflight asks: of this engine, and of the cache that keeps what was measured."""
    book = MemoryBook(settings.cache_folder / "memory.jsonl")
    about = [__version__, settings.base_digest, plan.dtype, plan.device, plan.threads, spec_of(config)]
    if engine.sharded:
        about.append(f"sharded over {engine.workers}")
    profile = " ".join(map(str, about))
    return Memory(engine.free_bytes, partial(book.known, profile), partial(book.learn, profile))


def _serving(
    settings: EngineSettings, engine: Engine, loop: ModelLoop, adapters: AdapterCache, worker: Worker
) -> Serving:
    return Serving(
        engine_id=settings.engine_id,
        base_model=settings.base_model,
        base_digest=settings.base_digest,
        context_length=engine.context_length,
        dtype=str(engine.dtype).removeprefix("torch."),
        threads=settings.model_threads(),
        loop=loop,
        adapters=adapters,
        attempts=lambda: worker.attempts,
    )


def parent_died(parent_pid: int | None) -> bool:
    """Whether the process that started this one is gone: an orphan is given another parent."""
    return parent_pid is not None and os.getppid() != parent_pid


def main() -> int:
    """Run an engine until a signal, or until it has a reason to end; the exit code."""
    return run_service(running, EngineSettings)


if __name__ == "__main__":
    sys.exit(main())
