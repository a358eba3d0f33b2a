"""An engine without numbers: the verbs' states, orders and refusals, its weights a hash of what it was given.

Equal histories give equal files, and any difference (a slice more, another learning rate) gives other ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lathe.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, LatheError, NotFound
from lathe.engine.batch import CrossEntropy, SliceResult, TrainRow, TrainSlice, trained_tokens
from lathe.engine.engine import EngineMemory
from lathe.engine.full import FullSpec
from lathe.engine.lora_config import ALL_LINEAR, LoraSpec
from lathe.engine.sampling import Sampled, SamplingParams
from lathe.engine.sequences import StepOutput, spoil
from lathe.text.architectures import LINEAR_MODULES

CONTEXT = 64
VOCABULARY = 512
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
FULL_FILES = ("config.json", "model.safetensors")


@dataclass(eq=False)
class FakeSequence:
    key: str
    prompt: tuple[int, ...]
    limit: int
    stop_ids: frozenset[int]
    done: int = 0
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    failure: LatheError | None = None
    cached_tokens: int = 0
    closed: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)


@dataclass
class _Adapter:
    config: dict[str, object]
    state: str
    trainable: bool
    steps: int = 0
    gradient: list[str] = field(default_factory=list)
    users: int = 0


class FakeEngine:
    """calls: what was done, in order: `train <keys>`, `optim <key>`, `eval <keys>`,
    `sample <n>`.

    before_pass: called with each training pass's slices; may raise, as torch does out of memory. bytes_per_token: what
    measure says that a pass takes. overflows: for which adapters the model's numbers are not finite.
    """

    bytes_per_token = 1000
    workers = 1

    def __init__(self, before_pass: Callable[[Sequence[TrainSlice]], None] | None = None) -> None:
        self.calls: list[str] = []
        self._before = before_pass
        self._adapters: dict[str, _Adapter] = {}
        self.open: list[FakeSequence] = []
        self.context_length = CONTEXT
        self.overflows: set[str] = set()

    def create_adapter(self, key: str, config: LoraSpec | FullSpec, seed: int) -> None:
        self._new(key)
        if isinstance(config, FullSpec):
            self._adapters[key] = _Adapter({"full": True}, _hash("full", seed), trainable=True)
            return
        if unknown := set(config.target_modules) - {ALL_LINEAR, *LINEAR_MODULES, "embed_tokens", "lm_head"}:
            raise InvalidArgument(f"target_modules: {sorted(unknown)} are not in this model.")
        self._adapters[key] = _Adapter(config.to_config(), _hash("new", seed, config.r), trainable=True)

    def continue_adapter(self, key: str, folder: Path, seed: int, lora_dropout: float | None = None) -> None:
        self._new(key)
        self._adapters[key] = adapter = self._read(folder, trainable=True)
        if lora_dropout is not None and not adapter.config.get("full"):
            adapter.config = {**adapter.config, "lora_dropout": lora_dropout}

    def joins(self, key: str) -> bool:
        return "full" not in self._adapter(key).config

    def measure(self, key: str, rows: Sequence[TrainRow]) -> int | None:
        self._trainable(key)
        self.calls.append(f"measure {key} {sum(len(row.tokens) for row in rows)}")
        return sum(len(row.tokens) for row in rows) * self.bytes_per_token

    def load_adapter(self, key: str, folder: Path) -> None:
        self._new(key)
        self._adapters[key] = self._read(folder, trainable=False)

    def load_reference(self, key: str, folder: Path) -> None:
        self.load_adapter(key, folder)

    def drop_adapter(self, key: str) -> None:
        if self._adapter(key).users:
            raise FailedPrecondition(f"adapter {key!r} is in use.")
        del self._adapters[key]

    def adapter_keys(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        adapters = [self._trainable(piece.key) for piece in pieces]
        if self._before is not None:
            self._before(pieces)
        self.calls.append("train " + " ".join(piece.key for piece in pieces))
        if len({adapter.config.get("full") for adapter in adapters}) > 1:
            raise InvalidArgument("the slices of a whole model go through a pass by themselves.")
        for adapter, piece in zip(adapters, pieces, strict=True):
            objective = piece.objective
            scale = (
                objective.batch_tokens if isinstance(objective, CrossEntropy) else type(objective).__name__
            )
            adapter.gradient.append(_hash(scale, [list(map(int, row.tokens)) for row in piece.rows]))
        return [self._result(adapter, piece) for adapter, piece in zip(adapters, pieces, strict=True)]

    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        self.calls.append("eval " + " ".join(piece.key for piece in pieces))
        return [self._result(self._adapters.get(piece.key), piece) for piece in pieces]

    def optim_step(self, key: str, lr: float, *, clip: float = 1.0, weight_decay: float = 0.0) -> float:
        adapter = self._trainable(key)
        self.calls.append(f"optim {key}")
        adapter.state = _hash(adapter.state, adapter.gradient, lr, clip, weight_decay)
        adapter.gradient = []
        adapter.steps += 1
        return 1.0

    def zero_grad(self, key: str) -> None:
        self._adapter(key).gradient = []

    def save(self, key: str, folder: Path, *, with_optimizer: bool, base_model: str = "") -> tuple[str, ...]:
        adapter = self._adapter(key)
        folder.mkdir(parents=True, exist_ok=True)
        config = adapter.config | {"base_model_name_or_path": base_model}
        names = FULL_FILES if "full" in adapter.config else ADAPTER_FILES
        (folder / names[0]).write_text(json.dumps(config, sort_keys=True))
        (folder / names[1]).write_text(adapter.state)
        if not with_optimizer:
            return names
        (folder / "optimizer.safetensors").write_text(str(adapter.steps))
        return (*names, "optimizer.safetensors")

    def restore(self, key: str, folder: Path) -> int:
        self._new(key)
        if not (folder / "optimizer.safetensors").is_file():
            raise InvalidArgument("optimizer.safetensors cannot be read.")
        adapter = self._read(folder, trainable=True)
        adapter.steps = int((folder / "optimizer.safetensors").read_text())
        self._adapters[key] = adapter
        return adapter.steps

    def open_sequence(self, key: str, prompt: Sequence[int], params: SamplingParams) -> FakeSequence:
        adapter = self._adapter(key) if key else None
        if not prompt:
            raise InvalidArgument("the prompt has no tokens.")
        room = CONTEXT - len(prompt)
        if room < 1:
            raise InvalidArgument("the prompt is too long.")
        if adapter is not None:
            adapter.users += 1
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        state = FakeSequence(key, tuple(prompt), limit, params.stop_ids)
        self.open.append(state)
        return state

    def step(self, sequences: Sequence[FakeSequence], *, prefill_tokens: int = 256) -> list[StepOutput]:
        outputs, room = [], prefill_tokens
        work = [state for state in sequences if state.finished is None and not state.closed]
        self.calls.append(f"sample {len(work)}")
        for state in work:
            missing = len(state.prompt) - state.done
            taken = min(missing, room)
            state.done, room = state.done + taken, room - taken
            if state.done < len(state.prompt):
                continue
            if state.key in self.overflows:
                spoil(state)  # type: ignore[arg-type]
                continue
            token = int(_hash(state.prompt, len(state.tokens))[:4], 16) % VOCABULARY
            state.tokens.append(token)
            if token in state.stop_ids:
                state.finished = "stop"
            elif len(state.tokens) == state.limit:
                state.finished = "length"
            outputs.append(StepOutput(state, Sampled(token, float("nan"), ())))  # type: ignore[arg-type]
        return outputs

    def close_sequence(self, state: FakeSequence) -> None:
        if state.closed:
            return
        state.closed = True
        self.open.remove(state)
        if state.key in self._adapters:
            self._adapters[state.key].users -= 1

    def memory(self) -> EngineMemory:
        return EngineMemory(1000, 10 * len(self._adapters), 0, len(self.open), 1 << 20)

    def _loss(self, adapter: _Adapter | None) -> float:
        """Of a token: less with each step."""
        return 2.0 / (1 + (adapter.steps if adapter is not None else 0))

    def _result(self, adapter: _Adapter | None, piece: TrainSlice) -> SliceResult:
        counts = [trained_tokens(row) for row in piece.rows]
        losses = [self._loss(adapter) * count for count in counts]
        if isinstance(piece.objective, CrossEntropy):
            loss, figures = sum(losses) / max(1, piece.objective.batch_tokens), {}
        else:
            sums = torch.tensor([-loss for loss in losses], dtype=torch.float64)
            answer = piece.objective(sums, torch.tensor(counts, dtype=torch.float64))
            loss, figures = float(answer.loss), dict(answer.figures)
        tokens = sum(counts)
        return SliceResult(sum(losses), tokens, tokens // 2, piece.input_tokens, loss, figures, tuple(losses))

    def _read(self, folder: Path, *, trainable: bool) -> _Adapter:
        names = FULL_FILES if (folder / FULL_FILES[0]).exists() else ADAPTER_FILES
        path = folder / names[1]
        if not path.is_file():
            raise InvalidArgument(f"the adapter has no {names[1]}.")
        config = json.loads((folder / names[0]).read_text())
        return _Adapter(config, path.read_text(), trainable)

    def _new(self, key: str) -> None:
        if not key:
            raise InvalidArgument("an adapter's key must not be empty.")
        if key in self._adapters:
            raise AlreadyExists(f"there is an adapter {key!r} already.")

    def _adapter(self, key: str) -> _Adapter:
        if key not in self._adapters:
            raise NotFound(f"there is no adapter {key!r}.")
        return self._adapters[key]

    def _trainable(self, key: str) -> _Adapter:
        if not self._adapter(key).trainable:
            raise FailedPrecondition(f"adapter {key!r} is for sampling only.")
        return self._adapters[key]


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=list).encode()).hexdigest()
