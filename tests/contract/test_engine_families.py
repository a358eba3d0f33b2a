"""Every family's decoder against transformers and PEFT, in fp32 on tiny random models.

The same for all: logits, three training steps, sampling through the cache, packing, and PEFT's files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from lathe.engine.adapters import Adapter
from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice, trained_tokens
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from lathe.engine.sequences import SequenceState
from lathe.text.families import describe
from tests.fixtures.tiny_families import TINY, build_tiny

# Longer than the windows; one longer than longrope's original context, one than a block of queries.
ROWS = [list(range(5, 24)), [7, 3, 9], list(range(40, 90)), [100, 4]]
LONG = torch.randint(0, 600, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Pair:
    """Our engine and transformers' model on one folder; what is trained is made anew."""

    name: str
    folder: Path

    @cached_property
    def engine(self) -> Engine:
        return Engine.load(self.folder, dtype="float32")

    @cached_property
    def model(self) -> Any:
        model = self.reference()
        model.generation_config.eos_token_id = None
        return model

    def reference(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def lora(self) -> LoraSpec:
        modules = tuple(shape.name for shape in self.engine.spec.module_shapes())
        return LoraSpec(r=4, lora_alpha=6, target_modules=modules)


@pytest.fixture(scope="module", params=TINY)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, build_tiny(tmp_path_factory.mktemp(request.param), request.param))


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


def test_logits(pair: Pair) -> None:
    rows = [*ROWS, LONG]
    for row, logits in zip(rows, our_logits(pair.engine, rows), strict=True):
        torch.testing.assert_close(logits, their_logits(pair.model, row), atol=2e-4, rtol=0)


def test_the_size_is_told_from_the_config(pair: Pair) -> None:
    family = describe(json.loads((pair.folder / "config.json").read_text(encoding="utf-8")))
    assert family.supported
    assert family.parameter_count == pair.model.num_parameters()


def peft_model(pair: Pair, spec: LoraSpec, seed: int, modules: str | list[str] = "all-linear") -> Any:
    from peft import LoraConfig, get_peft_model

    model = pair.reference()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(
            model,
            LoraConfig(r=spec.r, lora_alpha=spec.lora_alpha, target_modules=modules, task_type="CAUSAL_LM"),
        )


def trained_parameters(model: Any) -> dict[str, torch.Tensor]:
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}


def their_loss(model: Any, piece: TrainSlice) -> torch.Tensor:
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for row in piece.rows:
        logits = model(torch.tensor([row.tokens], device=device)).logits[0, :-1].float()
        labels = [t if m else -100 for t, m in zip(row.tokens, row.mask, strict=True)][1:]
        targets = torch.tensor(labels, device=device)
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total / piece.objective.batch_tokens


def assert_same_gradients(adapter: Adapter, theirs: Mapping[str, torch.Tensor]) -> None:
    ours = dict(adapter.named_gradients())
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name].grad, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_three_training_steps_are_those_of_peft(pair: Pair) -> None:
    engine, model = pair.engine, peft_model(pair, pair.lora, seed=7)
    engine.create_adapter("steps", pair.lora, seed=7)
    adapter, theirs = engine._held["steps"].adapter, trained_parameters(model)
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.0)
    for name, tensor in adapter.named_tensors():
        assert torch.equal(tensor, theirs[name]), name
    for rows in (ROWS, [LONG], ROWS[2:]):
        piece = train_slice(rows, "steps")
        (result,) = engine.forward_backward([piece])
        loss = their_loss(model, piece)
        loss.backward()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert_same_gradients(adapter, theirs)
        norm = engine.optim_step("steps", 0.01, clip=1.0)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        # Adam divides by the gradient's size: where that is rounding alone the steps may differ, and another kind of
        # CPU rounds otherwise. The next step begins at the same weights again.
        for name, tensor in adapter.named_tensors():
            assert (tensor - theirs[name]).abs().mean() < 2e-5, name
            theirs[name].data.copy_(tensor)
    engine.drop_adapter("steps")


