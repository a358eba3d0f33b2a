"""LoRA adapters on one frozen base, in PEFT's semantics and file format.

y = W x + s B A x with s = lora_alpha / r (or / sqrt(r) with use_rslora; Hu et al. 2021, Kalajdzievski 2023).

An adapter's parameters are one flat fp32 buffer (the master), all A first, then all B; gradients have the same
layout, and the compute copy is in the base's dtype with s folded into B. Modules that share an input (q, k, v and
gate, up) have their A's side by side, so that one product makes all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.engine.frozen import FrozenLinear
from lathe.text.architectures import ALL_LINEAR_MODULES, LINEAR_MODULES

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers"
# What a config may hold beside the fields of LoraSpec: refused unless empty, because it changes the arithmetic.
_REFUSED = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "fan_in_fan_out",
    "layer_replication", "layers_pattern", "layers_to_transform", "lora_bias", "lora_dropout", "modules_to_save",
    "rank_pattern",
    "target_parameters", "trainable_token_indices", "use_dora", "use_qalora",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The part of PEFT's LoraConfig that Lathe trains and serves. Raises InvalidArgument naming the field."""

    r: int = 16
    lora_alpha: float = 32
    target_modules: tuple[str, ...] = LINEAR_MODULES
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.r <= 1024:
            raise _invalid("r", f"{self.r} is outside 1 … 1024")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise _invalid("lora_alpha", f"{self.lora_alpha} is not a positive number")
        unknown = sorted(set(self.target_modules) - set(ALL_LINEAR_MODULES))
        if unknown or not self.target_modules:
            text = f"{unknown or 'empty'}; choose from {', '.join(ALL_LINEAR_MODULES)}"
            raise _invalid("target_modules", text)

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_config(self, base_model: str = "") -> dict[str, object]:
        """adapter_config.json as PEFT reads it."""
        alpha = int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha
        return {
            "base_model_name_or_path": base_model or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "target_modules": sorted(self.target_modules),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.use_rslora,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, object], linears: Sequence[str] = LINEAR_MODULES) -> LoraSpec:
        """Reads an adapter_config.json. Raises InvalidArgument for what would change the arithmetic unseen.

        linears: what "all-linear" stands for.
        """
        if config.get("peft_type") != "LORA":
            raise _invalid("peft_type", f"{config.get('peft_type')!r}; only LORA adapters are supported")
        if config.get("bias", "none") != "none":
            raise _invalid("bias", f"{config['bias']!r}; only 'none' is supported")
        for name in _REFUSED:
            if config.get(name):
                raise _invalid(name, f"{config[name]!r}; this option is not supported")
        modules = config.get("target_modules")
        if modules == "all-linear":
            modules = list(linears)
        if not isinstance(modules, list):
            raise _invalid("target_modules", "a list of module names is needed")
        r, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(r, int) or not isinstance(alpha, int | float):
            raise _invalid("r", "r and lora_alpha must be numbers")
        order = {name: i for i, name in enumerate(ALL_LINEAR_MODULES)}
        names = sorted({str(m) for m in modules}, key=lambda m: order.get(m, len(order)))
        return cls(r, float(alpha), tuple(names), bool(config.get("use_rslora", False)))


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """One linear as PEFT names it, and where its rows lie in the fused linear of its group."""

    path: str  # "self_attn.q_proj"
    group: str  # "qkv"
    in_features: int
    out_start: int
    out_stop: int

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[1]

    @property
    def out_features(self) -> int:
        return self.out_stop - self.out_start


@dataclass(slots=True)
class LoraModule:
    """B of one module in a group. b [out, r] has the scale folded in; columns r_start:r_stop of u belong to it."""

    out_start: int
    out_stop: int
    r_start: int
    r_stop: int
    b: Tensor
    grad_b: Tensor | None


@dataclass(slots=True)
class LoraGroup:
    """The LoRA of one fused linear of one layer: a [sum of r, in]."""

    a: Tensor
    grad_a: Tensor | None
    scale: float
    modules: list[LoraModule]


GroupKey = tuple[int, str]


