"""What a GGUF file says of a model and transformers' GGUF loader leaves out of config.json.

The loader drops every rescaling of the rotary embedding, Phi-3's window and its partly rotated heads; without them the
imported model would quietly be another one. A file is taken as llama.cpp runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lathe.common.errors import InvalidArgument
from lathe.engine.rope import RopeSpec, frequencies
from lathe.text.architectures import architecture_of, integer, rope_settings

# Tensors that hold divisors of the rotary frequencies.
FREQUENCY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1's and 3.2's files hold the divisors that these numbers give (the factor is the largest divisor).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def completed_config(
    config: Mapping[str, object], fields: Mapping[str, object], divisors: Mapping[str, Sequence[float]]
) -> dict[str, object]:
    """config.json as transformers made it, with what it left out.

    fields: the file's metadata without the architecture's name in front ("rope.scaling.type"). divisors: the content
    of FREQUENCY_TENSORS, those that the file has. Raises InvalidArgument for a rescaling that cannot be written.
    """
    made, architecture = dict(config), architecture_of(config)
    if architecture == "MistralForCausalLM":
        made["sliding_window"] = None  # not in these files, and llama.cpp has no window there
    if architecture == "Gemma3ForCausalLM":
        return _gemma3(made, fields)
    rope: dict[str, object] = {"rope_theta": rope_settings(config)["rope_theta"]}
    if architecture == "Phi3ForCausalLM":
        made["sliding_window"] = fields.get("attention.sliding_window") or None
        rope["partial_rotary_factor"] = _rotated(config, fields)
    rope.update(_scaling(config, fields, divisors))
    made["rope_parameters"] = rope
    if rope["rope_type"] == "longrope":
        made["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return made


def _rotated(config: Mapping[str, object], fields: Mapping[str, object]) -> float:
    head = integer(config, "head_dim") or integer(config, "hidden_size") // integer(
        config, "num_attention_heads"
    )
    return (integer(fields, "rope.dimension_count") or head) / head


def _scaling(
    config: Mapping[str, object], fields: Mapping[str, object], divisors: Mapping[str, Sequence[float]]
) -> dict[str, object]:
    if "rope_freqs.weight" in divisors:
        return _llama3(config, divisors["rope_freqs.weight"])
    original = fields.get("rope.scaling.original_context_length") or config.get("max_position_embeddings")
    if "rope_factors_long.weight" in divisors and "rope_factors_short.weight" in divisors:
        return {
            "rope_type": "longrope",
            "long_factor": list(divisors["rope_factors_long.weight"]),
            "short_factor": list(divisors["rope_factors_short.weight"]),
            "original_max_position_embeddings": original,
            **_attention_factor(fields),
        }
    kind = str(fields.get("rope.scaling.type") or "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": fields.get("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": fields.get("rope.scaling.factor", 1.0),
            "original_max_position_embeddings": original,
            **_attention_factor(fields),
        }
    raise InvalidArgument(
        f"the GGUF file rescales its rotary embedding by {kind!r}, which cannot be imported"
    )


def _attention_factor(fields: Mapping[str, object]) -> dict[str, object]:
    factor = fields.get("rope.scaling.attn_factor")
    return {} if factor is None else {"attention_factor": factor}


def _llama3(config: Mapping[str, object], divisors: Sequence[float]) -> dict[str, object]:
    theta = rope_settings(config)["rope_theta"]
    factor = round(max(divisors), 3)
    plain = RopeSpec(float(str(theta)), 2 * len(divisors))
    scaled = RopeSpec(plain.theta, plain.size, "llama3", factor)
    wanted = frequencies(plain) / frequencies(scaled)
    if not torch.allclose(wanted, torch.tensor(divisors), rtol=1e-3):
        raise InvalidArgument(
            "the GGUF file divides its rotary frequencies (rope_freqs.weight) in a way that config.json cannot say; "
            "import the original safetensors"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _gemma3(config: dict[str, object], fields: Mapping[str, object]) -> dict[str, object]:
    head, layers = integer(config, "head_dim"), integer(config, "num_hidden_layers")
    # llama.cpp's rule; 62 layers are the model of 27 billion weights, the only one that differs.
    wide = integer(config, "hidden_size") // integer(config, "num_attention_heads")
    config["query_pre_attn_scalar"] = wide if layers == 62 else head
    full: dict[str, object] = {
        "rope_type": "default",
        "rope_theta": fields.get("rope.freq_base", 1e6),
    }
    if fields.get("rope.scaling.type") == "linear":
        full.update(rope_type="linear", factor=fields.get("rope.scaling.factor", 1.0))
    local = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base_swa", 1e4)}
    config["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    return config
