"""A 4-bit base against transformers, PEFT and bitsandbytes, on the CPU in fp32 (tests/gpu repeats it in bf16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from tests.contract.test_engine_families import ROWS, our_logits, their_logits, their_loss, train_slice
from tests.fixtures.tiny_families import build_tiny


def nf4_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_4_bit_base(tmp_path: Path, name: str) -> None:
    from peft import LoraConfig, get_peft_model

    folder = build_tiny(tmp_path, name)
    engine = Engine.load(folder, dtype="float32", base_quantization="nf4")
    plain = Engine.load(folder, dtype="float32")
    # In eval mode bitsandbytes repacks a CPU's weights for a bfloat16 kernel; nothing here drops out.
    model = nf4_model(folder).train()
    for row, ours, before in zip(ROWS, our_logits(engine, ROWS), our_logits(plain, ROWS), strict=True):
        torch.testing.assert_close(ours, their_logits(model, row), atol=2e-4, rtol=0)
        assert (ours - before).abs().max() > 0.05  # it is quantised
    assert engine.memory().base_bytes < plain.memory().base_bytes
    names = tuple(shape.name for shape in engine.spec.module_shapes())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tuned: Any = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    engine.create_adapter("a", LoraSpec(r=4, lora_alpha=6, target_modules=names), seed=5)
    adapter, piece = engine._held["a"].adapter, train_slice(ROWS)
    theirs = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if "lora_" in n}
    for tensor_name, tensor in adapter.named_tensors():
        theirs[tensor_name].data.copy_(tensor)
    (result,), loss = engine.forward_backward([piece]), their_loss(tuned, piece)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    wanted = torch.cat([theirs[n].grad.flatten() for n, _ in adapter.named_tensors()])
    torch.testing.assert_close(adapter.gradients, wanted, atol=2e-5, rtol=1e-3)
