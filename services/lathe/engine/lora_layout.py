"""Where LoRA may sit in a model, and how an adapter's parameters lie in its flat buffers and in PEFT's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lathe.engine.lora_config import ALL_LINEAR, LoraSpec, invalid

# How the names in PEFT's files begin.
PREFIX = "base_model.model."
GroupKey = tuple[int, str]
# Modules outside the layers.
EMBEDDING: GroupKey = (-1, "embedding")
HEAD: GroupKey = (-1, "head")


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """One linear of a layer as PEFT names it, and where its rows lie in the fused linear of its group."""

    path: str  # "self_attn.q_proj"
    group: str  # "qkv"
    in_features: int
    out_start: int
    out_stop: int

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class Site:
    """A module of the model that may carry LoRA. For the embeddings in_features is the vocabulary."""

    path: str  # "model.layers.0.self_attn.q_proj"
    key: GroupKey
    in_features: int
    out_start: int
    out_stop: int

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]

    @property
    def out_features(self) -> int:
        return self.out_stop - self.out_start


def sites(shapes: Sequence[ModuleShape], layers: int, vocab_size: int, hidden_size: int) -> tuple[Site, ...]:
    """Every module that may carry LoRA, in the model's own order (which is the order PEFT initialises in)."""
    inside = [
        Site(
            f"model.layers.{i}.{shape.path}", (i, shape.group), shape.in_features, shape.out_start, shape.out_stop
        )
        for i in range(layers)
        for shape in shapes
    ]  # fmt: skip
    return (
        Site("model.embed_tokens", EMBEDDING, vocab_size, 0, hidden_size),
        *inside,
        Site("lm_head", HEAD, hidden_size, 0, vocab_size),
    )


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter: where it lies in the flat buffers and how PEFT's file calls it.

    The A of an embedding lies transposed, [vocab, r]: a pass reads and changes the rows of its tokens.
    """

    site: Site
    kind: Literal["A", "B", "M"]
    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def of(self, flat: Tensor) -> Tensor:
        """Its view as it lies: [rows, columns]; a magnitude is [out]."""
        view = flat[self.start : self.stop]
        return view if self.kind == "M" else view.view(self.rows, self.columns)

    def as_filed(self, flat: Tensor) -> Tensor:
        """Its view in the shape that PEFT gives it."""
        view = self.of(flat)
        return view.t() if self.kind == "A" and self.site.key == EMBEDDING else view

    @property
    def filed_shape(self) -> tuple[int, ...]:
        if self.kind == "M":
            return (self.rows,)
        if self.kind == "A" and self.site.key == EMBEDDING:
            return (self.columns, self.rows)
        return (self.rows, self.columns)

    @property
    def name(self) -> str:
        path = PREFIX + self.site.path
        if self.kind == "M":
            return f"{path}.lora_magnitude_vector"
        if self.site.key == EMBEDDING:
            return f"{path}.lora_embedding_{self.kind}"
        return f"{path}.lora_{self.kind}.weight"


def resolve(spec: LoraSpec, everywhere: Sequence[Site]) -> LoraSpec:
    """The spec with all-linear spelled out. Raises InvalidArgument for a module that the base has not."""
    linears = tuple(dict.fromkeys(site.name for site in everywhere if site.key[0] >= 0))
    wanted = [linears if name == ALL_LINEAR else (name,) for name in spec.target_modules]
    names = tuple(dict.fromkeys(name for some in wanted for name in some))
    unknown = [name for name in names if not any(_is_named(site, name) for site in everywhere)]
    if unknown:
        known = ", ".join(dict.fromkeys(site.name for site in everywhere))
        raise invalid("target_modules", f"{unknown[0]!r} is not in this base model; choose from {known}")
    return replace(spec, target_modules=names)


def _is_named(site: Site, name: str) -> bool:
    """Whether a config's word names this module: its path or the end of it, from a dot on, as in PEFT."""
    return site.path == name or site.path.endswith("." + name)


def lay_out(spec: LoraSpec, everywhere: Sequence[Site]) -> tuple[Part, ...]:
    """The parameters of an adapter in the order of the flat buffers. spec: resolved."""
    chosen = [site for site in everywhere if any(_is_named(site, name) for name in spec.target_modules)]
    parts: list[Part] = []
    start = 0
    kinds: tuple[Literal["A", "B", "M"], ...] = ("A", "B", "M") if spec.use_dora else ("A", "B")
    for kind in kinds:
        for site in chosen:
            r = spec.rank_of(site.path)
            if kind == "A":
                size = (site.in_features, r) if site.key == EMBEDDING else (r, site.in_features)
            else:
                size = (site.out_features, r if kind == "B" else 1)
            parts.append(Part(site, kind, start, *size))
            start = parts[-1].stop
    return tuple(parts)
