"""How a rank comes to its engine: what rank 0 decides for all, and the base as each of them keeps it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from lathe.common.settings import StoreSettings
from lathe.engine.distributed.fit import Footprint, check_shard, footprint, is_sharded
from lathe.engine.distributed.group import ProcessGroup
from lathe.engine.distributed.ranks import RankEngine
from lathe.engine.frozen import can_pack
from lathe.engine.memory import free_bytes
from lathe.engine.settings import EngineSettings, StoreKeys
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import Placement, Whole, choose_dtype, read_spec

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RankEngine)


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What rank 0 tells the others. No key is among it: each takes the store's from its own environment.

    dtype and sharded are what rank 0 made of `auto`. threads: None for all cores that a rank may use.
    """

    world: int
    timeout_s: float
    store: StoreSettings
    base_digest: str
    cache_folder: Path
    device: str
    dtype: str
    base_quantization: str
    threads: int | None
    kv_budget_mb: int
    sharded: bool

    def own_store(self) -> StoreSettings:
        """The store, with this process's keys."""
        keys = StoreKeys.load().store
        return self.store.model_copy(update={"access_key": keys.access_key, "secret_key": keys.secret_key})


def told(settings: EngineSettings, folder: Path) -> RankSettings:
    """What all ranks do with the base in this folder. Raises FailedPrecondition; InvalidArgument for its config."""
    device = torch.device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    nf4 = settings.base_quantization == "nf4"
    need = _need(read_spec(folder), dtype, device, settings.workers, nf4=nf4)
    free = free_bytes(device)
    sharded = is_sharded(settings.shard_base, need, free, world=settings.workers, nf4=nf4)
    if sharded:
        logger.info("The base model is sharded over %d workers.", settings.workers)
    return RankSettings(
        world=settings.workers,
        timeout_s=settings.rank_timeout_s,
        store=settings.store.model_copy(update={"access_key": None, "secret_key": None}),
        base_digest=settings.base_digest,
        cache_folder=settings.cache_folder,
        device=settings.device,
        dtype=str(dtype).removeprefix("torch."),
        base_quantization=settings.base_quantization,
        threads=settings.threads,
        kv_budget_mb=settings.kv_budget_mb,
        sharded=sharded,
    )


def load_rank(kind: type[R], rank: RankSettings, threads: int, folder: Path, group: ProcessGroup) -> R:
    """This rank's engine. Raises InvalidArgument, FailedPrecondition (no room for its shard)."""
    to = _sharded(rank, folder, group) if rank.sharded else Whole(rank.base_quantization)
    engine = kind.load(
        folder,
        device=rank.device,
        dtype=rank.dtype,
        to=to,
        threads=threads,
        kv_budget_bytes=rank.kv_budget_mb << 20,
    )
    engine.join(group)
    return engine


def _sharded(rank: RankSettings, folder: Path, group: ProcessGroup) -> Placement:
    # FSDP2 takes a second or two to load.
    from lathe.engine.distributed.sharded import FsdpShards, Sharded

    device = torch.device(rank.device)
    need = _need(read_spec(folder), choose_dtype(rank.dtype, device), device, rank.world, nf4=False)
    check_shard(need, free_bytes(device), world=rank.world)
    return Sharded(partial(FsdpShards, mesh=group.mesh()))


def _need(spec: DecoderSpec, dtype: torch.dtype, device: torch.device, world: int, *, nf4: bool) -> Footprint:
    packed = device.type == "cpu" and dtype == torch.bfloat16 and can_pack()
    return footprint(spec, dtype.itemsize, world, packed=packed, nf4=nf4)
