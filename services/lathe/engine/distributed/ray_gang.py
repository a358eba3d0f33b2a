"""The peers as Ray actors. The one place that imports ray.

All start together or not at all: a placement group is granted whole. An actor is not started again when it dies, for
its state is gone; the engine ends then, and jobs starts another gang from the last checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lathe.common.clock import SystemClock
from lathe.common.errors import Unavailable
from lathe.common.objectstore.factory import open_store as open_objects
from lathe.engine.basecache import ensure_base
from lathe.engine.distributed.group import ProcessGroup, find_store, open_store
from lathe.engine.distributed.joining import RankSettings, load_rank, told
from lathe.engine.distributed.leading import Gang, LeadingEngine
from lathe.engine.distributed.ranks import RankEngine, Work
from lathe.engine.model import RankLost
from lathe.engine.settings import EngineSettings, threads_here

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Raised:
    """What the work raised, as itself: Ray would wrap it."""

    error: Exception


class PeerProcess:
    """What runs in an actor: an engine that does what rank 0 says, in order. Its answers are values, or Raised."""

    def __init__(self, rank: RankSettings) -> None:
        self._rank = rank
        base = ensure_base(open_objects(rank.own_store()), rank.base_digest, rank.cache_folder, SystemClock())
        self._folder = asyncio.run(base)

    def join(self, host: str, port: int, number: int) -> object:
        """Meet the others, and load the base."""
        rank = self._rank
        try:
            store = find_store(host, port, rank.world, rank.timeout_s)
            group = ProcessGroup(store, number, rank.world, rank.device, rank.timeout_s)
            threads = threads_here(rank.threads)
            self._engine = load_rank(RankEngine, rank, threads, self._folder, group)
        except Exception as error:
            return Raised(error)
        return None

    def run(self, work: Work[Any]) -> object:
        """What the work answers."""
        try:
            return work(self._engine)
        except Exception as error:
            return Raised(error)


@dataclass(frozen=True, slots=True)
class RayPeer:
    """An actor as a Peer."""

    actor: Any
    timeout_s: float

    def submit(self, work: Work[T]) -> Callable[[], T]:
        answer = self.actor.run.remote(work)
        return lambda: _answer(answer, self.timeout_s)


def assemble(settings: EngineSettings, folder: Path, leave: Callable[[], None]) -> LeadingEngine:
    """Rank 0, with the others there and the base in this folder loaded by all.

    Raises Unavailable when they are not there within gang_timeout_s, and what loading raises.
    """
    rank = told(settings)
    ray.init(address=settings.ray_address, log_to_driver=False, include_dashboard=False)
    actors = _actors(settings, rank)
    host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    store = open_store(host, rank.world, rank.timeout_s)
    joining = [actor.join.remote(host, store.port, number) for number, actor in enumerate(actors, start=1)]
    group = ProcessGroup(store, 0, rank.world, rank.device, rank.timeout_s)
    engine = load_rank(LeadingEngine, rank, settings.model_threads(), folder, group)
    for answer in joining:
        _answer(answer, settings.gang_timeout_s)
    engine.lead(Gang([RayPeer(actor, rank.timeout_s) for actor in actors], group, leave))
    return engine


def _actors(settings: EngineSettings, rank: RankSettings) -> list[Any]:
    """The peers, each with the base's files at hand."""
    wanted = settings.workers - 1
    if not wanted:
        return []
    share = {"CPU": settings.worker_cpus, "GPU": settings.worker_gpus}
    needs = {name: amount for name, amount in share.items() if amount}
    group = placement_group([needs] * wanted, strategy="SPREAD")
    try:
        ray.get(group.ready(), timeout=settings.gang_timeout_s)
    except GetTimeoutError as error:
        ray.util.remove_placement_group(group)
        raise Unavailable(
            f"Ray has no room for {wanted} more workers with {needs} each after {settings.gang_timeout_s:.0f} s."
        ) from error
    options = {"num_cpus": settings.worker_cpus, "num_gpus": settings.worker_gpus, "max_restarts": 0}
    remote: Any = ray.remote(PeerProcess)
    remote = remote.options(
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group), **options
    )
    actors: list[Any] = [remote.remote(rank) for _ in range(wanted)]
    try:
        ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=settings.gang_timeout_s)
    except (GetTimeoutError, RayError) as error:
        raise Unavailable(f"A worker could not fetch the base model: {error}") from error
    return actors


def _answer(reference: Any, timeout_s: float) -> Any:
    """Waits. Raises what the work raised, or RankLost when the actor is gone or does not answer in time."""
    try:
        answer = ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise RankLost(f"a worker has not answered for {timeout_s:.0f} s.") from error
    except RayError as error:
        raise RankLost(str(error).partition("\n")[0]) from error
    if isinstance(answer, Raised):
        raise answer.error
    return answer
