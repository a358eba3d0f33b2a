"""A 4-bit base against transformers, PEFT and bitsandbytes, on the CPU in fp32 (tests/gpu repeats it in bf16)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lathe.common.errors import FailedPrecondition
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.quantized import NF4Linear
from tests.contract.test_engine_families import (
    ROWS,
    assert_same_gradients,
    our_logits,
    their_logits,
    their_loss,
    train_slice,
)
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
    assert_same_gradients(adapter, theirs)


def test_parts_are_one_linear_in_about_half_a_byte_a_weight() -> None:
    parts = [torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows)) for rows in (64, 32)]
    linear, bias = NF4Linear(parts, None), torch.arange(96.0)
    assert linear.nbytes / (96 * 1024) == pytest.approx(0.516, abs=0.001)
    assert NF4Linear(parts, bias).nbytes == linear.nbytes + bias.nbytes
    assert (linear.dense() - torch.cat(parts)).abs().mean() < 0.1
    x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1))
    with_both = NF4Linear(parts, bias).forward(x, torch.ones(5, 96))
    torch.testing.assert_close(with_both, linear.product(x) + bias + 1)
    torch.testing.assert_close(linear.backward(with_both), with_both @ linear.dense())


def test_without_bitsandbytes_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'lathe\[nf4\]'"):
        Engine.load(build_tiny(tmp_path), dtype="float32", base_quantization="nf4")
