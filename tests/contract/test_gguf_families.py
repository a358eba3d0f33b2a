"""GGUF files of the families, written as llama.cpp's converter writes them, become the models they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lathe.common.errors import InvalidArgument
from lathe.engine.convert import from_gguf
from lathe.engine.engine import Engine
from lathe.engine.rope import RopeSpec, frequencies
from tests.contract.test_engine_families import ROWS, our_logits
from tests.fixtures.tiny import CHATML, SPECIAL_TOKENS
from tests.fixtures.tiny_families import LLAMA3, build_tiny

# llama.cpp's name of the architecture, and the changes that make a tiny model one that such a file can describe: what
# all models of a family have in common (Qwen3's wide heads, Gemma 3's local layers) is not in it.
GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
}
GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "mistral-full": ("llama", {"head_dim": 16}),
    "gemma3": (
        "gemma3",
        {
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": GEMMA3_ROPES,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {}),
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k in the order llama.cpp keeps Llama's."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, file: Path, architecture: str, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    add_metadata(writer, config, name)
    add_tokenizer(writer, folder)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for path, tensor in load_file(folder / "model.safetensors").items():
        stem, part = path.rsplit(".", 1)
        module = stem.rpartition(".")[2]
        permute = architecture == "llama" and module in heads
        weight = permuted(tensor, heads[module]) if permute else tensor
        weight = weight + 1 if architecture == "gemma3" and module.endswith("norm") else weight
        writer.add_tensor(f"{names.get_name(stem)}.{part}", weight.float().numpy())
    add_divisors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])
    if rope["rope_type"] in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def add_divisors(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        plain = RopeSpec(rope["rope_theta"], size)
        scaled = RopeSpec(rope["rope_theta"], size, "llama3", rope["factor"])
        writer.add_tensor("rope_freqs.weight", (frequencies(plain) / frequencies(scaled)).numpy())
    for kind in ("long", "short"):
        if f"{kind}_factor" in rope:
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path: Path, name: str) -> None:
    architecture, changes = GGUF[name]
    folder = build_tiny(tmp_path / "original", name, **changes)
    rounded = {
        path: tensor.bfloat16().float() for path, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    write_gguf(folder, tmp_path / "tiny.gguf", architecture, name)
    imported = from_gguf(tmp_path / "tiny.gguf", tmp_path / "imported")
    before = our_logits(Engine.load(folder, dtype="float32"), ROWS)
    after = our_logits(Engine.load(imported.folder, dtype="float32"), ROWS)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_a_family_without_a_reader_is_refused_with_words(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "phi-2.gguf", "phi2")
    writer.add_chat_template(CHATML)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidArgument, match=r"phi-2\.gguf cannot be converted: .*phi2"):
        from_gguf(tmp_path / "phi-2.gguf", tmp_path / "imported")
