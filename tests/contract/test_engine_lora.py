"""Each kind of LoRA beside transformers and PEFT, in fp32 on a tiny Llama: files, numbers, training steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lathe.engine.adapters import Adapter
from lathe.engine.bank import row_identity
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice, trained_tokens
from lathe.engine.dropout import keep_mask
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from lathe.text.architectures import LINEAR_MODULES
from tests.fixtures.tiny_llama import build_tiny_llama

EVERYTHING = (*LINEAR_MODULES, "embed_tokens", "lm_head")
SPECS: dict[str, LoraSpec] = {
    "plain": LoraSpec(r=4, lora_alpha=6),
    "rslora": LoraSpec(r=3, lora_alpha=5, target_modules=("q_proj", "v_proj"), use_rslora=True),
    "embeddings": LoraSpec(r=4, lora_alpha=8, target_modules=EVERYTHING),
    "head": LoraSpec(r=4, lora_alpha=8, target_modules=("lm_head",)),
    "patterns": LoraSpec(
        r=2,
        lora_alpha=4,
        rank_pattern={"layers.0.self_attn.q_proj": 5, "down_proj": 3, r"^model.layers.1.mlp.up_proj": 1},
        alpha_pattern={"q_proj": 9, "layers.1.mlp.down_proj": 2.5},
    ),
    "dora": LoraSpec(r=4, lora_alpha=6, use_dora=True),
    "dora-some": LoraSpec(r=2, lora_alpha=3, target_modules=("k_proj", "up_proj", "o_proj"), use_dora=True),
    "dora-everything": LoraSpec(
        r=3, lora_alpha=6, target_modules=EVERYTHING, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}
    ),
}  # fmt: skip
BASES: dict[str, dict[str, object]] = {
    "tied": {},
    "untied-biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
}
ROWS = [list(range(5, 24)), [7, 3, 9], list(range(40, 90)), [9, 9, 11, 600]]
LR = 0.005


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {
        name: build_tiny_llama(tmp_path_factory.mktemp(name), **changes) for name, changes in BASES.items()
    }


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peft_model(folder: Path, spec: LoraSpec, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = {**spec.to_config(), "inference_mode": False}
    model = reference(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(**config))


def their_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's own, by the names that its file gives them."""
    named = ((name.replace(".default", ""), value) for name, value in model.named_parameters())
    return {
        name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): value
        for name, value in named
        if "lora_" in name
    }


def slice_of(rows: list[list[int]], key: str = "a") -> TrainSlice:
    made = tuple(TrainRow(row, [i % 3 != 1 for i in range(len(row))]) for row in rows)
    return TrainSlice(key, made, CrossEntropy(sum(trained_tokens(row) for row in made)))


def their_loss(model: Any, piece: TrainSlice) -> torch.Tensor:
    total = torch.zeros(())
    for row in piece.rows:
        logits = model(torch.tensor([row.tokens])).logits[0, :-1]
        labels = torch.tensor([t if m else -100 for t, m in zip(row.tokens, row.mask, strict=True)][1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total


def our_logits(engine: Engine, rows: list[list[int]], key: str = "") -> list[torch.Tensor]:
    with torch.no_grad():
        hidden = engine._rows_pass(key, rows, training=False)
        lengths = [len(row) for row in rows]
        lora = engine._bank.plan_head([engine._slot(key)] * len(rows), lengths)
        return list(engine.decoder.logits(hidden, lora).split(lengths))


def assert_same_logits(engine: Engine, key: str, model: Any) -> None:
    for row, logits in zip(ROWS, our_logits(engine, ROWS, key), strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits, theirs, atol=2e-4, rtol=0)


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], atol: float) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=atol, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def begin_alike(adapter: Adapter, theirs: Mapping[str, torch.nn.Parameter]) -> None:
    """Adam divides by the gradient's size: where that is rounding alone, which differs between kinds of CPU, a step
    goes either way. Each step is compared from the same weights on."""
    for name, tensor in adapter.named_tensors():
        assert (tensor - theirs[name]).abs().mean() < 2e-5, name
        theirs[name].data.copy_(tensor)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", SPECS)
