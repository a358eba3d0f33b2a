"""The model families that Lathe tunes: what sets each apart, and how to read its config.json (no torch).

Names and defaults are those of transformers' classes of the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Config = Mapping[str, object]

_ORIGINAL = "original_max_position_embeddings"

# A linear of a layer: its path in the file, and the fused linear of which the engine makes it a part.
_QKV = (("self_attn.q_proj", "qkv"), ("self_attn.k_proj", "qkv"), ("self_attn.v_proj", "qkv"))
_GATED = (("mlp.gate_proj", "gate_up"), ("mlp.up_proj", "gate_up"), ("mlp.down_proj", "down"))
_LLAMA = (*_QKV, ("self_attn.o_proj", "o"), *_GATED)
_LLAMA_NORMS = {"input": "input_layernorm", "mlp": "post_attention_layernorm"}
_HEAD_NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
_ATTENTION_BIAS = {"attention_bias": frozenset({"qkv", "o"})}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family.

    modules: the linears of a layer, (path, fused linear), in the order in which transformers makes them.
    norms: role -> path within the layer. Roles: input (before attention), mlp (before the MLP; without it attention
    and MLP run side by side on the input norm), attention_out and mlp_out (before adding to the residual), q and k
    (over each head). norm: "rms", "rms+1" (the file holds the weight minus 1) or "layer" (with a bias).
    defaults: what config.json may leave out. activations: those its MLP may have; gated: gate and up, or one linear.
    biases: fused linears (qkv, o, gate_up, down) and head that have one; biased_by: keys of the config that give
    some. sliding: which layers have a window (see `windows`). refused: options that are not implemented.
    """

    name: str
    modules: tuple[tuple[str, str], ...] = _LLAMA
    norms: Mapping[str, str] = field(default_factory=lambda: _LLAMA_NORMS)
    final_norm: str = "norm"
    norm: str = "rms"
    norm_eps: str = "rms_norm_eps"
    defaults: Config = field(default_factory=dict)
    activation: str = "hidden_act"
    activations: tuple[str, ...] = ("silu",)
    gated: bool = True
    biases: frozenset[str] = frozenset()
    biased_by: Mapping[str, frozenset[str]] = field(default_factory=dict)
    sliding: str = "none"
    refused: tuple[str, ...] = ()

    @property
    def target_modules(self) -> tuple[str, ...]:
        """What LoRA may adapt, as PEFT names it."""
        return tuple(path.rsplit(".", 1)[1] for path, _ in self.modules)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": Architecture(
            "Llama", biased_by={**_ATTENTION_BIAS, "mlp_bias": frozenset({"gate_up", "down"})}
        ),
        "Qwen2ForCausalLM": Architecture(
            "Qwen2", defaults=_QWEN, biases=frozenset({"qkv"}), sliding="upper"
        ),
        "Qwen3ForCausalLM": Architecture(
            "Qwen3",
            norms={**_LLAMA_NORMS, **_HEAD_NORMS},
            defaults={**_QWEN, "head_dim": 128},
            biased_by=_ATTENTION_BIAS,
            sliding="upper",
        ),
        "MistralForCausalLM": Architecture("Mistral", defaults={"sliding_window": 4096}, sliding="all"),
        "Gemma3ForCausalLM": Architecture(
            "Gemma 3",
            norms={
                "input": "input_layernorm", "attention_out": "post_attention_layernorm",
                "mlp": "pre_feedforward_layernorm", "mlp_out": "post_feedforward_layernorm", **_HEAD_NORMS,
            },
            norm="rms+1",
            defaults={
                "head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                "sliding_window_pattern": 6, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
            },
            activation="hidden_activation",
            activations=("gelu_pytorch_tanh",),
            biased_by=_ATTENTION_BIAS,
            sliding="local",
            refused=("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
        ),
        "PhiForCausalLM": Architecture(
            "Phi-2",
            modules=(*_QKV, ("self_attn.dense", "o"), ("mlp.fc1", "gate_up"), ("mlp.fc2", "down")),
            norms={"input": "input_layernorm"},
            final_norm="final_layernorm",
            norm="layer",
            norm_eps="layer_norm_eps",
            defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
            activations=("gelu_new", "gelu_pytorch_tanh"),
            gated=False,
            biases=frozenset({"qkv", "o", "gate_up", "down", "head"}),
            refused=("qk_layernorm",),
        ),
        "Phi3ForCausalLM": Architecture(
            "Phi-3",
            modules=(
                ("self_attn.o_proj", "o"), ("self_attn.qkv_proj", "qkv"),
                ("mlp.gate_up_proj", "gate_up"), ("mlp.down_proj", "down"),
            ),
            defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
            sliding="all",
        ),
    }
)  # fmt: skip

