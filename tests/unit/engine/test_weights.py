from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lathe.common.errors import InvalidArgument
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec, read_spec
from lathe.text.families import describe

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "max_position_embeddings": 32,
}  # fmt: skip
P = "model.layers.0."
TENSORS = {
    "model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8),
    P + "self_attn.q_proj.weight": (8, 8), P + "self_attn.k_proj.weight": (4, 8), P + "self_attn.v_proj.weight": (4, 8),
    P + "self_attn.o_proj.weight": (8, 8), P + "mlp.gate_proj.weight": (12, 8), P + "mlp.up_proj.weight": (12, 8),
    P + "mlp.down_proj.weight": (8, 12), P + "input_layernorm.weight": (8,),
    P + "post_attention_layernorm.weight": (8,),
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.ones(size) for name, size in TENSORS.items()}


def write(folder: Path, weights: dict[str, torch.Tensor], **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_sharded_folder_is_the_same_model_as_one_file(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    write(whole, tensors())
    names = sorted(TENSORS)
    index: dict[str, str] = {}
    for i, chunk in enumerate((names[:5], names[5:])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors()[name] for name in chunk}, parts / file)
        index.update(dict.fromkeys(chunk, file))
    (parts / "config.json").write_text(json.dumps(CONFIG))
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    scores = [Engine.load(f, dtype="float32").logprobs("", [1, 2, 3]) for f in (whole, parts)]
    assert scores[0] == scores[1]


def test_what_cannot_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    missing = tensors()
    del missing[P + "mlp.up_proj.weight"]
    with pytest.raises(InvalidArgument, match=r"mlp\.up_proj\.weight"):
        Engine.load(write(tmp_path, missing), dtype="float32")
    with pytest.raises(InvalidArgument, match=r"q_proj\.weight is \(8, 8\); config\.json asks for \(16, 8\)"):
        Engine.load(write(tmp_path, tensors(), head_dim=8), dtype="float32")
    with pytest.raises(InvalidArgument, match="dtype 'int8'"):
        Engine.load(write(tmp_path, tensors()), dtype="int8")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidArgument, match="pickle"):
        Engine.load(tmp_path, dtype="float32")
    write(tmp_path, tensors(), architectures=["MambaForCausalLM"])
    with pytest.raises(InvalidArgument, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        Engine.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InvalidArgument, match="cannot be read as safetensors"):
        Engine.load(tmp_path, dtype="float32")


def test_describe() -> None:
    smol = {
        **CONFIG, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    family = describe(smol)
    assert (family.supported, family.parameter_count, family.context_length) == (True, 134_515_008, 8192)
    assert family.target_modules[0] == "q_proj"
    for change, word in (
        ({"architectures": ["X"]}, "X"),
        ({"rope_scaling": {"type": "dynamic"}}, "dynamic"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ):
        answer = describe({**CONFIG, **change})
        assert not answer.supported
        assert word in answer.reason
        assert answer.methods == ()
    assert not describe({}).supported


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bias": "all"}, "bias"), ({"r": 0}, "r"), ({"r": 2.5}, "r"), ({"lora_alpha": -1}, "lora_alpha"),
        ({"peft_type": "IA3"}, "peft_type"), ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": []}, "target_modules"), ({"target_modules": ".*_proj"}, "regular expression"),
        ({"rank_pattern": {"(a+)+b": 3}}, "regular expression"), ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern"), ({"rank_pattern": [3]}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*whole trained modules"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layers_to_transform": [0]}, "layers_to_transform"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"some_day": {"kind": 1}}, "some_day"),
    ],
)  # fmt: skip
def test_an_adapter_config_that_changes_the_arithmetic_is_refused(
    tmp_path: Path, change: dict[str, object], word: str
) -> None:
    config = {**LoraSpec().to_config("m"), **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match=word):
        read_spec(tmp_path)


def test_an_adapter_config_survives_the_file() -> None:
    spec = LoraSpec(
        r=8, lora_alpha=12, target_modules=("q_proj", "up_proj"), use_rslora=True, use_dora=True, lora_dropout=0.1,
        rank_pattern={"layers.0.mlp.up_proj": 4}, alpha_pattern={"up_proj": 6.5},
    )  # fmt: skip
    assert LoraSpec.from_config(spec.to_config("m")) == spec
    assert spec.rank_of("model.layers.0.mlp.up_proj") == 4
    assert spec.rank_of("model.layers.10.mlp.up_proj") == 8
    assert spec.scale_of("model.layers.0.mlp.up_proj") == pytest.approx(6.5 / 4**0.5)
    assert spec.scale_of("model.layers.0.self_attn.q_proj") == pytest.approx(12 / 8**0.5)
    assert LoraSpec.from_config(LoraSpec().to_config()) == LoraSpec()
