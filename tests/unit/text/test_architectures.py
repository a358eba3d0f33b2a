"""What is read out of config.json, on the files as their publishers wrote them (the keys that matter)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.engine.spec import DecoderSpec
from lathe.text.architectures import ARCHITECTURES, windows
from lathe.text.families import describe
from lathe.text.layout import tensor_shapes

# What each publisher's config.json says, and the number of weights on the model's card.
PUBLISHED: dict[str, tuple[dict[str, object], int]] = {
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 131072, "tie_word_embeddings": True, "rope_theta": 500000.0,
            "rope_scaling": {"factor": 32.0, "rope_type": "llama3", "original_max_position_embeddings": 8192},
        },
        1_235_814_400,
    ),
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "rope_theta": 1e6,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
            "max_position_embeddings": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
            "sliding_window": 32768, "max_window_layers": 24,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
            "max_position_embeddings": 40960, "tie_word_embeddings": True, "attention_bias": False,
        },
        596_049_920,
    ),
    "Mistral-7B-v0.3": (
        {
            "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
            "max_position_embeddings": 32768, "sliding_window": None,
        },
        7_248_023_552,
    ),
    "gemma-3-1b": (
        {
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152, "intermediate_size": 6912, "head_dim": 256,
            "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144,
            "max_position_embeddings": 32768, "sliding_window": 512, "sliding_window_pattern": 6,
            "rope_theta": 1000000, "rope_local_base_freq": 10000, "query_pre_attn_scalar": 256,
        },
        999_885_952,
    ),
    "phi-2": (
        {
            "architectures": ["PhiForCausalLM"], "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 51200, "partial_rotary_factor": 0.4,
            "max_position_embeddings": 2048, "hidden_act": "gelu_new", "qk_layernorm": False,
        },
        2_779_683_840,
    ),
    "Phi-3-mini-4k": (
        {
            "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
            "max_position_embeddings": 4096, "sliding_window": 2047, "rope_scaling": None,
        },
        3_821_079_552,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_described(name: str) -> None:
    config, parameters = PUBLISHED[name]
    family = describe(config)
    assert (family.supported, family.reason) == (True, "")
    assert family.parameter_count == parameters
    assert set(family.target_modules) == set(ARCHITECTURES[family.architecture].target_modules)


def test_every_family_is_among_them() -> None:
    assert {describe(config).architecture for config, _ in PUBLISHED.values()} == set(ARCHITECTURES)


def seen(name: str, **changes: object) -> set[int | None]:
    return set(windows({**PUBLISHED[name][0], **changes}))


def test_which_layers_have_a_window() -> None:
    assert seen("Qwen2.5-0.5B") == seen("Mistral-7B-v0.3") == seen("phi-2") == seen("Llama-3.2-1B") == {None}
    assert seen("Phi-3-mini-4k") == {2047}
    gemma = windows(PUBLISHED["gemma-3-1b"][0])
    assert [layer for layer, window in enumerate(gemma) if window is None] == [5, 11, 17, 23]
    upper = windows({**PUBLISHED["Qwen2.5-0.5B"][0], "use_sliding_window": True, "max_window_layers": 20})
    assert upper == (None,) * 20 + (32768,) * 4
    mistral = dict(PUBLISHED["Mistral-7B-v0.3"][0])
    del mistral["sliding_window"]  # absent is not null: transformers' default is 4096
    assert set(windows(mistral)) == {4096}


def test_the_tensors_of_a_file_are_named() -> None:
    shapes = tensor_shapes(PUBLISHED["phi-2"][0])
    assert shapes["model.layers.31.self_attn.dense.bias"] == (2560,)
    assert shapes["model.final_layernorm.bias"] == (2560,)
    assert shapes["lm_head.bias"] == (51200,)
    assert "model.layers.0.post_attention_layernorm.weight" not in shapes
    phi3 = tensor_shapes(PUBLISHED["Phi-3-mini-4k"][0])
    assert phi3["model.layers.0.self_attn.qkv_proj.weight"] == (9216, 3072)
    assert phi3["model.layers.0.mlp.gate_up_proj.weight"] == (16384, 3072)
    gemma = tensor_shapes(PUBLISHED["gemma-3-1b"][0])
    assert gemma["model.layers.0.self_attn.q_norm.weight"] == (256,)
    assert "lm_head.weight" not in gemma


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gemma-3-1b", {"architectures": ["Gemma3ForConditionalGeneration"]}, "text alone"),
        ("gemma-3-1b", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma-3-1b", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma-3-1b", {"layer_types": ["full_attention"]}, "layer_types must name each of the 26 layers"),
        ("Qwen3-0.6B", {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}, "'linear_attention'"),
        ("Qwen3-0.6B", {"num_hidden_layers": 1, "layer_types": [{}]}, "layer type '{}'"),
        ("phi-2", {"qk_layernorm": True}, "qk_layernorm"),
        ("Phi-3-mini-4k", {"rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
        ("Llama-3.2-1B", {"num_hidden_layers": 5000}, "at most 1024"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ("Llama-3.2-1B", {"rope_theta": "wide"}, "rope_theta 'wide'"),
        ("Llama-3.2-1B", {"rms_norm_eps": [1]}, "rms_norm_eps"),
        ("phi-2", {"partial_rotary_factor": 0.01}, "rotates 0 of a head's 80"),
        ("Phi-3-mini-4k", {"rope_scaling": {"type": "su"}}, "short_factor with 48 numbers"),
        (
            "Phi-3-mini-4k",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [-1.0] * 48}},
            r"long_factor[0] -1.0",
        ),
    ],
)
def test_what_a_family_cannot_do_is_said(name: str, change: dict[str, object], words: str) -> None:
    family = describe({**PUBLISHED[name][0], **change})
    assert not family.supported
    assert words in family.reason
    assert (family.methods, family.target_modules) == ((), ())


KEYS = sorted(
    {key for config, _ in PUBLISHED.values() for key in config} | {"layer_types", "rope_parameters"}
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.floats(allow_nan=False), st.text(max_size=3),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", 3, {}]), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "rope_theta", "factor", "full_attention", "short_factor"]),
        st.one_of(st.sampled_from(["linear", "yarn", "llama3", "longrope"]), st.integers(0, 3), st.none()),
        max_size=3,
    ),
)  # fmt: skip


@given(st.sampled_from(sorted(PUBLISHED)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_no_config_makes_it_fail_in_another_way_than_by_words(name: str, changes: dict[str, object]) -> None:
    config = {**PUBLISHED[name][0], **changes}
    family = describe(config)
    assert family.supported == (family.reason == "")
    if not family.supported:
        return
    assert family.parameter_count > 0
    assert len(DecoderSpec.from_config(config).ropes) == family.layers
