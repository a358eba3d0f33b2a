"""Data parallel: every rank holds the same base and the same adapters, and computes other slices of the same batch.

Rank 0 is the engine that has the lease, runs the recipe and samples; the other ranks, its peers, do what it says. Each
rank adds its slices' gradients to its own buffer; a step takes the sum over the ranks, so every rank takes the same
step. A slice's loss is divided by the whole batch's trained tokens already, so the number of ranks changes nothing but
the order of a sum in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lathe.engine.batch import SliceResult, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.full import FullSpec
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import RankLost

T = TypeVar("T")
# Adds up a tensor over all ranks, in place; every rank calls it at the same point.
Reduce = Callable[[Tensor], None]


class RankEngine(Engine):
    """One rank's engine: before a step its gradients become the sum of all ranks'."""

    _reduce: Reduce | None = None

    def join(self, reduce: Reduce) -> None:
        """From now on this is one of several ranks."""
        self._reduce = reduce

    def sum_gradients(self, key: str) -> float:
        """Answers the sum's norm. Raises RankLost, and changes nothing then, when another rank is gone."""
        gradients = self.gradients(key)
        if self._reduce is not None:
            self._reduce(gradients)
        return float(torch.linalg.vector_norm(gradients))


Work = Callable[[RankEngine], T]


class Peer(Protocol):
    """Another rank. `submit` returns at once; what it answers waits, and raises what the work raised, or RankLost."""

    def submit(self, work: Work[T]) -> Callable[[], T]: ...


@dataclass(frozen=True, slots=True)
class Gang:
    """The ranks beside rank 0, all of them there. leave: called once when one is lost, since none can be replaced."""

    peers: Sequence[Peer]
    reduce: Reduce
    leave: Callable[[], None]


class LeadingEngine(RankEngine):
    """Rank 0: what changes a trained adapter happens on every rank, and the slices of a pass go to the ranks in turn.

    Sampling, the adapters for it, scores, `save` and `measure` are its own.
    """

    _gang: Gang | None = None
    _alone = False  # a peer was lost: nothing can be trained any more

    def lead(self, gang: Gang) -> None:
        """Begin with these peers; before any adapter is there."""
        self._gang = gang
        self._trained: set[str] = set()
        self.join(gang.reduce)

    @property
    def workers(self) -> int:
        return 1 + len(self._peers)

    def joins(self, key: str) -> bool:
        """Never: a pass that failed on one rank alone could not be taken back on the others."""
        return super().joins(key) and not self._peers

    def create_adapter(self, key: str, config: LoraSpec | FullSpec, seed: int) -> None:
        self._begin(key, partial(Engine.create_adapter, key=key, config=config, seed=seed))

    def continue_adapter(self, key: str, folder: Path, seed: int, lora_dropout: float | None = None) -> None:
        verb = partial(Engine.continue_adapter, key=key, seed=seed, lora_dropout=lora_dropout)
        self._begin(key, _with_files(_read(folder), verb))

    def restore(self, key: str, folder: Path) -> int:
        return self._begin(key, _with_files(_read(folder), partial(Engine.restore, key=key)))

    def drop_adapter(self, key: str) -> None:
        # Here first: a sequence may hold it.
        super().drop_adapter(key)
        if key in self._trained:
            self._trained.remove(key)
            if not self._alone:
                # A rank lost now takes nothing from a job that has ended; the next verb tells of it.
                with suppress(RankLost):
                    self._answers([partial(Engine.drop_adapter, key=key)] * len(self._peers), self._peers)

    def zero_grad(self, key: str) -> None:
        self._everywhere(partial(Engine.zero_grad, key=key))

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        return self._shared(pieces, Engine.forward_backward)

    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        return self._shared(pieces, Engine.evaluate)

    def optim_step(self, key: str, lr: float, *, clip: float = 1.0, weight_decay: float = 0.0) -> float:
        """As Engine's, on every rank. Raises RankLost when one is gone, or when they came to different gradients:
        no rank has taken the step then."""
        norms = self._everywhere_all(partial(RankEngine.sum_gradients, key=key))
        # The sum is the same bits everywhere; a rank that has another one would go its own way unseen.
        if len(set(map(repr, norms))) > 1:
            raise self._lost(f"the ranks have different gradients: their norms are {norms}.")
        step = partial(Engine.optim_step, key=key, lr=lr, clip=clip, weight_decay=weight_decay)
        waits = [peer.submit(step) for peer in self._peers]
        norm = step(self)
        try:
            for wait in waits:
                wait()
        except RankLost as error:
            # This rank's step is taken: it counts, and the next verb tells of the loss.
            self._lost(error.message)
        return norm

    # Inside

    @property
    def _peers(self) -> Sequence[Peer]:
        return () if self._gang is None else self._gang.peers

    def _begin(self, key: str, work: Work[T]) -> T:
        answer = self._everywhere(work)
        self._trained.add(key)
        return answer

    def _everywhere(self, work: Work[T]) -> T:
        return self._everywhere_all(work)[0]

    def _everywhere_all(self, work: Work[T]) -> list[T]:
        return self._all([work] * self.workers)

    def _shared(self, items: Sequence[Any], verb: Callable[[Engine, Sequence[Any]], list[T]]) -> list[T]:
        """The items go to the ranks in turn; the answers come back in the items' order."""
        world = min(self.workers, len(items))
        parts = [items[rank::world] for rank in range(world)]
        answers = self._all([partial(_call, verb, part) for part in parts])
        return [answers[place % world][place // world] for place in range(len(items))]

    def _all(self, work: Sequence[Work[T]]) -> list[T]:
        """work[rank] on each rank at once, its own included. All have ended when it returns or raises."""
        if self._alone:
            raise self._lost("the others have ended already.")
        return self._answers(work[1:], self._peers, partial(work[0], self))

    def _answers(self, work: Sequence[Work[T]], peers: Sequence[Peer], *own: Callable[[], T]) -> list[T]:
        """Own answers first, then the peers'."""
        # The others begin before this one does its part.
        theirs = [peer.submit(one) for peer, one in zip(peers, work, strict=False)]
        answers: list[T] = []
        errors: list[Exception] = []
        for wait in [*own, *theirs]:
            try:
                answers.append(wait())
            except Exception as error:
                errors.append(error)
        lost = next((error for error in errors if isinstance(error, RankLost)), None)
        if lost is not None:
            raise self._lost(lost.message) from lost
        if errors:
            raise errors[0]
        return answers

    def _lost(self, what: str) -> RankLost:
        if self._gang is not None and not self._alone:
            self._alone = True
            self._gang.leave()
        return RankLost(f"A worker of this job was lost: {what}")


def _call(verb: Callable[[Engine, Sequence[Any]], list[T]], items: Sequence[Any], engine: Engine) -> list[T]:
    return verb(engine, items)


def _read(folder: Path) -> Mapping[str, bytes]:
    """A folder's files: the peers may not share a disk with rank 0."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _with_files(files: Mapping[str, bytes], verb: Callable[..., T]) -> Work[T]:
    """verb(engine, folder=…) with these files in a folder of the rank's own."""

    def work(engine: RankEngine) -> T:
        with TemporaryDirectory() as name:
            for file, content in files.items():
                (Path(name) / file).write_bytes(content)
            return verb(engine, folder=Path(name))

    return work
