"""What tensors a base model's files hold, told from its config.json (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lathe.text.architectures import ARCHITECTURES, architecture_of, biases, completed, integer


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of a layer. path: "self_attn.q_proj"; group: the fused linear it is a part of, e.g. "qkv"."""

    path: str
    group: str
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of features, heads and layers of a supported config."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim


def sizes(config: Mapping[str, object]) -> Sizes:
    config = completed(config)
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    return Sizes(
        vocab=integer(config, "vocab_size"),
        hidden=hidden,
        inner=integer(config, "intermediate_size"),
        layers=integer(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=integer(config, "num_key_value_heads") or heads,
        head_dim=integer(config, "head_dim") or hidden // heads,
    )


def linears(config: Mapping[str, object]) -> tuple[Linear, ...]:
    """The linears of a layer, in transformers' order."""
    n, family = sizes(config), ARCHITECTURES[architecture_of(config)]
    biased = biases(family, config)
    ends = {"o": (n.hidden, n.q), "down": (n.hidden, n.inner)}
    parts = {
        "q_proj": n.q,
        "k_proj": n.kv,
        "v_proj": n.kv,
        "qkv_proj": n.q + 2 * n.kv,
        "gate_up_proj": 2 * n.inner,
    }
    made: list[Linear] = []
    for path, group in family.modules:
        rows, width = ends.get(group) or (parts.get(path.rsplit(".", 1)[1], n.inner), n.hidden)
        made.append(Linear(path, group, rows, width, group in biased))
    return tuple(made)


def norm_width(role: str, n: Sizes) -> int:
    """Features of the norm with this role (see Architecture.norms)."""
    return n.head_dim if role in ("q", "k") else n.hidden


def tensor_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Every tensor that the files of a supported config hold, by name. A tied head is not one."""
    config = completed(config)
    n, family = sizes(config), ARCHITECTURES[architecture_of(config)]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (n.vocab, n.hidden)}
    affine = ("weight", "bias") if family.norm == "layer" else ("weight",)
    for layer in range(n.layers):
        prefix = f"model.layers.{layer}."
        for role, path in family.norms.items():
            shapes.update((f"{prefix}{path}.{part}", (norm_width(role, n),)) for part in affine)
        for linear in linears(config):
            shapes[f"{prefix}{linear.path}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[f"{prefix}{linear.path}.bias"] = (linear.out_features,)
    shapes.update((f"model.{family.final_norm}.{part}", (n.hidden,)) for part in affine)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (n.vocab, n.hidden)
    if "head" in biases(family, config):
        shapes["lm_head.bias"] = (n.vocab,)
    return shapes


def parameter_count(config: Mapping[str, object]) -> int:
    """The number of weights of a supported config; tied embeddings count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())
