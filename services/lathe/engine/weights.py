"""From a Hugging Face folder (config.json and safetensors) to our weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.base import LayerNorms, LayerWeights, Weights
from lathe.engine.frozen import Frozen, FrozenLinear
from lathe.engine.jsonfile import read_object
from lathe.engine.norms import Norm
from lathe.engine.parts import ALWAYS_THERE, Parts
from lathe.engine.quantized import NF4Linear
from lathe.engine.spec import DecoderSpec
from lathe.text.layout import Linear

_INDEX = "model.safetensors.index.json"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def read_spec(folder: Path) -> DecoderSpec:
    """The spec of a folder's config.json. Raises InvalidArgument."""
    config = read_object(folder / "config.json")
    return DecoderSpec.from_config(config)


class Placement(Protocol):
    """Where the weights are kept that are read: linears are made as a part's tensors come, part by part."""

    @property
    def parts(self) -> Parts: ...

    def linear(self, weights: Sequence[Tensor], bias: Tensor | None) -> Frozen:
        """A layer's: the pieces of W [out, in] along its outputs."""

    def ends(self, table: Tensor, head: Tensor | None, bias: Tensor | None) -> tuple[Frozen, Frozen]:
        """The embeddings and the head [vocab, hidden]; None: the head is the embeddings' table."""

    def complete(self, layer: int, linears: Sequence[Frozen]) -> None:
        """Called when a layer's linears are made, before the next layer is read."""


class Whole:
    """All of them in this process. quantization: "nf4" keeps the layers' linears in 4 bits, which raises
    FailedPrecondition without what that needs."""

    parts: Parts = ALWAYS_THERE

    def __init__(self, quantization: str = "none") -> None:
        self._quantize = quantization == "nf4"

    def linear(self, weights: Sequence[Tensor], bias: Tensor | None) -> Frozen:
        return NF4Linear(weights, bias) if self._quantize else FrozenLinear(join(weights), bias)

    def ends(self, table: Tensor, head: Tensor | None, bias: Tensor | None) -> tuple[Frozen, Frozen]:
        # Rows are looked up in the table as it is: packed it could not be read.
        return FrozenLinear(table, None, packed=False), FrozenLinear(table if head is None else head, bias)

    def complete(self, layer: int, linears: Sequence[Frozen]) -> None:
        pass


def load_weights(
    folder: Path, spec: DecoderSpec, *, device: torch.device, dtype: torch.dtype, to: Placement | None = None
) -> Weights:
    """Reads the weights a layer at a time (memory-mapped), in the compute dtype.

    to: where they are kept; Whole if left out. Raises InvalidArgument for pickle weights, a missing file or tensor, or
    a shape config.json does not give, and what the placement raises.
    """
    with ExitStack() as stack:
        return _Reader(folder, stack, device, dtype).weights(spec, Whole() if to is None else to)


def read_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a folder one by one, on the CPU in fp32. Raises as load_weights does."""
    with ExitStack() as stack:
        reader = _Reader(folder, stack, torch.device("cpu"), torch.float32)
        for name, shape in shapes.items():
            yield name, reader.read(name, *shape)


def random_weights(
    spec: DecoderSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    std: float = 0.02,
    to: Placement | None = None,
) -> Weights:
    """Weights drawn at random with this standard deviation, head tied, no biases: for benchmarks and tests.

    to: where they are kept; Whole if left out.
    """
    place = Whole() if to is None else to
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.empty(size).normal_(std=std, generator=generator).to(device, dtype)

    def norm(width: int) -> Norm:
        bias = torch.zeros(width, device=device, dtype=dtype) if spec.norm == "layer" else None
        return Norm(torch.ones(width, device=device, dtype=dtype), bias, spec.norm_eps)

    def layer(number: int) -> LayerWeights:
        fused = {
            group: place.linear([draw(sum(part.out_features for part in parts), parts[0].in_features)], None)
            for group, parts in groups(spec).items()
        }
        place.complete(number, list(fused.values()))
        norms = {role: norm(spec.norm_width(role)) for role in spec.norms}
        return LayerWeights(norms=LayerNorms(**norms), **fused)

    embeddings = draw(spec.vocab_size, spec.hidden_size)
    layers = [layer(number) for number in range(spec.layers)]
    table, head = place.ends(embeddings, None, None)
    return Weights(table, layers, norm(spec.hidden_size), head, parts=place.parts)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU, and on a CPU that multiplies it faster than float32 (a probe of about 50 ms)."""
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise InvalidArgument(f"dtype {name!r} is not known; use auto, bfloat16 or float32.")
    if device.type != "cpu":
        return torch.bfloat16
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16 if _gemm_seconds(torch.bfloat16) < _gemm_seconds(torch.float32) else torch.float32


