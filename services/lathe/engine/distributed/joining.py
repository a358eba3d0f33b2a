"""How a rank comes to its engine: what rank 0 decides for all, and the base as each of them keeps it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from lathe.common.settings import StoreSettings
from lathe.engine.distributed.fit import (
    Footprint,
    ShardBase,
    check_choice,
    check_shard,
    footprint,
    wants_shards,
)
from lathe.engine.distributed.group import ProcessGroup
from lathe.engine.distributed.ranks import Group, RankEngine
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

    dtype is what rank 0 made of `auto`; of shard_base the ranks make the same together (`is_sharded`). threads: None
    for all cores that a rank may use.
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
    shard_base: ShardBase

    def own_store(self) -> StoreSettings:
        """The store, with this process's keys."""
        keys = StoreKeys.load().store
        return self.store.model_copy(update={"access_key": keys.access_key, "secret_key": keys.secret_key})


def told(settings: EngineSettings) -> RankSettings:
    """What all ranks do. Raises FailedPrecondition for settings that exclude each other."""
    check_choice(settings.shard_base, nf4=settings.base_quantization == "nf4")
    return RankSettings(
        world=settings.workers,
        timeout_s=settings.rank_timeout_s,
        store=settings.store.model_copy(update={"access_key": None, "secret_key": None}),
        base_digest=settings.base_digest,
        cache_folder=settings.cache_folder,
        device=settings.device,
        dtype=str(choose_dtype(settings.dtype, torch.device(settings.device))).removeprefix("torch."),
        base_quantization=settings.base_quantization,
        threads=settings.threads,
        kv_budget_mb=settings.kv_budget_mb,
        shard_base=settings.shard_base,
    )


def is_sharded(mine: bool, group: Group, device: torch.device) -> bool:
    """Whether the base is sharded: on all ranks, if one of them wants it. Each tells its own wish; the answer is the
    same on all."""
    votes = torch.tensor([float(mine)], device=device)
    group.add_up(votes)
    return bool(votes.item() > 0)


def load_rank(kind: type[R], rank: RankSettings, threads: int, folder: Path, group: ProcessGroup) -> R:
    """This rank's engine. Raises InvalidArgument, FailedPrecondition (no room for its shard)."""
    device, nf4 = torch.device(rank.device), rank.base_quantization == "nf4"
    need = need_of(read_spec(folder), choose_dtype(rank.dtype, device), device, rank.world, nf4=nf4)
    free = free_bytes(device)
    wish = wants_shards(rank.shard_base, need, free, world=rank.world, nf4=nf4)
    to: Placement = Whole(rank.base_quantization)
    if is_sharded(wish, group, device):
        logger.info("The base model is sharded over %d workers.", rank.world)
        check_shard(need, free, world=rank.world)
        to = _sharded(group)
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


def _sharded(group: ProcessGroup) -> Placement:
    # FSDP2 takes a second or two to load.
    from lathe.engine.distributed.sharded import FsdpShards, Sharded

    return Sharded(partial(FsdpShards, mesh=group.mesh()))


def need_of(
    spec: DecoderSpec, dtype: torch.dtype, device: torch.device, world: int, *, nf4: bool = False
) -> Footprint:
    """What a rank on such a device takes for the base."""
    packed = device.type == "cpu" and dtype == torch.bfloat16 and can_pack()
    return footprint(spec, dtype.itemsize, world, packed=packed, nf4=nf4)
