from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lathe.engine.base import Decoder
from lathe.engine.engine import Engine
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import random_weights

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> MakeEngine:
    """Engines on one set of random weights; the key/value budget is given in tokens."""

    def make(*, dtype: torch.dtype = torch.float32, kv_tokens: int = 4096, fused: bool = True) -> Engine:
        spec = DecoderSpec.from_config(CONFIG)
        weights = random_weights(spec, device=torch.device("cpu"), dtype=dtype, std=0.2)
        token_bytes = spec.layers * 2 * spec.kv_size * torch.empty((), dtype=dtype).element_size()
        return Engine(Decoder(spec, weights, fused_attention=fused), kv_budget_bytes=kv_tokens * token_bytes)

    return make