def test_lora_on_the_embeddings_and_the_head(pair: Pair) -> None:
    """Gemma's embeddings are scaled and Phi's head has a bias; the same adapter samples through the cache."""
    spec = replace(pair.lora, target_modules=(*pair.lora.target_modules, "embed_tokens", "lm_head"))
    engine, model = pair.engine, peft_model(pair, spec, 7, list(spec.target_modules))
    engine.create_adapter("ends", spec, seed=7)
    adapter, theirs = engine._held["ends"].adapter, trained_parameters(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in adapter.named_tensors():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
            theirs[name].copy_(tensor)
    adapter.publish()
    piece = train_slice(ROWS, "ends")
    (result,), loss = engine.forward_backward([piece]), their_loss(model, piece)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(adapter, theirs)
    state = engine.open_sequence("ends", ROWS[0], SamplingParams(max_tokens=4, temperature=0, top_logprobs=0))
    logprobs: list[float] = []
    while state.finished is None:
        logprobs += [out.sampled.logprob for out in engine.step([state])]
    engine.close_sequence(state)
    row = [*ROWS[0], *state.tokens]
    scores = torch.log_softmax(their_logits(model, row)[len(ROWS[0]) - 1 : -1], -1)
    assert logprobs == pytest.approx(scores[range(4), state.tokens].tolist(), abs=2e-4)
    engine.drop_adapter("ends")


def test_sampling_through_the_cache(pair: Pair) -> None:
    """Prompts in chunks, decoding in a batch, beyond the windows and longrope's original context."""
    from transformers import GenerationConfig

    prompts = [list(range(5, 24)), [7, 3, 9], list(range(40, 75)), LONG[:80]]
    params = SamplingParams(max_tokens=16, temperature=0, top_logprobs=0)
    states = [pair.engine.open_sequence("", prompt, params) for prompt in prompts]
    logprobs: dict[int, list[float]] = {id(state): [] for state in states}
    while any(state.finished is None for state in states):
        for out in pair.engine.step(states, prefill_tokens=12):
            logprobs[id(out.state)].append(out.sampled.logprob)
    greedy = GenerationConfig(
        max_new_tokens=16, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    for prompt, state in zip(prompts, states, strict=True):
        theirs = pair.model.generate(torch.tensor([prompt]), generation_config=greedy)
        assert state.tokens == theirs.sequences[0].tolist()[len(prompt) :]
        chosen = [
            float(torch.log_softmax(logits[0].float(), -1)[token])
            for logits, token in zip(theirs.logits, state.tokens, strict=True)
        ]
        assert logprobs[id(state)] == pytest.approx(chosen, abs=1e-4)
        assert decoded_again(pair.engine, state) == state.tokens
    for state in states:
        pair.engine.close_sequence(state)


def decoded_again(engine: Engine, state: SequenceState) -> list[int]:
    """The greedy tokens by whole passes, without a cache."""
    tokens = list(state.prompt)
    for _ in state.tokens:
        tokens.append(int(our_logits(engine, [tokens])[0][-1].argmax()))
    return tokens[len(state.prompt) :]


def test_packed_rows_do_not_see_each_other(pair: Pair) -> None:
    engine = pair.engine
    engine.create_adapter("packed", pair.lora, seed=3)
    alone = [our_logits(engine, [row])[0] for row in ROWS]
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        packed = our_logits(engine, [ROWS[i] for i in order])
        for i, logits in zip(order, packed, strict=True):
            torch.testing.assert_close(logits, alone[i], atol=1e-5, rtol=0)
    gradients = []
    for neighbours in (ROWS[:2], [[t + 1 for t in row] for row in ROWS[:2]]):
        unmasked = tuple(TrainRow(row, [False] * len(row)) for row in neighbours)
        kept = train_slice([ROWS[2]], "packed")
        engine.forward_backward([TrainSlice("packed", (*unmasked, *kept.rows), kept.objective)])
        gradients.append(engine._held["packed"].adapter.gradients.clone())
        engine.zero_grad("packed")
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-6)
    assert gradients[0].abs().max() > 1e-3
    engine.drop_adapter("packed")


def test_torchs_attention_is_ours(pair: Pair) -> None:
    """What a GPU uses."""
    decoder = pair.engine.decoder
    other = Engine(Decoder(decoder.spec, decoder.weights, fused_attention=False))
    gradients = []
    for engine in (pair.engine, other):
        engine.create_adapter("attention", pair.lora, seed=3)
        engine.forward_backward([train_slice(ROWS, "attention")])
        gradients.append(engine._held["attention"].adapter.gradients)
        engine.drop_adapter("attention")
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-5, rtol=1e-3)


def test_pefts_files_both_ways(pair: Pair, tmp_path: Path) -> None:
    from peft import PeftModel

    engine = pair.engine
    engine.create_adapter("ours", pair.lora, seed=1)
    for _ in range(2):
        engine.forward_backward([train_slice(ROWS, "ours")])
        engine.optim_step("ours", 0.02)
    engine.save("ours", tmp_path / "ours", with_optimizer=False, base_model="tiny")
    model = PeftModel.from_pretrained(pair.reference(), tmp_path / "ours")
    for row, logits in zip(ROWS, our_logits(engine, ROWS, "ours"), strict=True):
        torch.testing.assert_close(logits, their_logits(model, row), atol=2e-4, rtol=0)
    model.save_pretrained(tmp_path / "theirs")
    engine.load_adapter("theirs", tmp_path / "theirs")
    for a, b in zip(our_logits(engine, ROWS, "ours"), our_logits(engine, ROWS, "theirs"), strict=True):
        assert torch.equal(a, b)
    for key in ("ours", "theirs"):
        engine.drop_adapter(key)
