"""Our decoder, LoRA and cache against transformers and PEFT, in fp32 on a tiny Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice, trained_tokens
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from lathe.engine.sequences import SequenceState
from tests.fixtures.tiny_llama import build_tiny_llama

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "tied": {},
    "untied-llama3": {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "biases-head-dim": {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_key_value_heads": 1},
}
ROWS = [list(range(5, 24)), [7, 3, 9], list(range(40, 90)), [100]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"))


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def engine_of(folder: Path) -> Engine:
    return Engine.load(folder, dtype="float32")


def our_logits(engine: Engine, rows: list[list[int]], key: str = "") -> list[torch.Tensor]:
    with torch.no_grad():
        hidden = engine._rows_pass(key, rows, training=False)
        return list(engine.decoder.logits(hidden).split([len(row) for row in rows]))


def their_logits(model: Any, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0]


def train_slice(rows: list[list[int]], key: str = "a") -> TrainSlice:
    made = tuple(TrainRow(row, [i % 3 != 1 for i in range(len(row))]) for row in rows)
    return TrainSlice(key, made, CrossEntropy(sum(trained_tokens(row) for row in made)))


def decode(engine: Engine, states: list[SequenceState], **options: int) -> None:
    while any(state.finished is None for state in states):
        engine.step(states, **options)
    for state in states:
        engine.close_sequence(state)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(tmp_path: Path, shape: str) -> None:
    build_tiny_llama(tmp_path, **SHAPES[shape])
    model = reference(tmp_path)
    ours = our_logits(engine_of(tmp_path), ROWS)
    for row, logits in zip(ROWS, ours, strict=True):
        torch.testing.assert_close(logits, their_logits(model, row), atol=1e-4, rtol=0)


def test_a_row_longer_than_a_query_block(folder: Path) -> None:
    row = torch.randint(0, 600, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    torch.testing.assert_close(
        our_logits(engine_of(folder), [row])[0], their_logits(reference(folder), row), atol=1e-4, rtol=0
    )


def peft_model(folder: Path, spec: LoraSpec, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    model = reference(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(
            model,
            LoraConfig(
                r=spec.r, lora_alpha=spec.lora_alpha, target_modules=spec.to_config()["target_modules"],
                task_type="CAUSAL_LM", use_rslora=spec.use_rslora,
            ),
        )  # fmt: skip


def names_of(model: Any) -> dict[str, torch.Tensor]:
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(r=4, lora_alpha=6),
        LoraSpec(r=3, lora_alpha=5, target_modules=("q_proj", "v_proj"), use_rslora=True),
    ],
)
def test_initial_weights_and_gradients_are_those_of_peft(folder: Path, spec: LoraSpec) -> None:
    engine, model = engine_of(folder), peft_model(folder, spec, seed=7)
    engine.create_adapter("a", spec, seed=7)
    adapter = engine._held["a"].adapter
    theirs = names_of(model)
    for name, tensor in adapter.named_tensors():
        assert torch.equal(tensor, theirs[name]), name
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in adapter.named_tensors():
            if "lora_B" in name:
                tensor.normal_(std=0.05, generator=generator)
                theirs[name].copy_(tensor)
    adapter.publish()
    long = torch.randint(0, 600, (300,), generator=generator).tolist()
    for rows in ([row for row in ROWS if len(row) > 1], [long]):
        piece = train_slice(rows)
        (result,) = engine.forward_backward([piece])
        model.zero_grad()
        total = torch.zeros(())
        for row in piece.rows:
            logits = model(torch.tensor([row.tokens])).logits[0, :-1]
            labels = torch.tensor([t if m else -100 for t, m in zip(row.tokens, row.mask, strict=True)][1:])
            total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (total / result.tokens).backward()
        assert result.loss == pytest.approx(result.loss_sum / result.tokens)
        assert result.loss_sum == pytest.approx(total.item(), rel=1e-5)
        masters = adapter.master
        adapter.master = adapter.gradients
        for name, gradient in adapter.named_tensors():
            torch.testing.assert_close(
                gradient, theirs[name].grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
        adapter.master = masters
        engine.zero_grad("a")


def test_peft_loads_what_we_save_and_we_load_what_peft_saves(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    engine, spec = engine_of(folder), LoraSpec(r=4, lora_alpha=8)
    engine.create_adapter("a", spec, seed=1)
    for _ in range(3):
        engine.forward_backward([train_slice([row for row in ROWS if len(row) > 1])])
        engine.optim_step("a", 0.02)
    engine.save("a", tmp_path / "ours", with_optimizer=False, base_model="tiny")
    model = PeftModel.from_pretrained(reference(folder), tmp_path / "ours")
    for row, logits in zip(ROWS, our_logits(engine, ROWS, "a"), strict=True):
        torch.testing.assert_close(logits, their_logits(model, row), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "theirs")
    engine.load_adapter("b", tmp_path / "theirs")
    for a, b in zip(our_logits(engine, ROWS, "a"), our_logits(engine, ROWS, "b"), strict=True):
        assert torch.equal(a, b)


def test_decoding_with_the_cache_is_the_full_pass(folder: Path) -> None:
    from transformers import GenerationConfig

    engine, model = engine_of(folder), reference(folder)
    prompts = [row for row in ROWS if len(row) != 50] + [list(range(200, 260))]
    params = SamplingParams(max_tokens=24, temperature=0)
    states = [engine.open_sequence("", prompt, params) for prompt in prompts]
    decode(engine, states, prefill_tokens=16)
    greedy = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    for prompt, state in zip(prompts, states, strict=True):
        whole = model.generate(torch.tensor([prompt]), generation_config=greedy)[0].tolist()
        assert state.tokens == whole[len(prompt) :]
        assert state.finished == "length"


def test_a_batch_of_several_adapters_is_each_alone(folder: Path) -> None:
    engine = engine_of(folder)
    specs = {
        "a": LoraSpec(r=4, lora_alpha=8),
        "b": LoraSpec(r=2, lora_alpha=8, target_modules=("v_proj", "down_proj")),
    }
    specs["c"] = LoraSpec(r=8, lora_alpha=4, target_modules=("q_proj", "gate_proj", "up_proj"))
    for i, (key, spec) in enumerate(specs.items()):
        engine.create_adapter(key, spec, seed=i)
        for _ in range(2):
            engine.forward_backward([train_slice([row for row in ROWS if len(row) > 1], key)])
            engine.optim_step(key, 0.05)
    params = SamplingParams(max_tokens=12, temperature=0, top_logprobs=0)
    keys = ["a", "", "b", "c", "a", "b"]
    prompts = [list(range(10 * i, 10 * i + 5 + 3 * i)) for i in range(len(keys))]
    mixed = [engine.open_sequence(key, prompt, params) for key, prompt in zip(keys, prompts, strict=True)]
    logprobs: dict[int, list[float]] = {id(state): [] for state in mixed}
    while any(state.finished is None for state in mixed):
        for out in engine.step(mixed, prefill_tokens=400):
            logprobs[id(out.state)].append(out.sampled.logprob)
    for key, prompt, state in zip(keys, prompts, mixed, strict=True):
        alone = engine.open_sequence(key, prompt, params)
        decode(engine, [alone])
        assert alone.tokens == state.tokens
        scored = engine.logprobs(key, [*prompt, *state.tokens])[len(prompt) - 1 :]
        assert scored == pytest.approx(logprobs[id(state)], abs=1e-4)
