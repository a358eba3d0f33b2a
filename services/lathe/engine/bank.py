"""The adapters on one base, and how a pass applies them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lathe.engine.adapters import Adapter, BaseWeights, check_weights
from lathe.engine.frozen import FrozenLinear
from lathe.engine.lora_batched import BatchRows, batch_rows
from lathe.engine.lora_config import LoraSpec, read_spec
from lathe.engine.lora_layout import GroupKey, Site


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start:stop of a pass go through this adapter.

    rows: (number of tokens, identity) of each row in it, where dropout needs them.
    """

    adapter: Adapter
    start: int
    stop: int
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class MixedGroup:
    """One fused linear's LoRA of several adapters side by side: b is block-diagonal over the modules.

    pattern: index into MixedLora.masks (which adapter owns each column of u).
    gains [adapters + 1, out]: DoRA's m / n - 1 of each adapter, zeros for those without and for the base (the last).
    """

    a: FrozenLinear
    b: FrozenLinear
    pattern: int
    gains: Tensor | None


@dataclass(frozen=True, slots=True)
class MixedLora:
    """Adapters side by side for a pass: one product makes every adapter's u, and the mask [T, columns] leaves each
    token its own adapter's columns (None: a single adapter for all tokens). owner: each token's row of `gains`."""

    groups: dict[GroupKey, MixedGroup]
    masks: list[Tensor | None]
    owner: Tensor | None


@dataclass(slots=True)
class LoraPass:
    """How LoRA is applied in one pass. `anchor` is there in training passes only (see lora.linear).

    mixed, where there is one, stands for the segments inside the layers; not for embeddings and head. batch: the
    segments' rows as one batch, where products over all of them at once pay.
    """

    segments: list[Segment] = field(default_factory=list)
    mixed: MixedLora | None = None
    batch: BatchRows | None = None
    anchor: Tensor | None = None


# Sampling passes up to this size take their adapters side by side, in the frozen linears' layout: measured 29 against
# 73 us a linear at 8 tokens of one adapter, 54 against 93 with 8 adapters. Larger ones go adapter by adapter.
MIXED_TOKENS = 320
MIXED_ADAPTERS = 16