class Adapter:
    """The tensors of one adapter. Caches key on `serial` (set by the bank, never used twice) and `version`, which
    grows whenever the compute copy changes."""

    def __init__(
        self,
        spec: LoraSpec,
        shapes: Sequence[ModuleShape],
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        trainable: bool,
    ) -> None:
        self.spec = spec
        self.serial = 0
        self.version = 0
        chosen = [shape for shape in shapes if shape.name in spec.target_modules]
        self._places: dict[tuple[int, str, str], tuple[int, tuple[int, int]]] = {}
        offset = 0
        for part in ("A", "B"):
            for layer in range(layers):
                for shape in chosen:
                    size = (spec.r, shape.in_features) if part == "A" else (shape.out_features, spec.r)
                    self._places[layer, shape.path, part] = (offset, size)
                    offset += size[0] * size[1]
            if part == "A":
                self._b_start = offset
        self.master = torch.zeros(offset, dtype=torch.float32, device=device)
        self.gradients = torch.zeros_like(self.master) if trainable else None
        self._compute = torch.zeros(offset, dtype=dtype, device=device)
        self.groups: dict[GroupKey, LoraGroup] = {}
        for layer in range(layers):
            for name in dict.fromkeys(shape.group for shape in chosen):
                members = [shape for shape in chosen if shape.group == name]
                self.groups[layer, name] = self._group(layer, members)

    @property
    def nbytes(self) -> int:
        return self.master.nbytes + self._compute.nbytes

    def publish(self) -> None:
        """Makes the compute copy equal to the master: after initialising, loading and each optimiser step."""
        self._compute[: self._b_start].copy_(self.master[: self._b_start])
        self._compute[self._b_start :].copy_(self.master[self._b_start :] * self.spec.scale)
        self.version += 1

    def initialise(self, seed: int) -> None:
        """Draws A as PEFT does, B stays zero; the global generator is not touched.

        The numbers are those of `torch.manual_seed(seed); get_peft_model(model, config)` bit for bit: PEFT makes
        two nn.Linear per module in the model's order (each drawing its default weights), then redraws A with
        kaiming_uniform(a=sqrt(5)).
        """
        generator = torch.Generator().manual_seed(seed)
        for layer, path in dict.fromkeys((layer, path) for layer, path, _ in self._places):
            a, b = self._view(self.master, layer, path, "A"), self._view(self.master, layer, path, "B")
            draw = torch.empty(a.shape)
            torch.nn.init.kaiming_uniform_(draw, a=math.sqrt(5), generator=generator)
            torch.nn.init.kaiming_uniform_(torch.empty(b.shape), a=math.sqrt(5), generator=generator)
            torch.nn.init.kaiming_uniform_(draw, a=math.sqrt(5), generator=generator)
            a.copy_(draw)
        self.publish()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """PEFT's names and views of the fp32 master."""
        for layer, path, part in self._places:
            yield f"{_PREFIX}.{layer}.{path}.lora_{part}.weight", self._view(self.master, layer, path, part)

    def save(self, folder: Path, base_model: str = "") -> tuple[str, ...]:
        """Writes the two files PEFT loads, the same bytes for the same numbers; returns their names."""
        text = json.dumps(self.spec.to_config(base_model), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.named_tensors())}
        (folder / WEIGHTS_FILE).write_bytes(to_safetensors(tensors, metadata={"format": "pt"}))
        return CONFIG_FILE, WEIGHTS_FILE

    def load_weights(self, folder: Path) -> None:
        """Reads adapter_model.safetensors. Raises InvalidArgument naming a missing, unknown or misshapen tensor."""
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise InvalidArgument(
                f"the adapter has no {WEIGHTS_FILE}; only safetensors are read, never pickle."
            )
        wanted = dict(self.named_tensors())
        try:
            with safe_open(str(path), framework="pt") as file:
                names = set(file.keys())
                if names != set(wanted):
                    odd = sorted(names ^ set(wanted))[0]
                    what = "is missing" if odd in wanted else "is not a tensor of this base model's LoRA"
                    raise InvalidArgument(f"{WEIGHTS_FILE}: {odd} {what}.")
                for name, target in wanted.items():
                    tensor = file.get_tensor(name)
                    if tensor.shape != target.shape:
                        shapes = f"{tuple(tensor.shape)}, the base model needs {tuple(target.shape)}"
                        raise InvalidArgument(f"{WEIGHTS_FILE}: {name} is {shapes}.")
                    target.copy_(tensor)
        except SafetensorError as error:
            raise InvalidArgument(f"{WEIGHTS_FILE} cannot be read: {error}") from error
        self.publish()

    def _view(self, flat: Tensor, layer: int, path: str, part: str) -> Tensor:
        offset, size = self._places[layer, path, part]
        return flat[offset : offset + size[0] * size[1]].view(size)

    def _group(self, layer: int, members: list[ModuleShape]) -> LoraGroup:
        r, first = self.spec.r, self._places[layer, members[0].path, "A"][0]
        rows, width = r * len(members), members[0].in_features
        grads = self.gradients
        modules = [
            LoraModule(
                shape.out_start, shape.out_stop, i * r, (i + 1) * r,
                self._view(self._compute, layer, shape.path, "B"),
                None if grads is None else self._view(grads, layer, shape.path, "B"),
            )
            for i, shape in enumerate(members)
        ]  # fmt: skip
        a = self._compute[first : first + rows * width].view(rows, width)
        grad_a = None if grads is None else grads[first : first + rows * width].view(rows, width)
        return LoraGroup(a, grad_a, self.spec.scale, modules)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start:stop of a pass go through this adapter."""

    adapter: Adapter
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MixedGroup:
    """One fused linear's LoRA of several adapters side by side: b is block-diagonal over the modules.

    pattern: index into MixedLora.masks (which adapter owns each column of u).
    """

    a: FrozenLinear
    b: FrozenLinear
    pattern: int


@dataclass(frozen=True, slots=True)
class MixedLora:
    """Adapters side by side for a pass: one product makes every adapter's u, and the mask [T, columns] leaves each
    token its own adapter's columns (None: a single adapter for all tokens)."""

    groups: dict[GroupKey, MixedGroup]
    masks: list[Tensor | None]


