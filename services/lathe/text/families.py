"""What Lathe can do with a base model, told from its config.json alone (no torch).

The models service shows it (`lathe models show`); the engine refuses what is not supported with the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
SUPPORTED_ROPE = ("default", "linear", "llama3")
METHODS = ("supervised",)


@dataclass(frozen=True, slots=True)
class Family:
    """The answer of `describe`: `reason` says why a model is not supported and is empty when it is."""

    supported: bool
    reason: str
    architecture: str
    methods: tuple[str, ...]
    target_modules: tuple[str, ...]
    context_length: int
    parameter_count: int
    hidden_size: int
    layers: int
    vocab_size: int


def describe(config: Mapping[str, object]) -> Family:
    """Says whether and how the model of a Hugging Face config.json can be tuned and served. Never raises."""
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    reason = _unsupported(config, architecture)
    supported = not reason
    return Family(
        supported=supported,
        reason=reason,
        architecture=architecture,
        methods=METHODS if supported else (),
        target_modules=LINEAR_MODULES if supported else (),
        context_length=_integer(config, "max_position_embeddings"),
        parameter_count=parameter_count(config) if supported else 0,
        hidden_size=_integer(config, "hidden_size"),
        layers=_integer(config, "num_hidden_layers"),
        vocab_size=_integer(config, "vocab_size"),
    )


def rope_settings(config: Mapping[str, object]) -> dict[str, object]:
    """The rotary settings wherever the config keeps them.

    transformers 5 writes `rope_parameters` (with `rope_theta` inside), earlier versions `rope_scaling` and a
    `rope_theta` beside it; both may say `type` for `rope_type`.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings: dict[str, object] = dict(found) if isinstance(found, Mapping) else {}
    settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
    if settings.get("rope_theta") is None:
        settings["rope_theta"] = config.get("rope_theta") or 10000.0
    return settings


def parameter_count(config: Mapping[str, object]) -> int:
    """The number of weights of a Llama-family model; tied embeddings count once."""
    hidden, layers = _integer(config, "hidden_size"), _integer(config, "num_hidden_layers")
    heads = _integer(config, "num_attention_heads")
    kv_heads = _integer(config, "num_key_value_heads") or heads
    head_dim = _integer(config, "head_dim") or hidden // heads
    inter, vocab = _integer(config, "intermediate_size"), _integer(config, "vocab_size")
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    attention = hidden * (q_size + 2 * kv_size) + q_size * hidden
    if config.get("attention_bias"):
        attention += q_size + 2 * kv_size + hidden
    mlp = 3 * hidden * inter
    if config.get("mlp_bias"):
        mlp += 2 * inter + hidden
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return layers * (attention + mlp + 2 * hidden) + hidden + embeddings


def _integer(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _unsupported(config: Mapping[str, object], architecture: str) -> str:
    if architecture not in SUPPORTED_ARCHITECTURES:
        named = architecture or "no architecture"
        return f"config.json names {named}; supported are: {', '.join(SUPPORTED_ARCHITECTURES)}."
    return _unusable_shape(config) or _unsupported_option(config)


def _unusable_shape(config: Mapping[str, object]) -> str:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for key in (*needed, "max_position_embeddings"):
        if _integer(config, key) <= 0:
            return f"config.json has no usable {key}; a positive integer is needed."
    heads, kv_heads = _integer(config, "num_attention_heads"), _integer(config, "num_key_value_heads")
    if kv_heads and heads % kv_heads:
        return f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}."
    return ""


def _unsupported_option(config: Mapping[str, object]) -> str:
    if config.get("quantization_config"):
        return "the weights are quantised (quantization_config in config.json); import the unquantised model."
    rope = rope_settings(config)["rope_type"]
    if rope not in SUPPORTED_ROPE:
        return f"rope type {rope!r} is not supported; supported are: {', '.join(SUPPORTED_ROPE)}."
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        return f"hidden_act {activation!r} is not supported; supported is: silu."
    return ""
