"""The engine's verbs on one frozen base, many adapters and whole copies. Synchronous; called from one thread."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lathe.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from lathe.engine.adapters import Adapter
from lathe.engine.bank import AdapterBank
from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, SliceResult, TrainRow, TrainSlice
from lathe.engine.claims import Claims
from lathe.engine.full import FullModel, FullSpec, ServedModel, check_room, check_same_architecture, is_full
from lathe.engine.held import Held, kept
from lathe.engine.kv import KVCache
from lathe.engine.lora_config import LoraSpec
from lathe.engine.losses import token_logprobs
from lathe.engine.memory import free_bytes, keep_heap, peak_bytes
from lathe.engine.model import OPTIMIZER_FILE
from lathe.engine.optim import AdamW
from lathe.engine.parts import ALWAYS_THERE
from lathe.engine.passes import check_rows, pack, rows_pass, run_slices
from lathe.engine.sampling import Sampler, SamplingParams, finite_rows, sample_batch
from lathe.engine.sequences import SequenceState, StepOutput, emit, slot_of, spoil
from lathe.engine.weights import Placement, Whole, choose_dtype, load_weights, read_spec

SEED = "dropout_seed"


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes held. `kv_bytes` is the pool as allocated."""

    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    kv_bytes: int
    kv_budget_bytes: int