@dataclass(slots=True)
class LoraPass:
    """How LoRA is applied in one pass. `anchor` is there in training passes only (see kernels.linear)."""

    segments: list[Segment] = field(default_factory=list)
    mixed: MixedLora | None = None
    anchor: Tensor | None = None


# Sampling passes up to this size take their adapters side by side, in the frozen linears' layout: measured 29 against
# 73 us a linear at 8 tokens of one adapter, 54 against 93 with 8 adapters. Larger ones go adapter by adapter.
MIXED_TOKENS = 320
MIXED_ADAPTERS = 16


class AdapterBank:
    """The adapters on one base, by slot number; -1 means the base alone."""

    def __init__(
        self, shapes: Sequence[ModuleShape], layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes, self._layers, self._dtype, self._device = tuple(shapes), layers, dtype, device
        self._slots: dict[int, Adapter] = {}
        self._made = 0
        self._mixed_key: tuple[tuple[int, int], ...] = ()
        self._mixed = _SideBySide({}, [])

    def __getitem__(self, slot: int) -> Adapter:
        return self._slots[slot]

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._slots.values())

    def new_trainable(self, slot: int, spec: LoraSpec, seed: int) -> Adapter:
        """A fresh adapter (see Adapter.initialise) in a free slot."""
        adapter = self._add(slot, spec, trainable=True)
        adapter.initialise(seed)
        return adapter

    def load(self, slot: int, folder: Path, *, trainable: bool = False) -> Adapter:
        """An adapter from PEFT's files. Raises InvalidArgument."""
        adapter = self._add(slot, read_spec(folder, self.linears), trainable=trainable)
        try:
            adapter.load_weights(folder)
        except InvalidArgument:
            self.remove(slot)
            raise
        return adapter

    def remove(self, slot: int) -> None:
        del self._slots[slot]
        self._mixed_key, self._mixed = (), _SideBySide({}, [])

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the base's linears that an adapter may have."""
        return tuple(shape.name for shape in self._shapes)

    def free_slot(self) -> int:
        return next(slot for slot in range(len(self._slots) + 1) if slot not in self._slots)

    def plan(self, slots: Sequence[int], lengths: Sequence[int], *, training: bool) -> LoraPass:
        """The LoRA of a pass whose sequences have these slots and token counts."""
        runs: list[Segment] = []
        start = 0
        for slot, length in zip(slots, lengths, strict=True):
            if slot >= 0:
                if runs and runs[-1].adapter is self._slots[slot] and runs[-1].stop == start:
                    runs[-1] = Segment(runs[-1].adapter, runs[-1].start, start + length)
                else:
                    runs.append(Segment(self._slots[slot], start, start + length))
            start += length
        if training:
            return LoraPass(runs, anchor=torch.zeros((), device=self._device, requires_grad=True))
        if runs and start <= MIXED_TOKENS and len({id(run.adapter) for run in runs}) <= MIXED_ADAPTERS:
            return LoraPass(mixed=self._mix(slots, lengths))
        return LoraPass(runs)

    def _add(self, slot: int, spec: LoraSpec, *, trainable: bool) -> Adapter:
        if unknown := [name for name in spec.target_modules if name not in self.linears]:
            text = f"this base model has no {', '.join(unknown)}; choose from {', '.join(self.linears)}"
            raise _invalid("target_modules", text)
        adapter = Adapter(spec, self._shapes, self._layers, self._dtype, self._device, trainable=trainable)
        self._made += 1
        adapter.serial = self._made
        self._slots[slot] = adapter
        return adapter

    def _mix(self, slots: Sequence[int], lengths: Sequence[int]) -> MixedLora:
        active = sorted({slot for slot in slots if slot >= 0})
        key = tuple((slot, self._slots[slot].version) for slot in active)
        if not set(key) <= set(self._mixed_key):
            widths = {shape.group: shape.out_stop for shape in self._shapes}
            self._mixed = _side_by_side([self._slots[slot] for slot in active], widths)
            self._mixed_key = key
        if len(self._mixed_key) == 1 and min(slots) >= 0:
            return MixedLora(self._mixed.groups, [None] * len(self._mixed.patterns))
        places = {slot: i for i, (slot, _) in enumerate(self._mixed_key)}
        owner = torch.tensor([places.get(slot, -1) for slot in slots])
        owner = owner.repeat_interleave(torch.tensor(list(lengths)))[:, None]
        masks = [
            (owner == torch.tensor(columns)).to(self._device, self._dtype) for columns in self._mixed.patterns
        ]
        return MixedLora(self._mixed.groups, [*masks])


