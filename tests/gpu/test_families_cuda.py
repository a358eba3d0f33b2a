"""Every family on a GPU, in bfloat16 and on a 4-bit base, against transformers, PEFT and bitsandbytes.

`make test-gpu` runs this; `make test-gpu DEVICE=cpu` runs the same on the CPU, slowly, to check the tests.

In bfloat16 two right programs round differently, so both are held against transformers in fp32 on the same (rounded or
quantised) weights: our relative error may be at most BOUND times transformers' own in bfloat16.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from tests.contract.test_engine_families import ROWS, our_logits, their_loss, train_slice
from tests.fixtures.tiny_families import build_tiny

DEVICE = os.environ.get("LATHE_TEST_DEVICE", "cuda")
FAMILIES = ("llama", "qwen2-window", "qwen3", "mistral", "gemma3", "phi", "phi3", "phi3-longrope")
BOUND = 2.0


@dataclass
class Case:
    """One family's folder, and whether its base is in 4 bits."""

    folder: Path
    nf4: bool

    def engine(self) -> Engine:
        quantization = "nf4" if self.nf4 else "none"
        return Engine.load(self.folder, device=DEVICE, dtype="bfloat16", base_quantization=quantization)

    def model(self, dtype: torch.dtype) -> Any:
        """transformers on the weights in bfloat16, computing in this type."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        if not self.nf4:
            rounded = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16)
            return rounded.to(DEVICE, dtype)
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": DEVICE}
        )
        # In eval mode bitsandbytes repacks a CPU's weights; nothing here drops out.
        return model.train() if dtype is torch.bfloat16 else dense(model.train())


def dense(model: Any) -> Any:
    """The 4-bit linears made dense, all in fp32: the exact product of the quantised weights."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                weight = functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                plain.weight.data = weight
                if child.bias is not None:
                    plain.bias.data = child.bias.data
                setattr(module, name, plain)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(DEVICE, torch.float32 if tensor.is_floating_point() else tensor.dtype)
    model.is_quantized = model.is_loaded_in_4bit = False
    del model.hf_quantizer, model.config.quantization_config
    return model


@pytest.fixture(scope="module", params=[(name, nf4) for name in FAMILIES for nf4 in (False, True)], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, nf4 = request.param
    return Case(build_tiny(tmp_path_factory.mktemp("tiny"), name), nf4)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row], device=DEVICE)).logits[0].float() for row in ROWS])


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.float() - exact).norm() / exact.norm())


def test_logits(case: Case) -> None:
    exact, theirs = logits_of(case.model(torch.float32)), logits_of(case.model(torch.bfloat16))
    ours = torch.cat(our_logits(case.engine(), ROWS))
    assert error(ours, exact) <= BOUND * error(theirs, exact)
    assert error(theirs, exact) < 0.1


def gradients_of(model: Any, tensors: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Loss and LoRA gradients of one step from these adapter weights."""
    from peft import LoraConfig, get_peft_model

    tuned: Any = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if "lora_" in n}
    for name, tensor in tensors.items():
        theirs[name].data.copy_(tensor)
    loss = their_loss(tuned, train_slice(ROWS))
    loss.backward()
    return loss.item(), torch.cat([theirs[name].grad.float().flatten() for name in tensors])


def test_a_training_step(case: Case) -> None:
    engine = case.engine()
    names = tuple(shape.name for shape in engine.spec.module_shapes())
    engine.create_adapter("a", LoraSpec(r=4, lora_alpha=6, target_modules=names), seed=5)
    adapter, generator = engine._held["a"].adapter, torch.Generator().manual_seed(2)
    tensors = dict(adapter.named_tensors())
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator).to(DEVICE), alpha=0.02)
    adapter.publish()
    piece = train_slice(ROWS)
    (result,) = engine.forward_backward([piece])
    exact_loss, exact = gradients_of(case.model(torch.float32), tensors)
    loss, theirs = gradients_of(case.model(torch.bfloat16), tensors)
    ours = torch.cat([gradient.flatten() for _, gradient in adapter.named_gradients()])
    assert abs(result.loss - exact_loss) <= max(BOUND * abs(loss - exact_loss), 0.01)
    assert error(ours, exact) <= BOUND * error(theirs, exact)


def test_sampling_through_the_cache_is_the_whole_pass(case: Case) -> None:
    engine = case.engine()
    params = SamplingParams(max_tokens=12, temperature=0, top_logprobs=0)
    # None crosses longrope's original context of 40, where a whole pass rotates what was sampled before otherwise.
    prompts = [list(range(5, 24)), [7, 3, 9], list(range(40, 66)), list(range(40, 100))]
    states = [engine.open_sequence("", prompt, params) for prompt in prompts]
    logprobs: dict[int, list[float]] = {id(state): [] for state in states}
    while any(state.finished is None for state in states):
        for out in engine.step(states, prefill_tokens=12):
            logprobs[id(out.state)].append(out.sampled.logprob)
    for prompt, state in zip(prompts, states, strict=True):
        whole = engine.logprobs("", [*prompt, *state.tokens])[len(prompt) - 1 :]
        assert logprobs[id(state)] == pytest.approx(whole, abs=0.1)