class AdapterBank:
    """The adapters on one base, by slot number; -1 means the base alone."""

    def __init__(self, everywhere: Sequence[Site], base: BaseWeights) -> None:
        """everywhere: the base's modules that may carry LoRA (see adapters.sites)."""
        self._everywhere, self._base = tuple(everywhere), base
        self._device, self._dtype = base.embeddings.device, base.embeddings.dtype
        self._slots: dict[int, Adapter] = {}
        self._mixed_key: tuple[tuple[int, int], ...] = ()
        self._mixed = _SideBySide({}, [])

    def __getitem__(self, slot: int) -> Adapter:
        return self._slots[slot]

    def new_trainable(self, slot: int, spec: LoraSpec, seed: int) -> Adapter:
        """A fresh adapter (see Adapter.initialise) in a free slot. Raises InvalidArgument."""
        adapter = Adapter(spec, self._everywhere, self._base, trainable=True)
        adapter.initialise(seed)
        return self._put(slot, adapter)

    def load(
        self, slot: int, folder: Path, *, trainable: bool = False, lora_dropout: float | None = None
    ) -> Adapter:
        """An adapter from PEFT's files; lora_dropout: instead of theirs. Raises InvalidArgument."""
        spec = read_spec(folder)
        if lora_dropout is not None:
            spec = replace(spec, lora_dropout=lora_dropout)
        check_weights(folder, spec, self._everywhere)
        adapter = Adapter(spec, self._everywhere, self._base, trainable=trainable)
        adapter.load_weights(folder)
        return self._put(slot, adapter)

    def remove(self, slot: int) -> None:
        del self._slots[slot]
        self._mixed_key, self._mixed = (), _SideBySide({}, [])

    def free_slot(self) -> int:
        return next(slot for slot in range(len(self._slots) + 1) if slot not in self._slots)

    def plan(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        *,
        training: bool,
        rows: Sequence[int] | None = None,
    ) -> LoraPass:
        """The LoRA of a pass whose sequences have these slots and token counts.

        rows: the sequences' identities (see row_identity), which a training pass with dropout needs.
        """
        runs = self._runs(slots, lengths, rows if training else None)
        if training:
            spans = [(run.start, run.stop) for run in runs]
            batch = None if any(run.rows for run in runs) else batch_rows(spans, self._device)
            anchor = torch.zeros((), device=self._device, requires_grad=True)
            return LoraPass(runs, batch=batch, anchor=anchor)
        if runs and sum(lengths) <= MIXED_TOKENS and len({id(run.adapter) for run in runs}) <= MIXED_ADAPTERS:
            return LoraPass(runs, self._mix(slots, lengths))
        return LoraPass(runs)

    def plan_head(
        self, slots: Sequence[int], counts: Sequence[int], rows: Sequence[int] | None = None
    ) -> LoraPass:
        """The LoRA of the head over chosen positions: `counts` of each sequence, in order. rows: as in `plan`, for
        training."""
        return LoraPass(self._runs(slots, counts, rows))

    def _runs(
        self, slots: Sequence[int], lengths: Sequence[int], rows: Sequence[int] | None
    ) -> list[Segment]:
        runs: list[Segment] = []
        start = 0
        for i, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            if slot >= 0 and length:
                adapter = self._slots[slot]
                row: tuple[tuple[int, int], ...] = ()
                if rows is not None and adapter.spec.lora_dropout:
                    row = ((length, rows[i]),)
                if runs and runs[-1].adapter is adapter and runs[-1].stop == start:
                    runs[-1] = Segment(adapter, runs[-1].start, start + length, runs[-1].rows + row)
                else:
                    runs.append(Segment(adapter, start, start + length, row))
            start += length
        return runs

    def _put(self, slot: int, adapter: Adapter) -> Adapter:
        self._slots[slot] = adapter
        return adapter

    def _mix(self, slots: Sequence[int], lengths: Sequence[int]) -> MixedLora:
        active = sorted({slot for slot in slots if slot >= 0})
        key = tuple((slot, self._slots[slot].version) for slot in active)
        # What was made for more adapters serves fewer, until most of its columns would be multiplied for nothing.
        if not set(key) <= set(self._mixed_key) or 2 * len(key) < len(self._mixed_key):
            self._mixed = _side_by_side([self._slots[slot] for slot in active], self._widths())
            self._mixed_key = key
        groups, patterns = self._mixed.groups, self._mixed.patterns
        dora = any(group.gains is not None for group in groups.values())
        if len(self._mixed_key) == 1 and min(slots) >= 0 and not dora:
            return MixedLora(groups, [None] * len(patterns), None)
        places = {slot: i for i, (slot, _) in enumerate(self._mixed_key)}
        owner = torch.tensor([places.get(slot, len(places)) for slot in slots])
        owner = owner.repeat_interleave(torch.tensor(list(lengths)))
        masks = [
            (owner[:, None] == torch.tensor(columns)).to(self._device, self._dtype) for columns in patterns
        ]
        return MixedLora(groups, [*masks], owner.to(self._device))

    def _widths(self) -> dict[GroupKey, int]:
        """Outputs of each fused linear."""
        widths: dict[GroupKey, int] = {}
        for site in self._everywhere:
            widths[site.key] = max(widths.get(site.key, 0), site.out_stop)
        return widths


def row_identity(tokens: Sequence[int]) -> int:
    """What dropout knows a row by: its tokens alone, so that packing, order and company change no mask."""
    return zlib.crc32(torch.as_tensor(tokens, dtype=torch.int64).numpy().tobytes())


@dataclass(frozen=True, slots=True)
class _SideBySide:
    groups: dict[GroupKey, MixedGroup]
    patterns: list[tuple[int, ...]]  # which adapter owns each column


def _side_by_side(adapters: Sequence[Adapter], widths: Mapping[GroupKey, int]) -> _SideBySide:
    """widths: outputs of each fused linear. Embeddings and head are left out: they are applied by segments."""
    made = _SideBySide({}, [])
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.groups if key[0] >= 0):
        parts = [(i, adapter.groups[key]) for i, adapter in enumerate(adapters) if key in adapter.groups]
        a = torch.cat([part.a for _, part in parts])
        b = a.new_zeros((widths[key], a.shape[0]))
        gains: Tensor | None = None
        columns: list[int] = []
        for owner, part in parts:
            for module in part.modules:
                width = module.r_stop - module.r_start
                b[module.out_start : module.out_stop, len(columns) : len(columns) + width] = module.b
                columns += [owner] * width
            if part.gain is not None:
                gains = a.new_zeros((len(adapters) + 1, widths[key])) if gains is None else gains
                gains[owner] = part.gain
        if tuple(columns) not in made.patterns:
            made.patterns.append(tuple(columns))
        pattern = made.patterns.index(tuple(columns))
        made.groups[key] = MixedGroup(FrozenLinear(a, None), FrozenLinear(b, None), pattern, gains)
    return made
