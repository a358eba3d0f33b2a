"""The peers as Ray actors. The one place that imports ray.

All start together or not at all: a placement group is granted whole. An actor is not started again when it dies, for
its state is gone; the engine ends then, and jobs starts another gang from the last checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lathe.common.clock import SystemClock
from lathe.common.errors import Unavailable
from lathe.common.objectstore.factory import open_store as open_objects
from lathe.engine.basecache import ensure_base
from lathe.engine.distributed.group import find_store, join_group, open_store
from lathe.engine.distributed.ranks import Gang, LeadingEngine, RankEngine, Work
from lathe.engine.loading import load_engine
from lathe.engine.model import RankLost
from lathe.engine.settings import EngineSettings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Raised:
    """What the work raised, as itself: Ray would wrap it."""

    error: Exception


class PeerProcess:
    """What runs in an actor: an engine that does what rank 0 says, in order."""

    def __init__(self, settings: EngineSettings) -> None:
        store = open_objects(settings.store)
        base = ensure_base(store, settings.base_digest, settings.cache_folder, SystemClock())
        self._settings = settings
        self._engine = load_engine(RankEngine, settings, asyncio.run(base))

    def join(self, host: str, port: int, rank: int) -> object:
        """Meet the others; answers None, or Raised."""
        world, timeout_s = self._settings.workers, self._settings.rank_timeout_s
        try:
            store = find_store(host, port, world, timeout_s)
            self._engine.join(join_group(store, rank, world, self._settings.device, timeout_s))
        except Exception as error:
            return Raised(error)
        return None

    def run(self, work: Work[Any]) -> object:
        """What the work answers, or Raised."""
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


def assemble(engine: LeadingEngine, settings: EngineSettings, leave: Callable[[], None]) -> None:
    """Start the peers and lead them. Raises Unavailable when they are not there within gang_timeout_s."""
    ray.init(address=settings.ray_address, log_to_driver=False, include_dashboard=False)
    actors = _actors(settings)
    host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    timeout_s = settings.rank_timeout_s
    store = open_store(host, settings.workers, timeout_s)
    joining = [actor.join.remote(host, store.port, rank) for rank, actor in enumerate(actors, start=1)]
    reduce = join_group(store, 0, settings.workers, settings.device, timeout_s)
    for answer in joining:
        _answer(answer, timeout_s)
    engine.lead(Gang([RayPeer(actor, timeout_s) for actor in actors], reduce, leave))


def _actors(settings: EngineSettings) -> list[Any]:
    """The peers, each with its base loaded."""
    wanted = settings.workers - 1
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
    actors: list[Any] = [remote.remote(settings) for _ in range(wanted)]
    try:
        ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=settings.gang_timeout_s)
    except (GetTimeoutError, RayError) as error:
        raise Unavailable(f"A worker could not load the base model: {error}") from error
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
