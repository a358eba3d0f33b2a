"""Full-parameter training of small models: an entry of the bank that is a whole copy of the weights.

It has what an adapter has (a flat master and gradients in fp32, a compute copy, PEFT's place taken by a Hugging Face
folder) and a decoder of its own: a pass never mixes decoders. While it is trained it takes `bytes_in_training` a
weight beside the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.engine.base import Decoder, LayerNorms, LayerWeights, Weights
from lathe.engine.frozen import FrozenLinear
from lathe.engine.spec import DecoderSpec
from lathe.engine.trained import TrainedLinear, TrainedNorm
from lathe.engine.weights import groups, load_weights, read_spec, read_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class FullSpec:
    """Every weight of the model is trained; what LoraSpec is for an adapter."""


def bytes_in_training(dtype: torch.dtype) -> int:
    """Bytes a weight while it is trained: master, gradient and AdamW's two moments in fp32, the compute copy."""
    wide = torch.promote_types(dtype, torch.float32)
    return 4 * wide.itemsize + dtype.itemsize


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of the model's file and its place in the flat buffers."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop].view(self.shape)


def parameters(spec: DecoderSpec) -> tuple[Parameter, ...]:
    """Every tensor of the model; those of one fused linear lie side by side, its weights before its biases."""
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
    ]
    affine = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    for prefix in (f"model.layers.{i}." for i in range(spec.layers)):
        for role, path in spec.norms.items():
            shapes += [(f"{prefix}{path}.{part}", (spec.norm_width(role),)) for part in affine]
        for parts in groups(spec).values():
            shapes += [(f"{prefix}{p.path}.weight", (p.out_features, p.in_features)) for p in parts]
            shapes += [(f"{prefix}{p.path}.bias", (p.out_features,)) for p in parts if p.bias]
    shapes += [(f"model.{spec.final_norm}.{part}", (spec.hidden_size,)) for part in affine]
    if not spec.tied_head:
        shapes.append(("lm_head.weight", (spec.vocab_size, spec.hidden_size)))
    if spec.head_bias:
        shapes.append(("lm_head.bias", (spec.vocab_size,)))
    made: list[Parameter] = []
    for name, shape in shapes:
        made.append(Parameter(name, shape, made[-1].stop if made else 0))
    return tuple(made)


class FullModel:
    """A whole copy of the base that is trained, or was: see Adapter for what the attributes mean."""

    def __init__(self, spec: DecoderSpec, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """folder: a Hugging Face folder of the same architecture, from whose weights it starts.

        Raises InvalidArgument naming the tensor that is missing, misshapen or not a number.
        """
        self.version = self.seed = self.steps = 0
        self._config = (folder / CONFIG_FILE).read_bytes()
        self._parameters = parameters(spec)
        wide = torch.promote_types(dtype, torch.float32)
        size = self._parameters[-1].stop
        self.master = torch.empty(size, dtype=wide, device=device)
        self.gradients = torch.zeros_like(self.master)
        self._compute = torch.empty(size, dtype=dtype, device=device)
        self._shifted: list[tuple[Tensor, Tensor]] = []
        shapes = {part.name: part.shape for part in self._parameters}
        places = dict(self.named_tensors())
        for name, tensor in read_tensors(folder, shapes):
            places[name].copy_(tensor)
        check_finite(self.named_tensors())
        self.decoder = Decoder(spec, _Views(spec, self).weights())
        self.publish()

    @property
    def nbytes(self) -> int:
        return self.master.nbytes + self._compute.nbytes

    def publish(self) -> None:
        """Makes the compute copy equal to the master."""
        self._compute.copy_(self.master)
        for weight, master in self._shifted:
            torch.add(master, 1, out=weight)
        self.version += 1

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The names of the model's file and views of the master."""
        return ((part.name, part.of(self.master)) for part in self._parameters)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((part.name, part.of(self.gradients)) for part in self._parameters)

    def save(self, folder: Path, base_model: str = "") -> tuple[str, ...]:
        """Writes a Hugging Face folder in fp32, the same bytes for the same numbers; returns the files' names.

        base_model: written as `_name_or_path`, which transformers keeps for information.
        """
        config = json.loads(self._config)
        config.update(dtype=str(self.master.dtype).removeprefix("torch."))
        config.pop("torch_dtype", None)
        if base_model:
            config["_name_or_path"] = base_model
        (folder / CONFIG_FILE).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.named_tensors())}
        (folder / WEIGHTS_FILE).write_bytes(to_safetensors(tensors, metadata={"format": "pt"}))
        return CONFIG_FILE, WEIGHTS_FILE

    def shifted(self, part: Parameter) -> Tensor:
        """A norm's weight that is 1 + the parameter, kept so by `publish`."""
        weight = torch.empty(part.shape, dtype=self.master.dtype, device=self.master.device)
        self._shifted.append((weight, part.of(self.master)))
        return weight

    def views(self, parts: Sequence[Parameter], *shape: int) -> tuple[Tensor, Tensor]:
        """The compute copy and the gradients of neighbouring parameters, as one tensor of this shape."""
        span = slice(parts[0].start, parts[-1].stop)
        return self._compute[span].view(shape), self.gradients[span].view(shape)


