"""What differs between decoders, as data made from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InvalidArgument
from lathe.engine.adapters import ModuleShape
from lathe.text.families import describe, rope_settings


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: kind "default", "linear" or "llama3" (the latter with its four numbers)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """The shape of a decoder. Widths in numbers of features."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    context_length: int
    attention_bias: bool
    mlp_bias: bool
    tied_head: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderSpec:
        """Raises InvalidArgument naming what is not supported."""
        family = describe(config)
        if not family.supported:
            raise InvalidArgument(
                f"this base model cannot be loaded: {family.reason}", reason="UNSUPPORTED_MODEL"
            )
        heads, rope = int(config["num_attention_heads"]), rope_settings(config)
        return cls(
            architecture=family.architecture,
            vocab_size=family.vocab_size,
            hidden_size=family.hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            layers=family.layers,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or family.hidden_size // heads),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(rope, family.context_length),
            context_length=family.context_length,
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            tied_head=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def module_shapes(self) -> tuple[ModuleShape, ...]:
        """The linears of a layer in the model's order, with their places in the fused ones (qkv, gate_up)."""
        q, kv, h, inter = self.q_size, self.kv_size, self.hidden_size, self.intermediate_size
        return (
            ModuleShape("self_attn.q_proj", "qkv", h, 0, q),
            ModuleShape("self_attn.k_proj", "qkv", h, q, q + kv),
            ModuleShape("self_attn.v_proj", "qkv", h, q + kv, q + 2 * kv),
            ModuleShape("self_attn.o_proj", "o", q, 0, h),
            ModuleShape("mlp.gate_proj", "gate_up", h, 0, inter),
            ModuleShape("mlp.up_proj", "gate_up", h, inter, 2 * inter),
            ModuleShape("mlp.down_proj", "down", inter, 0, h),
        )


def _rope(settings: Mapping[str, Any], context: int) -> RopeSpec:
    return RopeSpec(
        theta=float(settings["rope_theta"]),
        kind=str(settings["rope_type"]),
        factor=float(settings.get("factor", 1.0)),
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
        original_context=int(settings.get("original_max_position_embeddings", context)),
    )
