"""What differs between decoders, as data made from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InvalidArgument
from lathe.engine.lora_layout import ModuleShape, Site, sites
from lathe.engine.rope import RopeSpec, longrope_scale, yarn_scale
from lathe.text.architectures import ARCHITECTURES, biases, completed, ropes, windows
from lathe.text.families import describe
from lathe.text.layout import Linear, linears, sizes


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """The shape of a decoder. Widths in numbers of features.

    norms: role -> the file's path within a layer (roles: text.architectures.Architecture). norm: "rms", "rms+1" or
    "layer". linears: of a layer, in transformers' order. ropes, windows: of each layer; a window counts the tokens
    that a token sees, itself included, and None means all before it. attention_scale: factor of the scores.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    linears: tuple[Linear, ...]
    norms: Mapping[str, str]
    final_norm: str
    norm: str
    norm_eps: float
    activation: str
    gated: bool
    ropes: tuple[RopeSpec, ...]
    windows: tuple[int | None, ...]
    attention_scale: float
    embedding_scale: float
    tied_head: bool
    head_bias: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderSpec:
        """Raises InvalidArgument naming what is not supported."""
        described = describe(config)
        if not described.supported:
            raise InvalidArgument(
                f"this base model cannot be loaded: {described.reason}", reason="UNSUPPORTED_MODEL"
            )
        family, n = ARCHITECTURES[described.architecture], sizes(config)
        config = dict[str, Any](completed(config))
        gemma = described.architecture == "Gemma3ForCausalLM"
        return cls(
            architecture=described.architecture,
            vocab_size=n.vocab,
            hidden_size=n.hidden,
            intermediate_size=n.inner,
            layers=n.layers,
            heads=n.heads,
            kv_heads=n.kv_heads,
            head_dim=n.head_dim,
            context_length=described.context_length,
            linears=linears(config),
            norms=family.norms,
            final_norm=family.final_norm,
            norm=family.norm,
            norm_eps=float(config.get(family.norm_eps, 1e-6)),
            activation=str(config.get(family.activation, family.activations[0])),
            gated=family.gated,
            ropes=tuple(_rope(settings, n.head_dim, described.context_length) for settings in ropes(config)),
            windows=windows(config),
            attention_scale=float(config["query_pre_attn_scalar"] if gemma else n.head_dim) ** -0.5,
            embedding_scale=n.hidden**0.5 if gemma else 1.0,
            tied_head=bool(config.get("tie_word_embeddings", False)),
            head_bias="head" in biases(family, config),
        )

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def norm_width(self, role: str) -> int:
        """Features of the norm with this role."""
        return self.head_dim if role in ("q", "k") else self.hidden_size

    @property
    def longrope_context(self) -> int | None:
        """Sequences longer than this are rotated by other frequencies than shorter ones; None if all are alike."""
        return next((rope.original_context for rope in self.ropes if rope.long), None)

    def module_shapes(self) -> tuple[ModuleShape, ...]:
        """The linears of a layer in the model's order, with their places in the fused ones (qkv, gate_up)."""
        ends: dict[str, int] = {}
        shapes: list[ModuleShape] = []
        for linear in self.linears:
            start = ends.get(linear.group, 0)
            ends[linear.group] = stop = start + linear.out_features
            shapes.append(ModuleShape(linear.path, linear.group, linear.in_features, start, stop))
        return tuple(shapes)

    def sites(self) -> tuple[Site, ...]:
        """Every module that may carry LoRA."""
        return sites(self.module_shapes(), self.layers, self.vocab_size, self.hidden_size)


def _rope(settings: Mapping[str, Any], head_dim: int, context: int) -> RopeSpec:
    kind, original = str(settings["rope_type"]), int(settings["original_max_position_embeddings"])
    factor = float(settings.get("factor") or (context / original if kind in ("yarn", "longrope") else 1.0))
    size = int(head_dim * float(settings["partial_rotary_factor"]))
    return RopeSpec(
        theta=float(settings["rope_theta"]),
        size=size,
        kind=kind,
        factor=factor,
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
        original_context=original,
        scale=_scale(kind, settings, factor, original),
        beta_fast=float(settings.get("beta_fast") or 32),
        beta_slow=float(settings.get("beta_slow") or 1),
        truncate=bool(settings.get("truncate", True)),
        short=tuple(map(float, settings.get("short_factor") or ())) if kind == "longrope" else (),
        long=tuple(map(float, settings.get("long_factor") or ())) if kind == "longrope" else (),
    )


def _scale(kind: str, settings: Mapping[str, Any], factor: float, original: int) -> float:
    if kind not in ("yarn", "longrope"):
        return 1.0
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    if kind == "longrope":
        return longrope_scale(factor, original)
    return yarn_scale(factor, float(settings.get("mscale") or 0), float(settings.get("mscale_all_dim") or 0))
