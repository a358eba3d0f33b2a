"""The tensors of one LoRA adapter, in PEFT's semantics and file format.

y = W x + s B A x with s = lora_alpha / r (or / sqrt(r) with use_rslora; Hu et al. 2021, Kalajdzievski 2023). With
use_dora (Liu et al. 2024) y = m / n (W x + s B A x), n the norms of the rows of W + s B A, a constant to the gradient
(their section 4.3). An embedding is the same with x a unit vector: W is the transposed table.

An adapter's parameters are one flat buffer in fp32 (the master; fp64 on an fp64 base): all A first, then all B, then
all m. Gradients have the same layout, and the compute copy is in the base's dtype with s folded into B. Modules that
share an input (q, k, v and gate, up) have their A's side by side, so that one product makes all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.frozen import Frozen
from lathe.engine.lora_config import CONFIG_FILE, LoraSpec
from lathe.engine.lora_layout import EMBEDDING, HEAD, PREFIX, GroupKey, Site, lay_out, resolve
from lathe.engine.parts import Parts, part_of
from lathe.engine.untyped import as_tensor

WEIGHTS_FILE = "adapter_model.safetensors"


class BaseWeights(Protocol):
    """What an adapter needs to know of the base: its norms for DoRA, and what a file says of it."""

    @property
    def embeddings(self) -> Tensor: ...

    @property
    def parts(self) -> Parts: ...

    def linear(self, key: GroupKey) -> Frozen: ...


@dataclass(slots=True)
class LoraModule:
    """One module of a group. b [out, r] has the scale folded in; columns r_start:r_stop of u belong to it."""

    site: Site
    out_start: int
    out_stop: int
    r_start: int
    r_stop: int
    scale: float
    b: Tensor
    grad_b: Tensor | None
    grad_m: Tensor | None = None


@dataclass(slots=True)
class LoraGroup:
    """The LoRA of one fused linear of one layer: a [sum of r, in] (an embedding's: [vocab, r]).

    dropout_scale: 1 / (1 - p). gain, inverse: DoRA's m / n - 1 over the fused outputs in the compute dtype (0 where
    there is none), and 1 / n.
    """

    a: Tensor
    grad_a: Tensor | None
    modules: list[LoraModule]
    dropout_scale: float
    gain: Tensor | None = None
    inverse: Tensor | None = None


class Adapter:
    """The tensors of one adapter. `version` grows whenever the compute copy changes; `seed` and `steps` (optimiser
    steps taken) choose dropout's masks."""

    def __init__(
        self, spec: LoraSpec, everywhere: Sequence[Site], base: BaseWeights, *, trainable: bool
    ) -> None:
        """Raises InvalidArgument for a module that the base has not."""
        self.spec = resolve(spec, everywhere)
        self.version = self.seed = self.steps = 0
        self._base = base
        self._parts = lay_out(self.spec, everywhere)
        device, dtype = base.embeddings.device, base.embeddings.dtype
        size = self._parts[-1].stop
        self.master = torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.gradients = torch.zeros_like(self.master) if trainable else None
        self._compute = torch.zeros(size, dtype=dtype, device=device)
        self._by_site = {(part.site.path, part.kind): part for part in self._parts}
        members: dict[GroupKey, list[Site]] = {}
        for part in self._parts:
            if part.kind == "A":
                members.setdefault(part.site.key, []).append(part.site)
        self.groups = {key: self._group(some) for key, some in members.items()}

    @property
    def nbytes(self) -> int:
        return self.master.nbytes + self._compute.nbytes

    def publish(self) -> None:
        """Makes the compute copy equal to the master: after initialising, loading and each optimiser step."""
        for start, stop, scale in self._scales:
            torch.mul(self.master[start:stop], scale, out=self._compute[start:stop])
        if self.spec.use_dora:
            for key, group in self.groups.items():
                self._set_gain(key, group)
        self.version += 1

    def initialise(self, seed: int) -> None:
        """Draws A as PEFT does, B stays zero (an embedding's the other way round), m is the norms of W; the global
        generator is not touched.

        The numbers are those of `torch.manual_seed(seed); get_peft_model(model, config)` bit for bit: PEFT makes
        two nn.Linear per module in the model's order (each drawing its default weights), then redraws A with
        kaiming_uniform(a=sqrt(5)); for an embedding it draws both from a normal distribution, then B anew.
        """
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        for site in [part.site for part in self._parts if part.kind == "A"]:
            a, b = (self._by_site[site.path, kind].as_filed(self.master) for kind in ("A", "B"))
            draw_a, draw_b = torch.empty(a.shape), torch.empty(b.shape)
            if site.key == EMBEDDING:
                draw_a.normal_(generator=generator)
                draw_b.normal_(generator=generator)
                b.copy_(draw_b.normal_(generator=generator))
                continue
            torch.nn.init.kaiming_uniform_(draw_a, a=math.sqrt(5), generator=generator)
            torch.nn.init.kaiming_uniform_(draw_b, a=math.sqrt(5), generator=generator)
            torch.nn.init.kaiming_uniform_(draw_a, a=math.sqrt(5), generator=generator)
            a.copy_(draw_a)
        for part in self._parts:
            if part.kind == "M":
                part.of(self.master).copy_(self._base_norms(part.site))
        self.publish()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """PEFT's names and views of the master."""
        return self._named(self.master)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """PEFT's names and views of the gradients; none for an adapter that is only served."""
        return self._named(self.gradients) if self.gradients is not None else iter(())

    def save(self, folder: Path, base_model: str = "") -> tuple[str, ...]:
        """Writes the two files PEFT loads, the same bytes for the same numbers; returns their names."""
        text = json.dumps(self.spec.to_config(base_model), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.named_tensors())}
        (folder / WEIGHTS_FILE).write_bytes(to_safetensors(tensors, metadata={"format": "pt"}))
        return CONFIG_FILE, WEIGHTS_FILE

    def load_weights(self, folder: Path) -> None:
        """Reads adapter_model.safetensors. Raises InvalidArgument; see check_weights for a file that does not fit."""
        wanted = dict(self.named_tensors())
        try:
            with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as file:
                for name, target in wanted.items():
                    tensor = file.get_tensor(name)
                    target.copy_(tensor)
                    if not bool(torch.isfinite(target).all()):
                        raise InvalidArgument(f"{WEIGHTS_FILE}: {name} holds a NaN or an infinity.")
                for name in sorted(set(file.keys()) - set(wanted)):
                    self._check_base_tensor(name, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise InvalidArgument(f"{WEIGHTS_FILE} cannot be read: {error}") from error
        self.publish()

    @cached_property
    def _scales(self) -> list[tuple[int, int, float]]:
        """Runs of the flat buffer that take the same factor on their way into the compute copy."""
        runs: list[tuple[int, int, float]] = []
        for part in self._parts:
            scale = self.spec.scale_of(part.site.path) if part.kind == "B" else 1.0
            if runs and runs[-1][2] == scale:
                runs[-1] = (runs[-1][0], part.stop, scale)
            else:
                runs.append((part.start, part.stop, scale))
        return runs

    def _named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((part.name, part.as_filed(flat)) for part in self._parts)

    def _group(self, members: list[Site]) -> LoraGroup:
        first, last = (self._by_site[members[i].path, "A"] for i in (0, -1))
        columns = first.columns
        rows = (last.stop - first.start) // columns
        modules: list[LoraModule] = []
        for site in members:
            b, m = self._by_site[site.path, "B"], self._by_site.get((site.path, "M"))
            r_start = modules[-1].r_stop if modules else 0
            grads = self.gradients
            modules.append(
                LoraModule(
                    site, site.out_start, site.out_stop, r_start, r_start + b.columns,
                    self.spec.scale_of(site.path), b.of(self._compute),
                    None if grads is None else b.of(grads),
                    None if grads is None or m is None else m.of(grads),
                )
            )  # fmt: skip
        a = self._compute[first.start : last.stop].view(rows, columns)
        grad_a = (
            None if self.gradients is None else self.gradients[first.start : last.stop].view(rows, columns)
        )
        return LoraGroup(a, grad_a, modules, 1 / (1 - self.spec.lora_dropout))

    # DoRA

    def _base_norms(self, site: Site) -> Tensor:
        """The norms of the rows of W: [out]."""
        with self._base.parts.reading(part_of(site.key)):
            if site.key == EMBEDDING:
                weight, dim = self._base.embeddings, 0
            else:
                weight, dim = self._base.linear(site.key).dense()[site.out_start : site.out_stop], 1
            return as_tensor(torch.linalg.vector_norm(weight, dim=dim, dtype=self.master.dtype))

    @cached_property
    def _squares(self) -> dict[str, Tensor]:
        """By module path: the squared norms of the rows of W."""
        return {
            part.site.path: self._base_norms(part.site).square() for part in self._parts if part.kind == "M"
        }

    def _set_gain(self, key: GroupKey, group: LoraGroup) -> None:
        """|W + s B A|^2 = |W|^2 + 2 s B (W A^T) + s^2 B A A^T B^T, by rows: the sum itself is never made."""
        with self._base.parts.reading(part_of(key)):
            if key == EMBEDDING:
                width, crossed = self._base.embeddings.shape[1], group.a.t() @ self._base.embeddings
            else:
                linear = self._base.linear(key)
                width, crossed = linear.out_features, linear.product(group.a)
        gain = torch.zeros(width, dtype=self.master.dtype, device=self.master.device)
        inverse = torch.ones_like(gain)
        for module in group.modules:
            path = module.site.path
            a, b, m = (self._by_site[path, kind] for kind in ("A", "B", "M"))
            outputs = slice(module.out_start, module.out_stop)
            wide = a.as_filed(self.master)
            scaled = b.of(self.master) * module.scale
            along = crossed[module.r_start : module.r_stop, outputs].t().to(scaled.dtype)
            inner = 2 * along + scaled @ (wide @ wide.t())
            squares = self._squares[path] + (scaled * inner).sum(1)
            norms = squares.clamp_(min=torch.finfo(squares.dtype).tiny).sqrt_()
            gain[outputs] = m.of(self.master) / norms - 1
            inverse[outputs] = norms.reciprocal_()
        group.inverse, group.gain = inverse, gain.to(self._compute.dtype)

    def _check_base_tensor(self, name: str, tensor: Tensor) -> None:
        key = EMBEDDING if _base_tensor(name) == EMBEDDING else HEAD
        with self._base.parts.reading(part_of(key)):
            check_own(
                name, tensor, self._base.embeddings if key == EMBEDDING else self._base.linear(HEAD).dense()
            )


def check_own(name: str, tensor: Tensor, own: Tensor) -> None:
    """PEFT writes embeddings and head beside their LoRA: they must be the base's own, in the lower one of the two
    precisions. Raises InvalidArgument."""
    dtype = min(tensor.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    if tensor.shape != own.shape or not torch.equal(tensor.to(own.device, dtype), own.to(dtype)):
        raise InvalidArgument(f"{WEIGHTS_FILE}: {name} is not the base model's own tensor.")


def check_weights(folder: Path, spec: LoraSpec, everywhere: Sequence[Site]) -> None:
    """Whether adapter_model.safetensors holds what the config says, before any memory is taken for it.

    Raises InvalidArgument naming a missing, unknown or misshapen tensor, a pickle, a torn file.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise InvalidArgument(f"the adapter has no {WEIGHTS_FILE}; only safetensors are read, never pickle.")
    wanted = {part.name: part.filed_shape for part in lay_out(resolve(spec, everywhere), everywhere)}
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            _check_names(names, wanted)
            for name, shape in wanted.items():
                found = file.get_slice(name)
                if tuple(found.get_shape()) != shape:
                    raise InvalidArgument(
                        f"{WEIGHTS_FILE}: {name} is {tuple(found.get_shape())}, the base model needs {shape}."
                    )
                if found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise InvalidArgument(
                        f"{WEIGHTS_FILE}: {name} is {found.get_dtype()}; floating point is needed."
                    )
    except (SafetensorError, OSError) as error:
        raise InvalidArgument(f"{WEIGHTS_FILE} cannot be read: {error}") from error


def _check_names(names: set[str], wanted: Mapping[str, object]) -> None:
    missing = sorted(set(wanted) - names)
    if missing:
        raise InvalidArgument(f"{WEIGHTS_FILE}: {missing[0]} is missing.")
    unknown = sorted(name for name in names - set(wanted) if _base_tensor(name) is None)
    if unknown:
        raise InvalidArgument(f"{WEIGHTS_FILE}: {unknown[0]} is not a tensor of this base model's LoRA.")


def _base_tensor(name: str) -> GroupKey | None:
    """Which of the base's own tensors a name of an adapter file stands for."""
    return {
        f"{PREFIX}model.embed_tokens.base_layer.weight": EMBEDDING,
        f"{PREFIX}lm_head.base_layer.weight": HEAD,
    }.get(name)
