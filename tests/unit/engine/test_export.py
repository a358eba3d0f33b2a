"""What decides in an export: names of pre-tokenizers, ties, shards, the Modelfile's template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.engine.export.export import MergedType, check_difference
from lathe.engine.export.gguf_arch import architecture_of, arrange, context_of
from lathe.engine.export.gguf_vocab import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, vocabulary
from lathe.engine.export.modelfile import modelfile, read_turns
from lathe.engine.export.reference import LogitDifference, Reference, logit_difference
from lathe.engine.export.shards import shards
from lathe.engine.export.source import Lineage, Source, TensorInfo
from lathe.engine.export.verify import TIE, compare_greedy
from lathe.engine.spec import DecoderSpec
from lathe.text.template import ChatTemplate
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.templates import BOS, EOS, REAL
from tests.fixtures.tiny import tiny_tokenizer_config, tiny_tokenizer_json

BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, Any]:
    return sequence(
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "use_regex": False},
    )


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def tokenizer_json(pre_tokenizer: dict[str, Any] | None, **model: object) -> bytes:
    content = {
        "pre_tokenizer": pre_tokenizer,
        "added_tokens": [
            {"id": 3, "content": "<s>", "special": True},
            {"id": 4, "content": "<tool>", "special": False},
        ],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **model},
    }
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        (sequence(DIGITS, BYTE_LEVEL), "smollm"),
        (split(LLAMA3), "llama-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
    ],
)
def test_a_pre_tokenizer_is_known_by_what_it_does(pre_tokenizer: dict[str, Any], name: str) -> None:
    found = vocabulary(tokenizer_json(pre_tokenizer), rows=6)
    assert (found.kind, found.pre, found.merges) == ("gpt2", name, ("a b",))
    assert found.tokens == ("a", "b", "ab", "<s>", "<tool>", "[PAD5]")
    assert found.types == (NORMAL, NORMAL, NORMAL, CONTROL, USER_DEFINED, UNUSED)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {"type": "Whitespace"},
        split("other"),
        sequence(DIGITS),
        {**BYTE_LEVEL, "add_prefix_space": True},
    ],
)
def test_another_pre_tokenizer_is_refused(pre_tokenizer: dict[str, Any] | None) -> None:
    with pytest.raises(InvalidArgument, match=r"llama\.cpp has no name for"):
        vocabulary(tokenizer_json(pre_tokenizer), rows=6)


def test_sentencepiece_keeps_the_order_of_merges() -> None:
    source = tokenizer_json(
        None, byte_fallback=True, vocab={"<0x0A>": 0, "▁": 1, "▁a": 2}, merges=["▁ a", "▁a b"]
    )
    found = vocabulary(source, rows=5)
    assert (found.kind, found.types[0], found.merges, found.add_space_prefix) == ("llama", BYTE, (), False)
    assert found.scores[2] > found.scores[1]


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="the id 4, the model's embedding only 3 rows"):
        vocabulary(tokenizer_json(BYTE_LEVEL), rows=3)


def test_greedy_tokens_may_differ_by_a_tie_alone() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0 - TIE / 2], [3.0, 0.0, 1.0], [0.0, 5.0, 0.0]])
    assert compare_greedy(logits, [1, 0]) == 0
    assert compare_greedy(logits, [2, 0, 1]) == 1
    with pytest.raises(
        FailedPrecondition, match=r"at greedy token 2 it takes 2 where ours takes 0, 2\.000 above"
    ):
        compare_greedy(logits, [1, 2])
    with pytest.raises(FailedPrecondition):
        compare_greedy(torch.full((1, 3), torch.nan), [0])


@pytest.mark.parametrize("kind", MergedType)
def test_a_difference_beyond_the_bound_is_refused(kind: MergedType) -> None:
    check_difference(LogitDifference(0.9 * kind.bound, 1.0, 10), kind)
    for largest in (1.1 * kind.bound, float("nan")):
        with pytest.raises(FailedPrecondition, match="logits differ") as raised:
            check_difference(LogitDifference(largest, 1.0, 10), kind)
        assert raised.value.reason == "EXPORT_DIFFERS"


def test_a_nan_in_one_row_is_no_small_difference() -> None:
    class Broken(Reference):
        def __init__(self) -> None:
            """No model: NaN for rows of two tokens, zeros for others."""

        def logits(self, tokens: Sequence[int]) -> torch.Tensor:
            return torch.full((len(tokens), 3), torch.nan if len(tokens) == 2 else 0.0)

    rows = [[1, 2], [1, 2, 3]]
    found = logit_difference([torch.eye(3)[: len(row)] for row in rows], Broken(), rows)
    assert found.largest != found.largest and found.tokens == 5
    with pytest.raises(FailedPrecondition, match="logits differ"):
        check_difference(found, MergedType.BF16)


def test_shards_are_cut_before_what_does_not_fit() -> None:
    infos = [TensorInfo(str(i), (size,)) for i, size in enumerate((3, 2, 9, 1, 1))]
    parts = [[info.name for info in part] for part in shards(infos, torch.bfloat16, 10)]
    assert parts == [["0", "1"], ["2"], ["3", "4"]]


def test_rows_of_q_are_reordered_for_interleaved_pairs() -> None:
    spec = spec_of("LlamaForCausalLM")
    tensor = torch.arange(8.0)[:, None]
    got = arrange("model.layers.0.self_attn.q_proj.weight", tensor, architecture_of(spec), spec)
    assert got.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    other = spec_of("Qwen2ForCausalLM")
    assert arrange("model.layers.0.self_attn.q_proj.weight", tensor, architecture_of(other), other) is tensor


def test_a_window_that_llama_cpp_has_not_shortens_the_context() -> None:
    spec = spec_of("MistralForCausalLM", sliding_window=40)
    assert context_of(spec, architecture_of(spec)) == 40


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("Qwen3ForCausalLM", {"attention_bias": True}, "no biases for Qwen3"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 2}, "every 6th layer"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 9}, "query_pre_attn_scalar of 4"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
            "attention_factor 2",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    architecture: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        architecture_of(spec_of(architecture, **changes))


def spec_of(architecture: str, **changes: object) -> DecoderSpec:
    settings: dict[str, object] = {
        "architectures": [architecture],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "query_pre_attn_scalar": 4,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    return DecoderSpec.from_config({**settings, **changes})


def test_chatml_becomes_a_modelfile() -> None:
    tokenizer = Tokenizer.from_files(tiny_tokenizer_json().encode(), tiny_tokenizer_config())
    text = modelfile("tiny.gguf", tokenizer, bos_added=False)
    assert text.startswith("FROM ./tiny.gguf\nTEMPLATE ")
    assert (
        '{{ if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}{{ end }}'
        in text
    )
    assert text.endswith('{{ "<|im_start|>assistant\\n" }}"""\nPARAMETER stop "<|im_end|>"\n')


@pytest.mark.parametrize("name", REAL)
def test_turns_render_as_the_template_or_there_are_none(name: str) -> None:
    template = ChatTemplate(REAL[name], BOS[name], EOS[name])
    turns = read_turns(template)
    chat = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    if name in ("mistral", "phi3"):
        # The one's system message goes into the user's, the other ends a conversation in its own way: no string around
        # a message says that.
        assert turns is None
        return
    assert turns is not None
    assert turns.render(chat) == template.render(chat, add_generation_prompt=True)


def test_a_name_becomes_a_file_name(tmp_path: Any) -> None:
    source = Source(tmp_path, None, Lineage("ft:base:default:my name:1"))
    assert source.name == "ft-base-default-my-name-1"
