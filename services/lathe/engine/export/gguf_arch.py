"""Which of llama.cpp's architectures computes what a model does, and what it wants said and changed for it.

Facts of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names of tensors come from the gguf
package. What an architecture of llama.cpp has built in and a model does otherwise is refused here in words; whether the
rest is right is for the check after the export (verify.py) to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.rope import RopeSpec, frequencies, yarn_scale
from lathe.engine.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Architecture:
    """name: of gguf.MODEL_ARCH. interleaved: rotary pairs lie side by side, so the rows of q and k are reordered.
    windows: it has layers with a sliding window, every sixth without. biased: its linears may have biases."""

    name: str
    interleaved: bool = False
    windows: bool = False
    biased: bool = True


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("LLAMA", interleaved=True),
    "MistralForCausalLM": Architecture("LLAMA", interleaved=True),
    "Qwen2ForCausalLM": Architecture("QWEN2"),
    "Qwen3ForCausalLM": Architecture("QWEN3", biased=False),
    "Gemma3ForCausalLM": Architecture("GEMMA3", windows=True, biased=False),
    "PhiForCausalLM": Architecture("PHI2"),
    "Phi3ForCausalLM": Architecture("PHI3", biased=False),
}
_GEMMA_PATTERN = 6
_LARGEST_GEMMA_LAYERS = 62


def architecture_of(spec: DecoderSpec) -> Architecture:
    """Raises InvalidArgument for a model that llama.cpp would compute otherwise."""
    found = ARCHITECTURES.get(spec.architecture)
    if found is None:
        raise _refused(f"{spec.architecture} is none of {', '.join(ARCHITECTURES)}")
    if not found.biased and any(linear.bias for linear in spec.linears):
        raise _refused(f"llama.cpp has no biases for {spec.architecture}")
    if found.windows:
        _check_gemma(spec)
    elif len(set(spec.ropes)) > 1:
        raise _refused("its layers have different rotary embeddings")
    for rope in spec.ropes:
        if rope.kind == "longrope" and found.name != "PHI3":
            raise _refused(f"llama.cpp has no longrope for {spec.architecture}")
        if rope.kind == "yarn" and abs(rope.scale - yarn_scale(rope.factor)) > 1e-6:
            raise _refused(f"its rotary attention_factor {rope.scale:g} is not YaRN's own")
    return found


def _check_gemma(spec: DecoderSpec) -> None:
    for layer, window in enumerate(spec.windows):
        if (window is None) != ((layer + 1) % _GEMMA_PATTERN == 0):
            raise _refused(
                f"llama.cpp has every {_GEMMA_PATTERN}th layer of Gemma 3 without a window, and no other"
            )
    whole = spec.hidden_size // spec.heads if spec.layers == _LARGEST_GEMMA_LAYERS else spec.head_dim
    if abs(spec.attention_scale - whole**-0.5) > 1e-6:
        raise _refused(f"llama.cpp has a query_pre_attn_scalar of {whole} for it")


def context_of(spec: DecoderSpec, architecture: Architecture) -> int:
    """Tokens up to which llama.cpp sees what the model does: where it has no window, no more than the window."""
    windows = [] if architecture.windows else [window for window in spec.windows if window is not None]
    return min([spec.context_length, *windows])


def arrange(name: str, tensor: Tensor, architecture: Architecture, spec: DecoderSpec) -> Tensor:
    """A tensor by its name in the Hugging Face folder, as llama.cpp wants it."""
    if spec.norm == "rms+1" and name.endswith("norm.weight"):
        return tensor + 1
    if architecture.interleaved:
        for module, heads in (("q_proj", spec.heads), ("k_proj", spec.kv_heads)):
            if f".{module}." in name:
                halves = tensor.reshape(heads, 2, spec.head_dim // 2, *tensor.shape[1:])
                return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def describe(writer: gguf.GGUFWriter, spec: DecoderSpec, architecture: Architecture) -> None:
    """The model's numbers, as metadata."""
    writer.add_block_count(spec.layers)
    writer.add_context_length(context_of(spec, architecture))
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_vocab_size(spec.vocab_size)
    if spec.norm == "layer":
        writer.add_layer_norm_eps(spec.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(spec.norm_eps)
    if architecture.windows:
        local = next(i for i, window in enumerate(spec.windows) if window is not None)
        writer.add_sliding_window(spec.windows[local] or 0)
        writer.add_rope_freq_base_swa(spec.ropes[local].theta)
    _describe_rope(writer, _rope(spec))


def rope_tensors(spec: DecoderSpec) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies [size / 2], under llama.cpp's names; empty where it computes them."""
    rope = _rope(spec)
    if rope.kind == "llama3":
        plain = frequencies(RopeSpec(rope.theta, rope.size))
        return {"rope_freqs.weight": plain / frequencies(rope)}
    if rope.kind == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(rope.long, dtype=torch.float32),
            "rope_factors_short.weight": torch.tensor(rope.short, dtype=torch.float32),
        }
    return {}


def _rope(spec: DecoderSpec) -> RopeSpec:
    """Of the layers that see everything, where layers differ."""
    whole = [rope for rope, window in zip(spec.ropes, spec.windows, strict=True) if window is None]
    return (whole or list(spec.ropes))[0]


def _describe_rope(writer: gguf.GGUFWriter, rope: RopeSpec) -> None:
    writer.add_rope_dimension_count(rope.size)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    if rope.kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
        writer.add_rope_scaling_attn_factors(rope.scale)


def _refused(why: str) -> InvalidArgument:
    return InvalidArgument(f"This model cannot be exported as GGUF: {why}. Export safetensors instead.")