def test_training_is_that_of_transformers_and_peft(
    folders: Mapping[str, Path], kind: str, base: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    spec, folder = SPECS[kind], folders[base]
    engine, model = Engine.load(folder, dtype="float32"), peft_model(folder, spec, seed=7)
    engine.create_adapter("a", spec, seed=7)
    adapter, theirs = engine._held["a"].adapter, their_parameters(model)
    for name, tensor in adapter.named_tensors():
        if "magnitude" in name:
            torch.testing.assert_close(tensor, theirs[name].data, atol=0, rtol=1e-6)
        else:
            assert torch.equal(tensor, theirs[name]), name
    optimizer = torch.optim.AdamW(theirs.values(), lr=LR, weight_decay=0.1)
    for step in range(3):
        begin_alike(adapter, theirs)
        piece = slice_of([[(token + step) % 600 for token in row] for row in ROWS])
        (result,) = engine.forward_backward([piece])
        optimizer.zero_grad()
        loss = their_loss(model, piece)
        (loss / result.tokens).backward()
        assert result.loss_sum == pytest.approx(loss.item(), rel=1e-4)
        gradients = {name: value.grad for name, value in theirs.items() if value.grad is not None}
        assert_same(dict(adapter.named_gradients()), gradients, atol=2e-5)
        norm = float(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0))
        optimizer.step()
        assert engine.optim_step("a", LR, clip=1.0, weight_decay=0.1) == pytest.approx(norm, rel=1e-3)
    assert_same_logits(engine, "a", model)
    engine.save("a", tmp_path / "ours", with_optimizer=False, base_model="tiny")
    assert_same_logits(engine, "a", PeftModel.from_pretrained(reference(folder), tmp_path / "ours"))
    model.save_pretrained(tmp_path / "theirs")
    engine.load_adapter("b", tmp_path / "theirs")
    assert_same_logits(engine, "b", model)


