"""The checks of safetensors files by their headers: nothing of the weights themselves is read. Pure.

The format: 8 bytes little-endian header length, the header as JSON (name -> dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lathe.models.model import bad_folder
from lathe.text.architectures import architecture_of
from lathe.text.layout import tensor_shapes

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8

# Bytes per element.
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: dtype as safetensors writes it, and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def header_length(path: str, first: bytes, file_size: int) -> int:
    """The header's length, from the file's first 8 bytes. Raises InvalidArgument naming the file."""
    length = int.from_bytes(first, "little") if len(first) == LENGTH_BYTES else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES):
        raise bad_folder(f"{path} is no safetensors file or was cut short: its header length is impossible.")
    return length


def parse_header(path: str, header: bytes, file_size: int) -> dict[str, Tensor]:
    """The tensors that a file holds. Raises InvalidArgument unless they fill the file exactly, none over another."""
    try:
        content = json.loads(header)
    except ValueError as error:
        raise bad_folder(f"{path} is no safetensors file: its header is not JSON.") from error
    if not isinstance(content, dict):
        raise bad_folder(f"{path} is no safetensors file: its header is no JSON object.")
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        tensor, span = _entry(path, name, entry)
        tensors[name] = tensor
        spans.append(span)
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise bad_folder(f"{path}: its tensors overlap or leave holes at byte {position} of the data.")
        position = end
    if position != file_size - LENGTH_BYTES - len(header):
        raise bad_folder(
            f"{path} has {file_size - LENGTH_BYTES - len(header)} bytes of data, its header says {position}: "
            "the file was cut short or extended."
        )
    return tensors


def _entry(path: str, name: str, entry: object) -> tuple[Tensor, tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if (
            dtype in DTYPES and all(type(size) is int and size >= 0 for size in shape) and 0 <= start <= end
        ):
            tensor = Tensor(path, dtype, tuple(shape))
            if tensor.elements * DTYPES[dtype] == end - start:
                return tensor, (start, end)
    raise bad_folder(
        f"{path}: tensor {name!r} has an unknown dtype, a bad shape or the wrong number of bytes."
    )


def merge_shards(
    shards: Mapping[str, Mapping[str, Tensor]], index: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """All tensors of a model whose weights lie in one or many files.

    index: model.safetensors.index.json. Raises InvalidArgument if a name is in two files, or the index disagrees.
    """
    tensors: dict[str, Tensor] = {}
    for path, found in shards.items():
        for name, tensor in found.items():
            if name in tensors:
                raise bad_folder(f"Tensor {name!r} is in both {tensors[name].file} and {path}.")
            tensors[name] = tensor
    weight_map = index.get("weight_map") if index is not None else None
    if weight_map is not None:
        if not isinstance(weight_map, dict):
            raise bad_folder("model.safetensors.index.json: weight_map must be a JSON object.")
        for name, file in weight_map.items():
            if name not in tensors or tensors[name].file != file:
                raise bad_folder(
                    f"model.safetensors.index.json puts {name!r} into {file!r}, where it is not."
                )
    return tensors


def check_required(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise InvalidArgument if a tensor that a supported config asks for is missing or has another shape."""
    for name, shape in tensor_shapes(config).items():
        tensor = tensors.get(name)
        if tensor is None:
            raise bad_folder(
                f"The weights have no tensor {name!r}, which a {architecture_of(config)} of this config needs."
            )
        if tensor.shape != shape:
            raise bad_folder(
                f"Tensor {name!r} has the shape {list(tensor.shape)}; by config.json it must be {list(shape)}."
            )
