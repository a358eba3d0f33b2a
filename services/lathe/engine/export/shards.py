"""Writing safetensors one tensor at a time, so that memory holds one tensor and not a model.

The layout is the format's own: 8 bytes of little-endian header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lathe.engine.export.source import TensorInfo

WEIGHT_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_model(
    folder: Path,
    tensors: Sequence[TensorInfo],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes model.safetensors, or shards of at most `shard_bytes` (a larger tensor has its own) and their index.

    read: a tensor by name, cast to `dtype` here. Returns the names of the files.
    """
    parts = list(shards(tensors, dtype, shard_bytes))
    if len(parts) == 1:
        _write(folder / "model.safetensors", parts[0], dtype, read)
        return ["model.safetensors"]
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        _write(folder / name, part, dtype, read)
    index = {
        "metadata": {"total_size": sum(_size(info, dtype) for info in tensors)},
        "weight_map": {info.name: name for name, part in zip(names, parts, strict=True) for info in part},
    }
    (folder / WEIGHT_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, WEIGHT_INDEX]


def shards(tensors: Sequence[TensorInfo], dtype: torch.dtype, limit: int) -> Iterator[list[TensorInfo]]:
    """The tensors in order, cut before the one that would not fit."""
    part: list[TensorInfo] = []
    size = 0
    for info in tensors:
        bytes_ = _size(info, dtype)
        if part and size + bytes_ > limit:
            yield part
            part, size = [], 0
        part.append(info)
        size += bytes_
    yield part


def _write(
    path: Path, tensors: Sequence[TensorInfo], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for info in tensors:
        end = position + _size(info, dtype)
        header[info.name] = {"dtype": _NAMES[dtype], "shape": info.shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for info in tensors:
            flat = read(info.name).to(dtype).contiguous().reshape(-1)
            flat.view(torch.uint8).numpy().tofile(file)


def _size(info: TensorInfo, dtype: torch.dtype) -> int:
    return math.prod(info.shape) * dtype.itemsize
