"""An adapter's tensors folded into the base's, in float32, as PEFT's `merge_and_unload` does.

W' = W + s B A with s = lora_alpha / r (Hu et al. 2021), / sqrt(r) with use_rslora (Kalajdzievski 2023);
with DoRA W' = m (W + s B A) / ||W + s B A||, the norm of each output's row (Liu et al. 2024, eq. 5);
for an embedding W' = W + s (B A)^T, and DoRA's norm is that of each column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.adapters import WEIGHTS_FILE, check_own, check_weights
from lathe.engine.export.source import TensorInfo, Tensors
from lathe.engine.lora_config import read_spec
from lathe.engine.lora_layout import EMBEDDING, PREFIX, lay_out, resolve
from lathe.engine.spec import DecoderSpec

_HEAD = "lm_head.weight"
_EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(slots=True)
class _Delta:
    """The LoRA of one weight. parts: A [r, in], B [out, r], M [out]; of an embedding A [r, vocab], B [hidden, r]."""

    embedding: bool
    scale: float
    parts: dict[str, Tensor] = field(default_factory=dict)

    def merged(self, weight: Tensor) -> Tensor:
        """A new tensor of the weight's shape."""
        product = self.scale * (self.parts["B"] @ self.parts["A"])
        total = weight + (product.T if self.embedding else product)
        if "M" not in self.parts:
            return total
        norm = torch.linalg.vector_norm(total, dim=0 if self.embedding else 1, keepdim=True)
        # A row of zeros (a padded vocabulary's, a pruned one) stays one, as in training.
        norm.clamp_(min=torch.finfo(norm.dtype).tiny ** 0.5)
        return total.mul_(self.parts["M"].reshape(norm.shape) / norm)


class MergedModel:
    """The base's tensors with an adapter folded in (None: as they are), one at a time.

    config: config.json of the result. Embedding and head are tied no more where the adapter changes one of them: PEFT
    changes only the one that it is on.
    """

    def __init__(self, config: Mapping[str, Any], base: Tensors, adapter: Path | None) -> None:
        """Raises InvalidArgument for a folder that is no LoRA adapter, does not fit this base or holds a NaN."""
        self._base = base
        tied = bool(config.get("tie_word_embeddings"))
        self._stored = {_HEAD: _EMBEDDINGS} if tied else {}
        self._deltas = self._read(config, adapter) if adapter is not None else {}
        self._untied = tied and not self._deltas.keys().isdisjoint({_HEAD, _EMBEDDINGS})
        self.config: dict[str, Any] = {**config, "tie_word_embeddings": False} if self._untied else {**config}

    @property
    def changed(self) -> tuple[str, ...]:
        """The tensors that the adapter changes."""
        return tuple(self._deltas)

    def infos(self) -> list[TensorInfo]:
        """Every tensor of the result; a tied head is none, even where the base's files hold it twice."""
        found = [info for info in self._base.infos() if info.name not in self._stored]
        return [*found, TensorInfo(_HEAD, self._base.shape(_EMBEDDINGS))] if self._untied else found

    def read(self, name: str) -> Tensor:
        """A tensor of the result, float32. Raises InvalidArgument where it holds NaN or infinity."""
        weight = self._base.read(self._stored.get(name, name))
        delta = self._deltas.get(name)
        if delta is None:
            return weight
        merged = delta.merged(weight)
        if not bool(torch.isfinite(merged).all()):
            raise InvalidArgument(
                f"Tensor {name} with the adapter merged in holds NaN or infinity; export the adapter alone."
            )
        return merged

    def _read(self, config: Mapping[str, Any], adapter: Path) -> dict[str, _Delta]:
        spec, everywhere = read_spec(adapter), DecoderSpec.from_config(config).sites()
        try:
            check_weights(adapter, spec, everywhere)
        except InvalidArgument as error:
            raise InvalidArgument(
                f"The adapter cannot be put on this base model: {error.message} Give the base model that it was "
                "trained on."
            ) from error
        deltas: dict[str, _Delta] = {}
        with Tensors([adapter / WEIGHTS_FILE]) as tensors:
            parts = lay_out(resolve(spec, everywhere), everywhere)
            for part in parts:
                path = part.site.path
                delta = deltas.setdefault(
                    f"{path}.weight", _Delta(part.site.key == EMBEDDING, spec.scale_of(path))
                )
                delta.parts[part.kind] = tensors.read(part.name)
            for info in tensors.infos():
                if info.name not in {part.name for part in parts}:
                    self._check_own(info.name, tensors.stored(info.name))
        for name in deltas:
            if self._stored.get(name, name) not in self._base:
                raise InvalidArgument(
                    f"The base model's files have no {name}, which its config.json asks for."
                )
        return deltas

    def _check_own(self, name: str, tensor: Tensor) -> None:
        own = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        check_own(name, tensor, self._base.stored(self._stored.get(own, own)))
