"""The ranks' process group: torch.distributed's, over TCP; gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore as Store  # type: ignore[attr-defined]

from lathe.engine.distributed.ranks import Reduce
from lathe.engine.model import RankLost


def open_store(host: str, world: int, timeout_s: float) -> Store:
    """Where the ranks meet; rank 0 opens it, on a free port (`.port`)."""
    return Store(host, 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def find_store(host: str, port: int, world: int, timeout_s: float) -> Store:
    """The other ranks' end of it. Raises RankLost."""
    try:
        return Store(host, port, world, is_master=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise RankLost(f"rank 0 does not answer at {host}:{port}: {error}") from error


def join_group(store: Store, rank: int, world: int, device: str, timeout_s: float) -> Reduce:
    """Waits until all ranks are there; answers how they add up. A process joins one group in its life.

    Raises RankLost when one is missing after timeout_s, now or at a sum.
    """
    backend, timeout = ("nccl" if device == "cuda" else "gloo"), timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:
        raise RankLost(f"rank {rank} of {world} waited for the others in vain: {error}") from error
    return _whole_or_not(_sum)


def _sum(tensor: Tensor) -> None:
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        # NCCL answers before it is done; what went wrong is heard only here.
        torch.cuda.synchronize(tensor.device)


def _whole_or_not(reduce: Callable[[Tensor], None]) -> Reduce:
    """A sum that breaks off may have been written in part: the tensor is as it was then."""

    def whole(tensor: Tensor) -> None:
        before = tensor.clone()
        try:
            reduce(tensor)
        except RuntimeError as error:
            tensor.copy_(before)
            raise RankLost(f"the gradients could not be added up: {error}") from error

    return whole
