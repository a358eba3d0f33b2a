"""The ranks' process group: torch.distributed's, over TCP; gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore as Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

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


class ProcessGroup:
    """ranks.Group. A process joins one in its life."""

    def __init__(self, store: Store, rank: int, world: int, device: str, timeout_s: float) -> None:
        """Waits until all ranks are there. Raises RankLost when one is missing after timeout_s, now or later."""
        self._device = device
        backend, timeout = ("nccl" if device == "cuda" else "gloo"), timedelta(seconds=timeout_s)
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        except RuntimeError as error:
            raise RankLost(f"rank {rank} of {world} waited for the others in vain: {error}") from error

    def mesh(self) -> DeviceMesh:
        """The ranks in a row, for sharding."""
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, self._device)

    def add_up(self, tensor: Tensor) -> None:
        _whole_or_not(dist.all_reduce, tensor, "the gradients could not be added up")

    def broadcast(self, tensor: Tensor) -> None:
        _whole_or_not(_from_rank_0, tensor, "the files could not be sent")


def _from_rank_0(tensor: Tensor) -> None:
    dist.broadcast(tensor, src=0)


def _whole_or_not(work: Callable[[Tensor], object], tensor: Tensor, problem: str) -> None:
    """What breaks off may have been written in part: the tensor is as it was then."""
    before = tensor.clone()
    try:
        work(tensor)
        if tensor.is_cuda:
            # NCCL answers before it is done; what went wrong is heard only here.
            torch.cuda.synchronize(tensor.device)
    except RuntimeError as error:
        tensor.copy_(before)
        raise RankLost(f"{problem}: {error}") from error