class Engine:
    """One base, its adapters by key ("" is the base itself), their optimisers, and the sequences being sampled."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        kv_budget_bytes: int = 1 << 30,
        context_length: int | None = None,
        folder: Path | None = None,
    ) -> None:
        """folder: the base's own Hugging Face folder, from which a full-parameter training starts."""
        spec = decoder.spec
        self._folder = folder
        self.decoder, self.spec = decoder, spec
        self.device, self.dtype = decoder.device, decoder.dtype
        self.context_length = min(context_length or spec.context_length, spec.context_length)
        self._bank = AdapterBank(spec.sites(), decoder.weights)
        self._held: dict[str, Held] = {}
        self._made = 0
        self._kv_budget = kv_budget_bytes
        self._cache = KVCache(
            layers=spec.layers,
            width=2 * spec.kv_size,
            max_length=self.context_length,
            budget_bytes=kv_budget_bytes,
            dtype=self.dtype,
            device=self.device,
        )
        self._claims = Claims(self._cache, spec.longrope_context)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        base_quantization: str = "none",
        to: Placement | None = None,
        threads: int | None = None,
        kv_budget_bytes: int = 1 << 30,
        context_length: int | None = None,
    ) -> Self:
        """Loads a Hugging Face folder. to: where its weights are kept; if left out whole, in base_quantization. threads
        sets torch's for the process. Raises InvalidArgument."""
        if threads is not None:
            torch.set_num_threads(threads)
        place = torch.device(device)
        if place.type == "cpu":
            keep_heap()
        spec = read_spec(folder)
        placement = Whole(base_quantization) if to is None else to
        weights = load_weights(folder, spec, device=place, dtype=choose_dtype(dtype, place), to=placement)
        return cls(
            Decoder(spec, weights),
            kv_budget_bytes=kv_budget_bytes,
            context_length=context_length,
            folder=folder,
        )

    # Adapters

    def create_adapter(self, key: str, config: LoraSpec | FullSpec, seed: int) -> None:
        """A new trainable adapter, or a whole copy of the base; it may be sampled from at once.

        Raises AlreadyExists, InvalidArgument (a module that the base has not), FailedPrecondition (no files of the
        base to copy, no memory for a whole copy).
        """
        slot = self._new_slot(key)
        if isinstance(config, LoraSpec):
            self._hold_trainable(key, slot, self._bank.new_trainable(slot, config, seed))
            return
        if self._folder is None:
            raise FailedPrecondition(
                "this engine's base has no files to start a full-parameter training from."
            )
        self._hold_trainable(key, -1, self._full(self._folder))

    def continue_adapter(self, key: str, folder: Path, seed: int, lora_dropout: float | None = None) -> None:
        """A new trainable adapter (or whole model) with the weights of a folder and a fresh optimiser.

        lora_dropout: an adapter's, instead of the folder's. Raises AlreadyExists, InvalidArgument, FailedPrecondition
        (no memory for a whole model).
        """
        self._load_trainable(key, folder, lora_dropout).seed = seed

    def load_adapter(self, key: str, folder: Path) -> None:
        """A frozen adapter from PEFT's files, or a whole model. Raises AlreadyExists, InvalidArgument."""
        slot = self._new_slot(key)
        if is_full(folder):
            check_same_architecture(self.spec, folder)
            self._hold(key, -1, ServedModel(self.spec, folder, dtype=self.dtype, device=self.device), None)
        else:
            self._hold(key, slot, self._bank.load(slot, folder), None)

    def load_reference(self, key: str, folder: Path) -> None:
        """As load_adapter, for an adapter that slices are evaluated with: wherever slices are computed."""
        self.load_adapter(key, folder)

    def drop_adapter(self, key: str) -> None:
        """Raises NotFound, or FailedPrecondition while a sequence uses it."""
        held = self._adapter(key)
        if held.users:
            raise FailedPrecondition(
                f"adapter {key!r} is in use by {held.users} sequence(s); close them first."
            )
        self._discard(key)

    def adapter_keys(self) -> tuple[str, ...]:
        return tuple(self._held)

    @property
    def workers(self) -> int:
        """How many slices it computes at once: one, or one a rank (see distributed/ranks.py)."""
        return 1

    @property
    def sharded(self) -> bool:
        """Whether its base is spread over ranks (see distributed/sharded.py)."""
        return self.decoder.weights.parts is not ALWAYS_THERE

    def joins(self, key: str) -> bool:
        """Whether its slices may share a pass with other adapters'. Raises NotFound."""
        return self._decoder(key) is self.decoder

    # Training

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        """One pass over the slices of one or several adapters; each adds its share of its batch's loss to its
        adapter's gradients. Answers their results in order.

        Raises NotFound, FailedPrecondition (adapter), InvalidArgument (rows). When a pass over several adapters fails
        in any way, their gradients are as they were before it; after a failed pass over one adapter call zero_grad.
        The slices of a whole model go by themselves (see `joins`).
        """
        for piece in pieces:
            self._trainable(piece.key)
        held = {piece.key: self._adapter(piece.key) for piece in pieces}
        with kept(list(held.values())) if len(held) > 1 else nullcontext():
            results = self._run(pieces, training=True)
        for one in held.values():
            one.begun = True
        return results

    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        """The slices' losses, without gradients; the key "" is the base. Raises as forward_backward."""
        return self._run(pieces, training=False)

    def measure(self, key: str, rows: Sequence[TrainRow]) -> int | None:
        """The bytes that a training pass over the rows takes at its worst moment, beyond what is held now; None where
        that cannot be measured. The adapter's gradients are forgotten. Raises as forward_backward."""
        self._trainable(key)
        piece = TrainSlice(key, tuple(rows), CrossEntropy(1))

        def work() -> None:
            self._run([piece], training=True)

        try:
            return peak_bytes(self.decoder.device, work)
        finally:
            self._zero_grad(key)

    def free_bytes(self) -> int | None:
        """What a pass may still take, with sampling's cache at its full size and every optimizer's state in use; None
        where nobody knows."""
        free, memory = free_bytes(self.decoder.device), self.memory()
        if free is None:
            return None
        promised = max(0, memory.kv_budget_bytes - memory.kv_bytes)
        if self.decoder.device.type == "cpu":
            # An optimizer's state takes no memory before its first step writes to it.
            optimizers = [held.optimizer for held in self._held.values() if held.optimizer is not None]
            promised += sum(optimizer.nbytes for optimizer in optimizers if not optimizer.steps)
        return max(0, free - promised)

    def optim_step(self, key: str, lr: float, *, clip: float = 1.0, weight_decay: float = 0.0) -> float:
        """One AdamW step; answers the gradients' norm before clipping and zeroes them. Sampling sees it at once.

        A norm that is not finite is answered and changes nothing else.
        """
        adapter, optimizer = self._trainable(key)
        stale = self._cache_key(key)
        norm = optimizer.step(lr, clip=clip, weight_decay=weight_decay)
        self._adapter(key).begun = False
        adapter.steps = optimizer.steps
        adapter.publish()
        self._claims.forget(stale)
        return norm

    def gradients(self, key: str) -> Tensor:
        """The flat buffer that the step's slices added to; changing it changes the step. Raises as forward_backward."""
        return self._trainable(key)[1].gradients

    def zero_grad(self, key: str) -> None:
        """Forgets the gradients of a step that will not be finished."""
        self._zero_grad(key)

    def logprobs(self, key: str, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i] | tokens[:i]) for i = 1 …, by the pass that training uses."""
        if len(tokens) < 2:
            return []
        with torch.no_grad():
            hidden = self._rows_pass(key, [tokens], training=False)
            targets = torch.tensor(list(tokens[1:]), device=self.device)
            lora = self._bank.plan_head([self._slot(key)], [len(targets)])
            return token_logprobs(hidden[:-1], targets, self._decoder(key).head(lora))

    def save(self, key: str, folder: Path, *, with_optimizer: bool, base_model: str = "") -> tuple[str, ...]:
        """Writes PEFT's two files (or those of a whole model), and the optimiser's; equal numbers give equal bytes.

        Answers their names. Raises NotFound, FailedPrecondition for a whole model that is only served.
        """
        held = self._adapter(key)
        if isinstance(held.adapter, ServedModel):
            raise FailedPrecondition(
                f"{key!r} was loaded for sampling only; its files are where it came from."
            )
        folder.mkdir(parents=True, exist_ok=True)
        names = held.adapter.save(folder, base_model)
        if not with_optimizer:
            return names
        adapter, optimizer = self._trainable(key)
        seed = {SEED: torch.tensor([adapter.seed], dtype=torch.int64)}
        (folder / OPTIMIZER_FILE).write_bytes(to_safetensors({**optimizer.state(), **seed}))
        return (*names, OPTIMIZER_FILE)

    def restore(self, key: str, folder: Path) -> int:
        """A trainable adapter or whole model as it was at save(with_optimizer=True); answers its optimiser's steps.

        Raises AlreadyExists, InvalidArgument, FailedPrecondition (no memory for a whole model).
        """
        try:
            state = load_file(str(folder / OPTIMIZER_FILE))
        except (OSError, SafetensorError) as error:
            raise InvalidArgument(f"{OPTIMIZER_FILE} cannot be read: {error}") from error
        adapter = self._load_trainable(key, folder)
        _, optimizer = self._trainable(key)
        try:
            optimizer.load_state(state)
        except InvalidArgument:
            self._discard(key)
            raise
        adapter.steps = optimizer.steps
        if SEED in state:
            adapter.seed = int(state[SEED])
        return optimizer.steps

    # Sampling

    def open_sequence(self, key: str, prompt: Sequence[int], params: SamplingParams) -> SequenceState:
        """Takes a prompt; `step` computes it. Raises NotFound (adapter), InvalidArgument (prompt)."""
        held = self._adapter(key) if key else None
        if not prompt:
            raise InvalidArgument("the prompt has no tokens.")
        room = self.context_length - len(prompt)
        if room < 1:
            raise InvalidArgument(
                f"the prompt has {len(prompt)} tokens; this model's context of {self.context_length} leaves no room "
                "for an answer.",
                reason="CONTEXT_LENGTH_EXCEEDED",
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.spec.vocab_size:
            raise InvalidArgument(f"the prompt has a token outside the vocabulary of {self.spec.vocab_size}.")
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        state = SequenceState(key, tuple(prompt), Sampler(params, self.spec.vocab_size), limit)
        if held is not None:
            held.users += 1
        return state

    def step(self, sequences: Sequence[SequenceState], *, prefill_tokens: int = 256) -> list[StepOutput]:
        """One pass: a token for each sequence past its prompt, and up to prefill_tokens of the others' prompts.

        Prompts are taken in the order given; a sequence that gets no token is absent from the answer, and so is one for
        which the model gives no number, which has failed then (see sequences.spoil). Raises ResourceExhausted when the
        cache cannot hold even one of them.
        """
        work = [s for s in sequences if s.finished is None and not s.closed]
        chunks = self._claims.take(work, prefill_tokens, self._cache_key)
        if not chunks:
            return []
        chunks.sort(key=self._place)
        decoders = dict.fromkeys(self._decoder(state.key) for state, _ in chunks)
        outputs: list[StepOutput] = []
        with torch.inference_mode():
            try:
                for decoder in decoders:
                    own = [chunk for chunk in chunks if self._decoder(chunk[0].key) is decoder]
                    outputs += self._sampled_pass(decoder, own)
            except BaseException:
                for state, _ in chunks:
                    self._cache.truncate(slot_of(state), state.done)
                raise
        for state, _ in chunks:
            if state.finished is not None:
                self._claims.release(state)
        return outputs

    def close_sequence(self, state: SequenceState) -> None:
        """Ends a sequence (finished or not); what it computed stays for prompts that begin alike. Idempotent."""
        if state.closed:
            return
        state.closed = True
        self._claims.release(state)
        if state.key in self._held:
            self._held[state.key].users -= 1

    def memory(self) -> EngineMemory:
        optimizers = [held.optimizer.nbytes for held in self._held.values() if held.optimizer is not None]
        return EngineMemory(
            self.decoder.weights.nbytes,
            sum(held.adapter.nbytes for held in self._held.values()),
            sum(optimizers),
            self._cache.nbytes,
            self._kv_budget,
        )

    # Inside

    def _adapter(self, key: str) -> Held:
        held = self._held.get(key)
        if held is None:
            raise NotFound(f"this engine holds no adapter {key!r}; load it first.")
        return held

    def _zero_grad(self, key: str) -> None:
        held = self._adapter(key)
        held.begun = False
        if held.optimizer is not None:
            held.optimizer.zero_grad()

    def _trainable(self, key: str) -> tuple[Adapter | FullModel, AdamW]:
        held = self._adapter(key)
        if held.optimizer is None or isinstance(held.adapter, ServedModel):
            raise FailedPrecondition(f"adapter {key!r} was loaded for sampling only; restore it to train it.")
        return held.adapter, held.optimizer

    def _decoder(self, key: str) -> Decoder:
        return self._adapter(key).decoder if key else self.decoder

    def _place(self, chunk: tuple[SequenceState, list[int]]) -> tuple[int, int]:
        """Where a sequence stands in a pass: those that decode first, as they lie in the cache; then by adapter."""
        state, tokens = chunk
        return (0, slot_of(state)) if len(tokens) == 1 else (1, self._slot(state.key))

    def _slot(self, key: str) -> int:
        return self._adapter(key).slot if key else -1

    def _new_slot(self, key: str) -> int:
        if not key:
            raise InvalidArgument("an adapter's key must not be empty: that is the base model.")
        if key in self._held:
            raise AlreadyExists(f"this engine holds an adapter {key!r} already.")
        return self._bank.free_slot()

    def _hold(
        self, key: str, slot: int, adapter: Adapter | FullModel | ServedModel, optimizer: AdamW | None
    ) -> None:
        self._made += 1
        decoder = self.decoder if isinstance(adapter, Adapter) else adapter.decoder
        self._held[key] = Held(slot, adapter, decoder, optimizer, self._made)

    def _hold_trainable(self, key: str, slot: int, adapter: Adapter | FullModel) -> None:
        assert adapter.gradients is not None
        try:
            if isinstance(adapter, Adapter):
                # Now, or a preflight that trusts an earlier measurement would not know of it.
                for linear in self.decoder.weights.linears:
                    linear.prepare()
            optimizer = AdamW(adapter.master, adapter.gradients)
        except BaseException:
            if slot >= 0:
                self._bank.remove(slot)  # nobody has its key, so nobody could give its memory back
            raise
        self._hold(key, slot, adapter, optimizer)

    def _load_trainable(
        self, key: str, folder: Path, lora_dropout: float | None = None
    ) -> Adapter | FullModel:
        slot = self._new_slot(key)
        adapter: Adapter | FullModel
        if is_full(folder):
            slot, adapter = -1, self._full(folder)
        else:
            adapter = self._bank.load(slot, folder, trainable=True, lora_dropout=lora_dropout)
        self._hold_trainable(key, slot, adapter)
        return adapter

    def _discard(self, key: str) -> None:
        self._claims.forget(self._cache_key(key))
        held = self._held.pop(key)
        if held.slot >= 0:
            self._bank.remove(held.slot)

    def _full(self, folder: Path) -> FullModel:
        check_same_architecture(self.spec, folder)
        check_room(self.spec, self.dtype, self.free_bytes())
        return FullModel(self.spec, folder, dtype=self.dtype, device=self.device)

    def _cache_key(self, key: str) -> str:
        if not key:
            return ""
        held = self._adapter(key)
        return f"{key}@{held.serial}.{held.adapter.version}"

    def _rows_pass(self, key: str, rows: Sequence[Sequence[int]], *, training: bool) -> Tensor:
        packed = pack([TrainRow(row, [False] * len(row)) for row in rows])
        slots = [self._slot(key)] * len(rows)
        return rows_pass(self._decoder(key), self._bank, packed, slots, training=training)

    def _run(self, pieces: Sequence[TrainSlice], *, training: bool) -> list[SliceResult]:
        for piece in pieces:
            check_rows(piece.rows, self.context_length, self.spec.vocab_size)
        slots = [self._slot(piece.key) for piece in pieces]
        decoder, *others = dict.fromkeys(self._decoder(piece.key) for piece in pieces)
        if others:
            raise InvalidArgument("the slices of a whole model go through a pass by themselves.")
        return run_slices(decoder, self._bank, pieces, slots, training=training)

    def _sampled_pass(
        self, decoder: Decoder, chunks: Sequence[tuple[SequenceState, list[int]]]
    ) -> list[StepOutput]:
        """The pass of one decoder's sequences, and a token for each that is past its prompt. Spoils those that it gave
        no numbers for."""
        hidden = self._cached_pass(decoder, chunks)
        finite = finite_rows(hidden)
        ends, last = [], 0
        for state, tokens in chunks:
            first, last = last, last + len(tokens)
            state.done += len(tokens)
            if not all(finite[first:last]):
                spoil(state)
            elif state.done == state.total:
                ends.append((state, last - 1))
        if not ends:
            return []
        rows = hidden[torch.tensor([row for _, row in ends], device=self.device)]
        lora = self._bank.plan_head([self._slot(state.key) for state, _ in ends], [1] * len(ends))
        sampled = sample_batch(decoder.logits(rows, lora), [state.sampler for state, _ in ends])
        outputs: list[StepOutput] = []
        for (state, _), one in zip(ends, sampled, strict=True):
            if one is None:
                spoil(state)
            else:
                outputs.append(emit(state, one))
        return outputs

    def _cached_pass(self, decoder: Decoder, chunks: Sequence[tuple[SequenceState, list[int]]]) -> Tensor:
        lengths = [len(tokens) for _, tokens in chunks]
        flat = [token for _, tokens in chunks for token in tokens]
        places = [state.done + i for state, tokens in chunks for i in range(len(tokens))]
        return decoder.forward(
            torch.tensor(flat, device=self.device),
            torch.tensor(places, device=self.device),
            lengths,
            [self._slot(state.key) for state, _ in chunks],
            self._bank,
            cache=self._cache,
            kv_slots=[slot_of(state) for state, _ in chunks],
            past=[state.done for state, _ in chunks],
            reach=[state.total for state, _ in chunks],
        )
