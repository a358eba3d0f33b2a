"""What Lathe can do with a base model, told from its config.json alone (no torch).

The models service shows it (`lathe models show`); the engine refuses what is not supported with the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lathe.text.architectures import ARCHITECTURES, Architecture, architecture_of, completed, integer, ropes
from lathe.text.layout import parameter_count, sizes

SUPPORTED_ARCHITECTURES = tuple(ARCHITECTURES)
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn", "longrope")
MAX_LAYERS = 1024
_ROPE_NUMBERS = (
    "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "attention_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
)  # fmt: skip
METHODS = ("supervised", "dpo", "orpo", "kto")


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
    architecture, config = architecture_of(config), completed(config)
    reason = _unsupported(config, architecture)
    supported = not reason
    return Family(
        supported=supported,
        reason=reason,
        architecture=architecture,
        methods=METHODS if supported else (),
        target_modules=ARCHITECTURES[architecture].target_modules if supported else (),
        context_length=integer(config, "max_position_embeddings"),
        parameter_count=parameter_count(config) if supported else 0,
        hidden_size=integer(config, "hidden_size"),
        layers=integer(config, "num_hidden_layers"),
        vocab_size=integer(config, "vocab_size"),
    )


def _unsupported(config: Mapping[str, object], architecture: str) -> str:
    family = ARCHITECTURES.get(architecture)
    if family is None:
        named = architecture or "no architecture"
        hint = _HINTS.get(architecture, "")
        return f"config.json names {named}; supported are: {', '.join(SUPPORTED_ARCHITECTURES)}.{hint}"
    return _unusable_shape(config) or _unsupported_option(family, config) or _unsupported_rope(config)


_HINTS = {"Gemma3ForConditionalGeneration": " Of Gemma 3, the models that take text alone can be tuned."}


def _unusable_shape(config: Mapping[str, object]) -> str:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for key in (*needed, "max_position_embeddings"):
        if integer(config, key) <= 0:
            return f"config.json has no usable {key}; a positive integer is needed."
    if integer(config, "num_hidden_layers") > MAX_LAYERS:
        return f"num_hidden_layers is {integer(config, 'num_hidden_layers')}; at most {MAX_LAYERS} are supported."
    heads, kv_heads = integer(config, "num_attention_heads"), integer(config, "num_key_value_heads")
    if kv_heads and heads % kv_heads:
        return f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}."
    if sizes(config).head_dim < 2:
        return f"hidden_size {integer(config, 'hidden_size')} is too small for {heads} heads."
    if (types := config.get("layer_types")) is not None:
        layers = integer(config, "num_hidden_layers")
        if not isinstance(types, list) or len(types) != layers:
            return f"layer_types must name each of the {layers} layers."
    return ""


def _unsupported_option(family: Architecture, config: Mapping[str, object]) -> str:
    if config.get("quantization_config"):
        return "the weights are quantised (quantization_config in config.json); import the unquantised model."
    activation = config.get(family.activation, family.activations[0])
    if activation not in family.activations:
        return f"{family.activation} {activation!r} is not supported; supported is: {', '.join(family.activations)}."
    for key in family.refused:
        if config.get(key):
            return f"{key} {config[key]!r} is not supported."
    if reason := _bad_number(config, (family.norm_eps, "query_pre_attn_scalar")):
        return reason
    types = config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    odd = [str(kind) for kind in types if kind not in known] if isinstance(types, list) else []
    return f"layer type {min(odd)!r} is not supported." if odd else ""


def _unsupported_rope(config: Mapping[str, object]) -> str:
    head = sizes(config).head_dim
    for rope in {id(rope): rope for rope in ropes(config)}.values():
        kind = rope["rope_type"]
        if kind not in SUPPORTED_ROPE:
            return f"rope type {kind!r} is not supported; supported are: {', '.join(SUPPORTED_ROPE)}."
        if reason := _bad_number(rope, _ROPE_NUMBERS):
            return reason
        if kind in ("linear", "llama3") and rope.get("factor") is None:
            return f"rope type {kind!r} needs a factor."
        size = int(head * float(str(rope["partial_rotary_factor"])))
        if size < 2 or size % 2 or size > head:
            return (
                f"partial_rotary_factor rotates {size} of a head's {head} features; an even number is needed."
            )
        if kind == "longrope" and (reason := _bad_factors(rope, size // 2)):
            return reason
    return ""


def _bad_number(values: Mapping[str, object], keys: Iterable[str]) -> str:
    for key in keys:
        value = values.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < float(str(value)) < float("inf")):
            return f"{key} {value!r} is not a positive number."
    return ""


def _bad_factors(rope: Mapping[str, object], count: int) -> str:
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if not isinstance(factors, list) or len(factors) != count:
            return f"longrope needs {key} with {count} numbers."
        if reason := _bad_number(named := {f"{key}[{i}]": factor for i, factor in enumerate(factors)}, named):
            return reason
    return ""
