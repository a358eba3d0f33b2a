from __future__ import annotations

import pytest

from lathe.common.errors import InvalidArgument
from lathe.engine.gguf_config import completed_config
from lathe.engine.rope import RopeSpec, frequencies
from lathe.engine.spec import DecoderSpec

CONFIG = {
    "hidden_size": 64, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 131072, "rope_parameters": {"rope_theta": 500000.0},
}  # fmt: skip


def config(architecture: str, **changes: object) -> dict[str, object]:
    return {**CONFIG, "architectures": [architecture], **changes}


def rope(made: dict[str, object]) -> RopeSpec:
    return DecoderSpec.from_config(made).ropes[0]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_divisors_are_recognised(factor: float) -> None:
    plain, scaled = RopeSpec(500000.0, 16), RopeSpec(500000.0, 16, "llama3", factor)
    divisors = (frequencies(plain) / frequencies(scaled)).tolist()
    made = completed_config(config("LlamaForCausalLM"), {}, {"rope_freqs.weight": divisors})
    assert (rope(made).kind, rope(made).factor, rope(made).original_context) == ("llama3", factor, 8192)
    divisors[3] *= 1.5
    with pytest.raises(InvalidArgument, match="rope_freqs"):
        completed_config(config("LlamaForCausalLM"), {}, {"rope_freqs.weight": divisors})


def test_yarn_and_linear_come_from_the_metadata() -> None:
    fields = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32768,
    }
    made = rope(completed_config(config("Qwen3ForCausalLM"), fields, {}))
    assert (made.kind, made.factor, made.original_context, made.theta) == ("yarn", 4.0, 32768, 500000.0)
    made = rope(completed_config(config("LlamaForCausalLM"), {**fields, "rope.scaling.type": "linear"}, {}))
    assert (made.kind, made.factor) == ("linear", 4.0)
    with pytest.raises(InvalidArgument, match="'dynamic'"):
        completed_config(config("LlamaForCausalLM"), {"rope.scaling.type": "dynamic"}, {})


def test_phi_3s_window_rotated_part_and_two_sets_of_divisors() -> None:
    fields = {
        "attention.sliding_window": 2047, "rope.dimension_count": 12, "rope.scaling.original_context_length": 4096,
        "rope.scaling.attn_factor": 1.19,
    }  # fmt: skip
    divisors = {"rope_factors_long.weight": [2.0] * 6, "rope_factors_short.weight": [1.0] * 6}
    spec = DecoderSpec.from_config(completed_config(config("Phi3ForCausalLM"), fields, divisors))
    found = spec.ropes[0]
    assert (found.size, found.short, found.long) == (12, (1.0,) * 6, (2.0,) * 6)
    assert (found.original_context, found.scale, spec.windows) == (4096, 1.19, (2047,))


def test_gemma_3s_two_ropes_and_its_scale() -> None:
    fields = {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    given = config("Gemma3ForCausalLM", head_dim=32, num_hidden_layers=6, sliding_window=512)
    spec = DecoderSpec.from_config(completed_config(given, fields, {}))
    assert [one.theta for one in spec.ropes] == [1e4] * 5 + [1e6]
    assert [one.factor for one in spec.ropes] == [1.0] * 5 + [8.0]
    assert spec.windows == (512,) * 5 + (None,)
    assert spec.attention_scale == 32**-0.5


def test_mistral_has_no_window_in_a_gguf_file() -> None:
    made = completed_config(config("MistralForCausalLM"), {}, {})
    assert DecoderSpec.from_config(made).windows == (None,)