LINEAR_MODULES = ARCHITECTURES["LlamaForCausalLM"].target_modules


def architecture_of(config: Config) -> str:
    """The class that config.json names; "" if none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def completed(config: Config) -> dict[str, object]:
    """The config with its family's defaults where it says nothing, or null (sliding_window: null means none)."""
    family = ARCHITECTURES.get(architecture_of(config))
    said = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    return {**(family.defaults if family is not None else {}), **said}


def biases(family: Architecture, config: Config) -> frozenset[str]:
    """The fused linears with a bias."""
    given = [groups for key, groups in family.biased_by.items() if config.get(key)]
    return family.biases.union(*given)


def integer(config: Config, key: str) -> int:
    """A number of config.json; 0 if it is missing or none."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def windows(config: Config) -> tuple[int | None, ...]:
    """Each layer's sliding window: how many tokens a token sees, itself included; None sees all before it.

    "all": every layer where the config has a window (Mistral, Phi-3). "upper": with use_sliding_window, the layers
    from max_window_layers on, unless layer_types says otherwise (Qwen). "local": all but every
    sliding_window_pattern-th, unless layer_types says otherwise (Gemma 3).
    """
    config = completed(config)
    family = ARCHITECTURES[architecture_of(config)]
    count, window = integer(config, "num_hidden_layers"), integer(config, "sliding_window") or None
    types, layers = config.get("layer_types"), range(count)
    if family.sliding == "upper" and not config.get("use_sliding_window"):
        return (None,) * count
    if family.sliding in ("upper", "local") and isinstance(types, list):
        sliding = [kind == "sliding_attention" for kind in types]
    elif family.sliding == "upper":
        sliding = [layer >= integer(config, "max_window_layers") for layer in layers]
    elif family.sliding == "local":
        pattern = integer(config, "sliding_window_pattern") or 1
        sliding = [bool((layer + 1) % pattern) for layer in layers]
    else:
        sliding = [family.sliding == "all"] * count
    return tuple(window if local else None for local in sliding)


def ropes(config: Config) -> tuple[dict[str, object], ...]:
    """Each layer's rotary settings, in the names of transformers 5's `rope_parameters`.

    Earlier versions write `rope_scaling` and a `rope_theta` beside it; both may say `type` for `rope_type`. Gemma 3
    has one set for its local layers (never rescaled) and one for the others.
    """
    config = completed(config)
    count = integer(config, "num_hidden_layers")
    nested = _mapping(config.get("rope_parameters"))
    if ARCHITECTURES[architecture_of(config)].sliding != "local":
        return (rope_settings(config),) * count
    local = {"rope_theta": config.get("rope_local_base_freq") or 1e4}
    full: dict[str, object] = {"rope_theta": config.get("rope_theta") or 1e6}
    full.update(_mapping(config.get("rope_scaling")))
    near = rope_settings(
        {**config, "rope_parameters": {**local, **_mapping(nested.get("sliding_attention"))}}
    )
    far = rope_settings({**config, "rope_parameters": {**full, **_mapping(nested.get("full_attention"))}})
    return tuple(far if window is None else near for window in windows(config))


def rope_settings(config: Config) -> dict[str, object]:
    """The rotary settings of a config with one set of them; rope_type, rope_theta and the original context filled."""
    settings = _mapping(config.get("rope_parameters")) or _mapping(config.get("rope_scaling"))
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    if architecture_of(config) == "Phi3ForCausalLM" and kind in ("su", "yarn"):
        kind = "longrope"  # what Phi-3's first releases called it
    settings["rope_type"] = kind
    for key, fallback in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        if settings.get(key) is None:
            settings[key] = config.get(key) or fallback
    # Phi-3 keeps the original context beside the settings, and there it wins.
    original = config.get(_ORIGINAL) or settings.get(_ORIGINAL) or config.get("max_position_embeddings")
    if original:
        settings[_ORIGINAL] = original
    return settings


def _mapping(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}
