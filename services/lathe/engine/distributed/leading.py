"""Several ranks train one job: every rank holds the same adapters, and computes other slices of the same batch.

Rank 0 is the engine that has the lease, runs the recipe and samples; the other ranks, its peers, do what it says. Each
rank adds its slices' gradients to its own buffer; a step takes the sum over the ranks, so every rank takes the same
step. A slice's loss is divided by the whole batch's trained tokens already, so the number of ranks changes nothing but
the order of a sum in fp32.

The base is whole on each rank, or sharded over them; then every pass is one of all ranks (ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lathe.engine.batch import SliceResult, TrainRow, TrainSlice
from lathe.engine.distributed.files import Listing, listing, receiving, send
from lathe.engine.distributed.ranks import Group, RankEngine, Work
from lathe.engine.engine import Engine
from lathe.engine.full import FullSpec
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import RankLost
from lathe.engine.sequences import SequenceState, StepOutput

T = TypeVar("T")


class Peer(Protocol):
    """Another rank. `submit` returns at once; what it answers waits, and raises what the work raised, or RankLost."""

    def submit(self, work: Work[T]) -> Callable[[], T]: ...


@dataclass(frozen=True, slots=True)
class Gang:
    """The ranks beside rank 0, all of them there. leave: called once when one is lost, since none can be replaced."""

    peers: Sequence[Peer]
    group: Group
    leave: Callable[[], None]


class LeadingEngine(RankEngine):
    """Rank 0: what changes a trained adapter happens on every rank, and the slices of a pass go to the ranks in turn.

    Sampling and `save` are its own. The adapters for sampling are too, unless the base is sharded: DoRA reads it.
    """

    _gang: Gang | None = None
    _alone = False  # a peer was lost: nothing can be trained any more

    def lead(self, gang: Gang) -> None:
        """Begin with these peers; before any adapter is there."""
        self._gang = gang
        self._common: set[str] = set()  # the adapters that every rank holds
        self.join(gang.group)

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
        self._begin(key, verb, folder)

    def restore(self, key: str, folder: Path) -> int:
        return self._begin(key, partial(Engine.restore, key=key), folder)

    def load_reference(self, key: str, folder: Path) -> None:
        self._begin(key, partial(RankEngine.load_adapter, key=key), folder)

    def load_adapter(self, key: str, folder: Path) -> None:
        if self.sharded:
            self.load_reference(key, folder)
        else:
            super().load_adapter(key, folder)

    def drop_adapter(self, key: str) -> None:
        # Here first: a sequence may hold it.
        super().drop_adapter(key)
        if key in self._common:
            self._common.remove(key)
            self._forget_on_peers(key)

    def zero_grad(self, key: str) -> None:
        self._everywhere(partial(Engine.zero_grad, key=key))

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        return self._shared(pieces, RankEngine.forward_backward, training=True)

    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        return self._shared(pieces, RankEngine.evaluate, training=False)

    def measure(self, key: str, rows: Sequence[TrainRow]) -> int | None:
        """What the rank takes that takes most."""
        taken = self._everywhere_all(partial(RankEngine.measure, key=key, rows=rows))
        return None if None in taken else max(found for found in taken if found is not None)

    def free_bytes(self) -> int | None:
        """What the rank has that has least."""
        free = self._everywhere_all(Engine.free_bytes)
        return min((found for found in free if found is not None), default=None)

    def logprobs(self, key: str, tokens: Sequence[int]) -> list[float]:
        return self._lent(partial(RankEngine.logprobs, key=key, tokens=tokens))

    def step(self, sequences: Sequence[SequenceState], *, prefill_tokens: int = 256) -> list[StepOutput]:
        return self._lent(partial(RankEngine.step, sequences=sequences, prefill_tokens=prefill_tokens))

    def optim_step(self, key: str, lr: float, *, clip: float = 1.0, weight_decay: float = 0.0) -> float:
        """As Engine's, on every rank. Raises RankLost when one is gone, or when they came to different gradients:
        no rank has taken the step then."""
        norms = self._everywhere_all(partial(RankEngine.sum_gradients, key=key))
        # The sum is the same bits everywhere; a rank that has another one would go its own way unseen.
        if len(set(map(repr, norms))) > 1:
            raise self._lost(f"the ranks have different gradients: their norms are {norms}.")
        step = partial(Engine.optim_step, key=key, lr=lr, clip=clip, weight_decay=weight_decay)
        waits = [peer.submit(step) for peer in self._peers]
        norm = norms[0]
        try:
            norm = step(self)
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

    def _begin(self, key: str, verb: Callable[..., T], folder: Path | None = None) -> T:
        """The verb makes an adapter, on every rank or on none; from the files of a folder that only this rank has."""
        if folder is None:
            own, theirs = verb, verb
        else:
            sent = listing(folder)
            own, theirs = partial(_sent, folder, sent, verb), partial(_received, sent, verb)
        held = key in self.adapter_keys()
        try:
            answer: T = self._all([own, *[theirs] * len(self._peers)])[0]
        except Exception:
            if not held:
                self.drop_if_held(key)
                self._forget_on_peers(key)
            raise
        self._common.add(key)
        return answer

    def _forget_on_peers(self, key: str) -> None:
        if self._alone:
            return
        forget = partial(RankEngine.drop_if_held, key=key)
        # A rank lost now takes nothing from a job that has ended; the next verb tells of it.
        with suppress(RankLost):
            self._answers([forget] * len(self._peers), self._peers)

    def _lent(self, work: Work[T]) -> T:
        """A pass of this rank alone, for which the others lend their shards where there are any."""
        if not self.sharded:
            return work(self)
        lend = partial(RankEngine.lend, training=False)
        answers: list[Any] = self._all([work, *[lend] * len(self._peers)])
        return answers[0]  # type: ignore[no-any-return]

    def _everywhere(self, work: Work[T]) -> T:
        return self._everywhere_all(work)[0]

    def _everywhere_all(self, work: Work[T]) -> list[T]:
        return self._all([work] * self.workers)

    def _shared(
        self, items: Sequence[Any], verb: Callable[[Any, Sequence[Any]], list[T]], *, training: bool
    ) -> list[T]:
        """The items go to the ranks in turn; the answers come back in the items' order."""
        world = min(self.workers, len(items))
        work: list[Work[Any]] = [partial(_call, verb, items[rank::world]) for rank in range(world)]
        if self.sharded:
            work += [partial(RankEngine.lend, training=training)] * (self.workers - world)
        answers = self._all(work)
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


def _sent(folder: Path, files: Listing, verb: Callable[..., T], engine: RankEngine) -> T:
    send(folder, files, engine.group.broadcast, engine.device)
    return verb(engine, folder=folder)


def _received(files: Listing, verb: Callable[..., T], engine: RankEngine) -> T:
    with receiving(files, engine.group.broadcast, engine.device) as folder:
        return verb(engine, folder=folder)
