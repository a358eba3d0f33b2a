"""From a Hugging Face folder (config.json and safetensors) to our weights."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.base import LayerWeights, Weights
from lathe.engine.frozen import FrozenLinear
from lathe.engine.spec import DecoderSpec

_INDEX = "model.safetensors.index.json"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def read_spec(folder: Path) -> DecoderSpec:
    """The spec of a folder's config.json. Raises InvalidArgument."""
    config = _json(folder / "config.json")
    return DecoderSpec.from_config(config)


def load_weights(folder: Path, spec: DecoderSpec, *, device: torch.device, dtype: torch.dtype) -> Weights:
    """Reads the weights a layer at a time (memory-mapped), in the compute dtype.

    Raises InvalidArgument for pickle weights, a missing file or tensor, or a shape config.json does not give.
    """
    with ExitStack() as stack:
        return _Reader(folder, stack, device, dtype).weights(spec)


def random_weights(
    spec: DecoderSpec, *, device: torch.device, dtype: torch.dtype, seed: int = 0, std: float = 0.02
) -> Weights:
    """Weights drawn at random with this standard deviation, head tied, no biases: for benchmarks and tests."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.empty(size).normal_(std=std, generator=generator).to(device, dtype)

    def frozen(out: int, width: int) -> FrozenLinear:
        return FrozenLinear(draw(out, width), None)

    hidden, inter = spec.hidden_size, spec.intermediate_size
    ones = torch.ones(hidden, device=device, dtype=dtype)
    layers = [
        LayerWeights(
            input_norm=ones,
            qkv=frozen(spec.q_size + 2 * spec.kv_size, hidden),
            o=frozen(hidden, spec.q_size),
            post_norm=ones,
            gate_up=frozen(2 * inter, hidden),
            down=frozen(hidden, inter),
        )
        for _ in range(spec.layers)
    ]
    embeddings = draw(spec.vocab_size, hidden)
    return Weights(embeddings, layers, ones, FrozenLinear(embeddings, None))


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

    def weights(self, spec: DecoderSpec) -> Weights:
        hidden, vocab = spec.hidden_size, spec.vocab_size
        embeddings = self._read("model.embed_tokens.weight", vocab, hidden)
        head = embeddings if spec.tied_head else self._read("lm_head.weight", vocab, hidden)
        layers = [self._layer(spec, f"model.layers.{i}.") for i in range(spec.layers)]
        return Weights(embeddings, layers, self._read("model.norm.weight", hidden), FrozenLinear(head, None))

    def _layer(self, spec: DecoderSpec, prefix: str) -> LayerWeights:
        bias = {"self_attn": spec.attention_bias, "mlp": spec.mlp_bias}
        fused: dict[str, FrozenLinear] = {}
        shapes = spec.module_shapes()
        for group in dict.fromkeys(shape.group for shape in shapes):
            members = [shape for shape in shapes if shape.group == group]
            paths = [prefix + shape.path for shape in members]
            sizes = [shape.out_features for shape in members]
            rows = [
                self._read(f"{p}.weight", n, members[0].in_features)
                for p, n in zip(paths, sizes, strict=True)
            ]
            biases = (
                [self._read(f"{p}.bias", n) for p, n in zip(paths, sizes, strict=True)]
                if bias[members[0].path.split(".")[0]]
                else []
            )
            fused[group] = FrozenLinear(_join(rows), _join(biases) if biases else None)
        return LayerWeights(
            input_norm=self._read(prefix + "input_layernorm.weight", spec.hidden_size),
            post_norm=self._read(prefix + "post_attention_layernorm.weight", spec.hidden_size),
            **fused,
        )

    def _read(self, name: str, *size: int) -> Tensor:
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
        return tensor.to(self._device, self._dtype)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, sharded or not. Raises InvalidArgument (naming pickle where it is)."""
    if (folder / _INDEX).is_file():
        mapping = _json(folder / _INDEX).get("weight_map")
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


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path.name} is not a JSON object.")
    return value