@dataclass(frozen=True, slots=True)
class _SideBySide:
    groups: dict[GroupKey, MixedGroup]
    patterns: list[tuple[int, ...]]  # which adapter owns each column


def _side_by_side(adapters: Sequence[Adapter], widths: Mapping[str, int]) -> _SideBySide:
    """widths: outputs of each fused linear."""
    made = _SideBySide({}, [])
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.groups):
        parts = [(i, adapter.groups[key]) for i, adapter in enumerate(adapters) if key in adapter.groups]
        a = torch.cat([part.a for _, part in parts])
        b = a.new_zeros((widths[key[1]], a.shape[0]))
        columns: list[int] = []
        for owner, part in parts:
            for module in part.modules:
                width = module.r_stop - module.r_start
                b[module.out_start : module.out_stop, len(columns) : len(columns) + width] = module.b
                columns += [owner] * width
        if tuple(columns) not in made.patterns:
            made.patterns.append(tuple(columns))
        made.groups[key] = MixedGroup(
            FrozenLinear(a, None), FrozenLinear(b, None), made.patterns.index(tuple(columns))
        )
    return made


def read_spec(folder: Path, linears: Sequence[str] = LINEAR_MODULES) -> LoraSpec:
    """The LoraSpec of an adapter folder; linears: what "all-linear" stands for. Raises InvalidArgument."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"the adapter's {CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InvalidArgument(f"the adapter's {CONFIG_FILE} is not a JSON object.")
    return LoraSpec.from_config(config, linears)


def _invalid(name: str, what: str) -> InvalidArgument:
    return InvalidArgument(f"{name}: {what}.", violations=(FieldViolation(name, what),))
