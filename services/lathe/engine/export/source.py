"""What an export is made from: a base model's folder and, on top of it, an adapter's. Read, never changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.full import check_same_architecture, is_full
from lathe.engine.jsonfile import read_object
from lathe.engine.weights import read_spec, weight_files
from lathe.text.errors import TemplateError, TokenizerError
from lathe.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a folder, not yet read."""

    name: str
    shape: tuple[int, ...]


class Tensors:
    """The tensors of some safetensors files, memory-mapped while the `with` block lasts."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._paths = tuple(files)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            for path in self._paths:
                opened = self._stack.enter_context(safe_open(str(path), framework="pt"))
                self._files.update(dict.fromkeys(opened.keys(), opened))
        except (SafetensorError, OSError) as error:
            self._stack.close()
            raise InvalidArgument(f"{path.name} cannot be read as safetensors: {error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def infos(self) -> list[TensorInfo]:
        """All of them, by name; layer 2 before layer 10."""
        return [TensorInfo(name, self.shape(name)) for name in sorted(self._files, key=_natural)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def stored(self, name: str) -> Tensor:
        """In its own precision. Raises InvalidArgument for one that the files do not have."""
        if name not in self._files:
            raise InvalidArgument(f"The model's files have no {name}, which its config.json asks for.")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def read(self, name: str) -> Tensor:
        """As float32. Raises InvalidArgument for integers and for NaN or infinity."""
        tensor = self.stored(name)
        if not tensor.is_floating_point():
            raise InvalidArgument(
                f"Tensor {name} is {tensor.dtype}; only floating point weights can be exported."
            )
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidArgument(f"Tensor {name} holds NaN or infinity; this model cannot be exported.")
        return tensor


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the model card says of where a model came from. An empty value is not known and left out."""

    model: str = ""
    base_model: str = ""
    licence: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """base: a Hugging Face folder (config.json, safetensors, tokenizer.json); tuned: what a job made of it, an adapter
    in PEFT's folder or every weight in a folder with config.json, or None for the base model itself."""

    base: Path
    tuned: Path | None
    lineage: Lineage

    @property
    def adapter(self) -> Path | None:
        """The LoRA to merge, where there is one."""
        return None if self.is_full else self.tuned

    @property
    def weights(self) -> Path:
        """The folder with config.json and the weights that an adapter goes onto."""
        return self.tuned if self.tuned is not None and self.is_full else self.base

    @property
    def is_full(self) -> bool:
        """Whether every weight was tuned."""
        return self.tuned is not None and is_full(self.tuned)

    def config(self) -> dict[str, Any]:
        """config.json. Raises InvalidArgument, also where every weight of another architecture was tuned."""
        if self.is_full:
            check_same_architecture(read_spec(self.base), self.weights)
        return read_object(self.weights / "config.json")

    def tensors(self) -> Tensors:
        """The base's. Raises InvalidArgument for a folder without safetensors."""
        return Tensors(weight_files(self.weights))

    def tokenizer(self) -> Tokenizer:
        """Raises InvalidArgument naming the file that is missing or wrong."""
        try:
            return Tokenizer.from_folder(self.base)
        except (TokenizerError, TemplateError) as error:
            raise InvalidArgument(f"The base model's tokenizer cannot be exported: {error}.") from error

    @property
    def name(self) -> str:
        """A file name for what is exported: letters, digits, dots and dashes."""
        named = self.lineage.model or self.lineage.base_model or self.base.name
        return "".join(c if c.isalnum() or c in ".-_" else "-" for c in named).strip("-.") or "model"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
