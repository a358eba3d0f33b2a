"""Whether a base is kept whole by every rank, or sharded over them. Pure: sizes in, a decision out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lathe.common.errors import FailedPrecondition
from lathe.engine.full import parameters
from lathe.engine.model import Note
from lathe.engine.spec import DecoderSpec

ShardBase = Literal["auto", "always", "never"]

# Of what is free, how much a base may take that each rank keeps whole: the rest is for adapters and passes.
WHOLE_SHARE = 0.8
# Parts that are whole at one time: the one in use, the next one, and the buffer that it is received into.
_GATHERED = 3
# NF4: 4 bits a weight, 8 a block of 64, 32 of 256 such blocks.
_NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a base on one rank. whole: with all of it; shard: of its share; gathered: beside that, in a pass."""

    whole: int
    shard: int
    gathered: int


def footprint(spec: DecoderSpec, itemsize: int, world: int, *, packed: bool, nf4: bool) -> Footprint:
    """itemsize: bytes of a weight in the compute dtype. packed: linears lie in memory twice, for either direction (see
    frozen.FrozenLinear). nf4: the layers' linears are in 4 bits."""
    count = parameters(spec)[-1].stop
    ends = spec.vocab_size * spec.hidden_size
    layers = count - ends * (1 if spec.tied_head else 2)
    if nf4:
        whole = round(layers * _NF4_BYTES) + (count - layers) * itemsize
    elif packed:
        whole = (2 * layers + 3 * ends) * itemsize  # the table as it is, and the head in both layouts
    else:
        whole = count * itemsize
    largest = max(ends, -(-layers // spec.layers)) * itemsize
    return Footprint(whole, -(-count * itemsize // world), _GATHERED * largest)


def check_choice(choice: ShardBase, *, nf4: bool) -> None:
    """Raises FailedPrecondition for a 4-bit base that is to be sharded."""
    if choice == "always" and nf4:
        raise FailedPrecondition(
            "A base in 4 bits (base_quantization nf4) cannot be sharded: set shard_base to auto or never, or "
            "base_quantization to none."
        )


def wants_shards(choice: ShardBase, need: Footprint, free: int | None, *, world: int, nf4: bool) -> bool:
    """Whether a rank with so many free bytes (None where nobody knows) cannot keep the base whole, or shall not."""
    if world == 1 or nf4 or choice == "never":
        return False
    return choice == "always" or (free is not None and need.whole > WHOLE_SHARE * free)


def check_shard(need: Footprint, free: int | None, *, world: int) -> None:
    """Raises FailedPrecondition (OUT_OF_MEMORY) unless a rank's share of the base has room."""
    if free is None or need.shard + need.gathered <= free:
        return
    raise FailedPrecondition(
        f"The base model takes {_gb(need.whole)} GB. Sharded over {world} workers it takes {_gb(need.shard)} GB on "
        f"each, and {_gb(need.gathered)} GB more for the layers in use, where {_gb(free)} GB are free: ask for more "
        "workers, or use bigger ones.",
        reason="OUT_OF_MEMORY",
    )


def serving_note(need: Footprint, *, world: int) -> Note:
    """What the user of a sharded base is to know before the job takes its time: who can serve the result."""
    return Note(
        0,
        "sharded",
        f"The base model takes {_gb(need.whole)} GB and is sharded over the {world} workers of this job. To chat with "
        "the tuned model, and for the check of what is served, an engine must hold the base whole: that takes a "
        f"worker with {_gb(need.whole / WHOLE_SHARE)} GB free. Where no engine class has one, the result can be "
        "exported only; cancel the job now if that will not do.",
        {"base_bytes": str(need.whole), "workers": str(world)},
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g}"