class _Views:
    """The decoder's weights as views of a FullModel's buffers."""

    def __init__(self, spec: DecoderSpec, model: FullModel) -> None:
        self._spec, self._model = spec, model
        self._parts = {part.name: part for part in parameters(spec)}

    def weights(self) -> Weights:
        spec = self._spec
        size = (spec.vocab_size, spec.hidden_size)
        embeddings, gradient = self._model.views([self._parts["model.embed_tokens.weight"]], *size)
        head = (embeddings, gradient)
        if not spec.tied_head:
            head = self._model.views([self._parts["lm_head.weight"]], *size)
        bias = self._pair(["lm_head.bias"] if spec.head_bias else [], spec.vocab_size)
        return Weights(
            FrozenLinear(embeddings, None, packed=False),
            [self._layer(f"model.layers.{i}.") for i in range(spec.layers)],
            self._norm(f"model.{spec.final_norm}", spec.hidden_size),
            TrainedLinear(head[0], bias[0], head[1], bias[1]),
            embeddings_gradient=gradient,
        )

    def _layer(self, prefix: str) -> LayerWeights:
        spec = self._spec
        norms = {role: self._norm(prefix + path, spec.norm_width(role)) for role, path in spec.norms.items()}
        fused: dict[str, Any] = {}
        for group, parts in groups(spec).items():
            rows = sum(part.out_features for part in parts)
            names = [f"{prefix}{part.path}.weight" for part in parts]
            weight = self._model.views([self._parts[name] for name in names], rows, parts[0].in_features)
            bias = self._pair([f"{prefix}{part.path}.bias" for part in parts if part.bias], rows)
            fused[group] = TrainedLinear(weight[0], bias[0], weight[1], bias[1])
        return LayerWeights(norms=LayerNorms(**norms), **fused)

    def _norm(self, path: str, width: int) -> TrainedNorm:
        name = f"{path}.weight"
        weight, gradient = self._model.views([self._parts[name]], width)
        if self._spec.norm == "rms+1":
            weight = self._model.shifted(self._parts[name])
        bias = self._pair([f"{path}.bias"] if self._spec.norm == "layer" else [], width)
        return TrainedNorm(weight, bias[0], self._spec.norm_eps, gradient, bias[1])

    def _pair(self, names: Sequence[str], size: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return self._model.views([self._parts[name] for name in names], size) if names else (None, None)


class ServedModel:
    """A tuned full model that is only sampled: frozen weights and a decoder of its own."""

    def __init__(self, spec: DecoderSpec, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Raises InvalidArgument for weights that do not fit, or hold a NaN or an infinity."""
        self.version = 0
        shapes = {part.name: part.shape for part in parameters(spec)}
        check_finite(read_tensors(folder, shapes))
        self.decoder = Decoder(spec, load_weights(folder, spec, device=device, dtype=dtype))
        self.nbytes = self.decoder.weights.nbytes


def is_full(folder: Path) -> bool:
    """Whether a tuned model's folder holds a whole model (and no adapter)."""
    return not (folder / "adapter_config.json").exists() and (folder / CONFIG_FILE).exists()


def check_same_architecture(spec: DecoderSpec, folder: Path) -> None:
    """Raises InvalidArgument unless the folder's config.json describes the engine's base model."""
    if read_spec(folder) != spec:
        raise InvalidArgument(f"{CONFIG_FILE} describes another architecture than this engine's base model.")


def check_room(spec: DecoderSpec, dtype: torch.dtype, free: int | None) -> None:
    """Raises FailedPrecondition (OUT_OF_MEMORY) unless `free` bytes hold a whole model in training; None: not known.

    It is asked beforehand, since a machine may end a process that takes too much without a word.
    """
    weights, each = parameters(spec)[-1].stop, bytes_in_training(dtype)
    if free is not None and weights * each > free:
        raise FailedPrecondition(
            f"Training all {weights / 1e6:.3g} million weights needs {weights * each / 1e9:.3g} GB of memory ({each} "
            f"bytes each), and {free / 1e9:.3g} GB are free on this engine: train an adapter, or use a bigger machine.",
            reason="OUT_OF_MEMORY",
        )


def check_finite(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Raises InvalidArgument naming a tensor with a NaN or an infinity."""
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidArgument(f"{WEIGHTS_FILE}: {name} holds a NaN or an infinity.")