class OurMask(torch.nn.Module):
    """Takes PEFT's dropout's place: the mask that the engine draws for the row that is being computed."""

    def __init__(self, path: str, seed: int, p: float) -> None:
        super().__init__()
        self.path, self.seed, self.p = path, seed, p
        self.step, self.row, self.chosen = 0, 0, torch.empty(0, dtype=torch.int64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        # The engine sends the trained positions alone through the head, and draws for those.
        places = self.chosen if self.path == "lm_head" else torch.arange(x.shape[1])
        draw = (self.seed, self.step, self.path)
        mask = torch.zeros(x.shape[1:], dtype=torch.bool)
        mask[places] = keep_mask([(len(places), self.row)], x.shape[2], p=self.p, draw=draw, device=x.device)
        return x * mask / (1 - self.p)


@pytest.mark.parametrize("use_dora", [False, True])
def test_with_dropout_it_is_peft_with_our_masks(folders: Mapping[str, Path], *, use_dora: bool) -> None:
    spec = LoraSpec(
        r=3,
        lora_alpha=6,
        target_modules=(*LINEAR_MODULES, "lm_head"),
        lora_dropout=0.25,
        use_dora=use_dora,
        rank_pattern={"v_proj": 2},
    )
    folder = folders["untied-biases"]
    engine, model = Engine.load(folder, dtype="float32"), peft_model(folder, spec, seed=7)
    engine.create_adapter("a", spec, seed=7)
    adapter, theirs = engine._held["a"].adapter, their_parameters(model)
    masks = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            masks.append(OurMask(name.removeprefix("base_model.model."), 7, spec.lora_dropout))
            module.lora_dropout["default"] = masks[-1]
    model.train()
    optimizer = torch.optim.AdamW(theirs.values(), lr=LR, weight_decay=0)
    for step in range(3):
        begin_alike(adapter, theirs)
        piece = slice_of(ROWS)
        (result,) = engine.forward_backward([piece])
        optimizer.zero_grad()
        loss = torch.zeros(())
        for row in piece.rows:
            for mask in masks:
                mask.step, mask.row = step, row_identity(row.tokens)
                mask.chosen = torch.tensor([i - 1 for i in range(1, len(row.mask)) if row.mask[i]])
            loss = loss + their_loss(model, TrainSlice("a", (row,), CrossEntropy(1)))
        (loss / result.tokens).backward()
        assert result.loss_sum == pytest.approx(loss.item(), rel=1e-4)
        gradients = {name: value.grad for name, value in theirs.items() if value.grad is not None}
        assert_same(dict(adapter.named_gradients()), gradients, atol=2e-5)
        optimizer.step()
        engine.optim_step("a", LR, clip=0)
    model.eval()
    assert_same_logits(engine, "a", model)  # neither drops anything when it serves


def test_dropout_is_the_same_after_a_resume_and_however_the_batch_is_cut(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    spec = LoraSpec(r=4, target_modules=("q_proj", "down_proj", "lm_head"), lora_dropout=0.5)
    engine = Engine.load(folders["tied"], dtype="float32")
    engine.create_adapter("whole", spec, seed=3)
    piece = slice_of(ROWS)
    for step in range(4):
        if step == 2:
            engine.save("whole", tmp_path / "half", with_optimizer=True)
            engine.restore("resumed", tmp_path / "half")
            engine.restore("cut", tmp_path / "half")
        engine.forward_backward([slice_of(ROWS, "whole")])
        engine.optim_step("whole", LR)
        if step >= 2:
            engine.forward_backward([slice_of(ROWS, "resumed")])
            engine.optim_step("resumed", LR)
            for row in reversed(piece.rows):
                engine.forward_backward([TrainSlice("cut", (row,), piece.objective)])
            engine.optim_step("cut", LR)
    masters = {key: engine._held[key].adapter.master for key in ("whole", "resumed", "cut")}
    assert torch.equal(masters["whole"], masters["resumed"])
    torch.testing.assert_close(masters["cut"], masters["whole"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-4), ("bfloat16", 0.15)])
def test_every_kind_in_one_batch_is_each_alone(folders: Mapping[str, Path], dtype: str, bound: float) -> None:
    engine = Engine.load(folders["untied-biases"], dtype=dtype)
    for i, (kind, spec) in enumerate(SPECS.items()):
        engine.create_adapter(kind, spec, seed=i)
        for _ in range(3):
            engine.forward_backward([slice_of(ROWS, kind)])
            engine.optim_step(kind, 0.02)
    params = SamplingParams(max_tokens=8, temperature=0, top_logprobs=0)
    keys = [*SPECS, "", "dora", "plain", ""]
    prompts = [list(range(10 * i, 10 * i + 5 + 2 * i)) for i in range(len(keys))]
    mixed = [engine.open_sequence(key, prompt, params) for key, prompt in zip(keys, prompts, strict=True)]
    logprobs: dict[int, list[float]] = {id(state): [] for state in mixed}
    while any(state.finished is None for state in mixed):
        for out in engine.step(mixed, prefill_tokens=400):
            logprobs[id(out.state)].append(out.sampled.logprob)
    for key, prompt, state in zip(keys, prompts, mixed, strict=True):
        scored = engine.logprobs(key, [*prompt, *state.tokens])[len(prompt) - 1 :]
        assert scored == pytest.approx(logprobs[id(state)], abs=bound), key
        with torch.no_grad():
            row = [*prompt, *state.tokens[:-1]]
            logits = our_logits(engine, [row], key)[0][len(prompt) - 1 :].float()
        # The likeliest, or as likely as it but for rounding.
        chosen = logits.gather(-1, torch.tensor(state.tokens)[:, None])[:, 0]
        assert float((logits.amax(-1) - chosen).max()) <= 2 * bound, key


@pytest.mark.parametrize("kind", SPECS)
def test_bfloat16_is_close_to_float32(folders: Mapping[str, Path], kind: str) -> None:
    losses: dict[str, list[float]] = {}
    logprobs: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        engine = Engine.load(folders["untied-biases"], dtype=dtype)
        engine.create_adapter("a", SPECS[kind], seed=1)
        losses[dtype] = []
        for _ in range(4):
            losses[dtype].append(engine.forward_backward([slice_of(ROWS)])[0].loss_sum)
            engine.optim_step("a", LR)
        logprobs[dtype] = engine.logprobs("a", ROWS[0])
    assert losses["float32"][-1] < losses["float32"][0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    gaps = [abs(a - b) for a, b in zip(logprobs["float32"], logprobs["bfloat16"], strict=True)]
    assert sum(gaps) / len(gaps) < 0.1