def _gemm_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones((256, 512), dtype=dtype), torch.ones((512, 512), dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best


class _Reader:
    def __init__(self, folder: Path, stack: ExitStack, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise InvalidArgument(f"{path.name} cannot be read as safetensors: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def weights(self, spec: DecoderSpec, to: Placement) -> Weights:
        hidden, vocab = spec.hidden_size, spec.vocab_size
        table, head = to.ends(
            self.read("model.embed_tokens.weight", vocab, hidden),
            None if spec.tied_head else self.read("lm_head.weight", vocab, hidden),
            self.read("lm_head.bias", vocab) if spec.head_bias else None,
        )
        layers = [self._layer(spec, i, to) for i in range(spec.layers)]
        final = self._norm(spec, f"model.{spec.final_norm}", hidden)
        return Weights(table, layers, final, head, parts=to.parts)

    def _layer(self, spec: DecoderSpec, layer: int, to: Placement) -> LayerWeights:
        prefix = f"model.layers.{layer}."
        fused = {group: self._fused(prefix, parts, to) for group, parts in groups(spec).items()}
        to.complete(layer, list(fused.values()))
        norms = {
            role: self._norm(spec, prefix + path, spec.norm_width(role)) for role, path in spec.norms.items()
        }
        return LayerWeights(norms=LayerNorms(**norms), **fused)

    def _fused(self, prefix: str, parts: Sequence[Linear], to: Placement) -> Frozen:
        weights = [self.read(f"{prefix}{p.path}.weight", p.out_features, p.in_features) for p in parts]
        biases = [self.read(f"{prefix}{p.path}.bias", p.out_features) for p in parts if p.bias]
        return to.linear(weights, join(biases) if biases else None)

    def _norm(self, spec: DecoderSpec, path: str, width: int) -> Norm:
        bias = self.read(f"{path}.bias", width) if spec.norm == "layer" else None
        if spec.norm != "rms+1":
            return Norm(self.read(f"{path}.weight", width), bias, spec.norm_eps)
        # 1 + w would be rounded in bfloat16.
        exact = torch.promote_types(self._dtype, torch.float32)
        return Norm(1 + self.read(f"{path}.weight", width, dtype=exact), bias, spec.norm_eps)

    def read(self, name: str, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        file = self._files.get(name)
        if file is None:
            raise InvalidArgument(f"the weights have no tensor {name}, which config.json asks for.")
        tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != size:
            raise InvalidArgument(f"tensor {name} is {tuple(tensor.shape)}; config.json asks for {size}.")
        if not tensor.is_floating_point():
            raise InvalidArgument(
                f"tensor {name} is {tensor.dtype}; only floating point weights are supported."
            )
        return tensor.to(self._device, dtype or self._dtype)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, sharded or not. Raises InvalidArgument (naming pickle where it is)."""
    if (folder / _INDEX).is_file():
        mapping = read_object(folder / _INDEX).get("weight_map")
        if not isinstance(mapping, Mapping):
            raise InvalidArgument(f"{_INDEX} has no weight_map.")
        names = sorted({str(name) for name in mapping.values()})
        odd = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if odd:
            raise InvalidArgument(f"{_INDEX} names {odd[0]!r}, which is not a safetensors file beside it.")
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise InvalidArgument(
                f"{pickled[0]} is a pickle, which can run code; convert the weights to safetensors."
            )
        raise InvalidArgument(f"the folder has no {missing[0]}.")
    return tuple(folder / name for name in names)


def groups(spec: DecoderSpec) -> dict[str, list[Linear]]:
    """The linears of a layer by the fused one they make up."""
    groups: dict[str, list[Linear]] = {}
    for part in spec.linears:
        groups.setdefault(part.group, []).append(part)
    return groups


def join(parts: Sequence[Tensor]) -> Tensor:
    """Along their outputs."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
