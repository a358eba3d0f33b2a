"""The preference methods against TRL's own trainers, in fp32 on a tiny Llama with PEFT: loss, figures, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lathe.engine.batch import RowObjective, SliceResult, TrainRow, TrainSlice, total
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import Dpo, Kto, Orpo
from lathe.engine.recipes.dpo import DpoObjective
from lathe.engine.recipes.kto import KtoObjective
from lathe.engine.recipes.orpo import OrpoObjective
from lathe.text.formats import Role
from tests.fixtures.tiny_llama import build_tiny_llama
from tests.fixtures.turns import scores

SPEC = LoraSpec(
    r=4,
    lora_alpha=6,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
# A prompt and two answers, of different lengths.
PAIRS = [
    ([5, 6, 7, 8], [40, 41, 42, 43, 44], [50, 51]),
    ([9, 10], [60, 61], [70, 71, 72, 73, 74, 75]),
    ([11, 12, 13], [80], [90, 91, 92]),
]
Params = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(folder: Path) -> Engine:
    """With an adapter "a" that has already learned something, so that it differs from its reference, the base."""
    engine = Engine.load(folder, dtype="float32")
    engine.create_adapter("a", SPEC, seed=7)
    set_lora(engine, seed=3, std=0.05)
    return engine


def set_lora(engine: Engine, seed: int, std: float) -> None:
    adapter = engine._held["a"].adapter
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in adapter.named_tensors():
            if "lora_B" in name:
                tensor.normal_(generator=generator).mul_(std)
    adapter.publish()


def trainer(name: str, folder: Path, engine: Engine, tmp_path: Path, **settings: object) -> Any:
    """TRL's trainer with a PEFT model whose adapter has the engine's weights, and whose reference is the base."""
    import datasets
    import trl
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental import orpo

    datasets.disable_caching()
    datasets.disable_progress_bars()
    config, kind, rows = {
        "dpo": (trl.DPOConfig, trl.DPOTrainer, [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        "orpo": (orpo.ORPOConfig, orpo.ORPOTrainer, [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        "kto": (trl.KTOConfig, trl.KTOTrainer, [{"prompt": "a", "completion": "b", "label": True}] * 2),
    }[name]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=6, target_modules=list(SPEC.target_modules), task_type="CAUSAL_LM"),
    )
    args = config(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, **settings,
    )  # fmt: skip
    made = kind(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    theirs = parameters(made.model)
    with torch.no_grad():
        for parameter, tensor in engine._held["a"].adapter.named_tensors():
            theirs[parameter].copy_(tensor)
    return made


def parameters(model: Any) -> Params:
    named = model.named_parameters()
    return {name.replace(".default", ""): value for name, value in named if ".default" in name}


def row(prompt: Sequence[int], answer: Sequence[int], role: Role) -> TrainRow:
    return TrainRow([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), role)


def pair_rows(pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> list[TrainRow]:
    return [
        row(prompt, answer, role)
        for prompt, *answers in pairs
        for answer, role in zip(answers, (Role.CHOSEN, Role.REJECTED), strict=True)
    ]


def pair_examples(pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> list[dict[str, list[int]]]:
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]


def run(engine: Engine, slices: Sequence[tuple[Sequence[TrainRow], RowObjective]]) -> SliceResult:
    return total([engine.forward_backward([TrainSlice("a", tuple(r), o)])[0] for r, o in slices])


def reference(engine: Engine, rows: Sequence[TrainRow]) -> list[float]:
    return scores(engine, "", rows)


def assert_same_gradients(engine: Engine, model: Any) -> None:
    adapter, theirs = engine._held["a"].adapter, parameters(model)
    masters, adapter.master = adapter.master, adapter.gradients
    try:
        for name, gradient in adapter.named_tensors():
            torch.testing.assert_close(
                gradient, theirs[name].grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
    finally:
        adapter.master = masters


def assert_same_figures(ours: Mapping[str, float], theirs: Mapping[str, Any], names: Sequence[str]) -> None:
    assert {name: ours[name] for name in names} == pytest.approx(
        {name: float(theirs[name][-1]) for name in names}, rel=1e-3, abs=1e-4
    )


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo(folder: Path, engine: Engine, tmp_path: Path, loss_type: str) -> None:
    theirs = trainer("dpo", folder, engine, tmp_path, beta=0.3, loss_type=[loss_type])
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(pair_examples(PAIRS)))
    loss.backward()
    rows, method = pair_rows(PAIRS), Dpo(0.3, loss_type)
    base = reference(engine, rows)
    parts = [(rows[part], DpoObjective(method, base[part], len(PAIRS))) for part in (slice(2), slice(2, 6))]
    result = run(engine, parts)
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert_same_figures(result.figures, theirs._metrics["train"], REWARDS + LOGPS)
    assert_same_gradients(engine, theirs.model)


def test_smoothed_labels(folder: Path, engine: Engine, tmp_path: Path) -> None:
    # TRL's sigmoid loss knows no smoothing; its "aot" is the same with it, after a sort that one pair does not see.
    theirs = trainer("dpo", folder, engine, tmp_path, beta=0.3, loss_type=["aot"], label_smoothing=0.2)
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(pair_examples(PAIRS[:1])))
    loss.backward()
    rows = pair_rows(PAIRS[:1])
    result = run(engine, [(rows, DpoObjective(Dpo(0.3, label_smoothing=0.2), reference(engine, rows), 1))])
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert_same_gradients(engine, theirs.model)


def test_orpo(folder: Path, engine: Engine, tmp_path: Path) -> None:
    theirs = trainer("orpo", folder, engine, tmp_path, beta=0.3)
    # TRL learns the chosen row's prompt too, we do not: prompts of one token leave nothing of them to learn.
    pairs = [(prompt[:1], chosen, rejected) for prompt, chosen, rejected in PAIRS]
    batch = theirs.data_collator(
        [
            {
                f"{side}_{part}": value
                for side, answer in (("chosen", chosen), ("rejected", rejected))
                for part, value in (
                    ("input_ids", [*prompt, *answer]),
                    ("attention_mask", [1] * (1 + len(answer))),
                    ("labels", [-100, *answer]),
                )
            }
            for prompt, chosen, rejected in pairs
        ]
    )
    loss, figures = theirs.get_batch_loss_metrics(theirs.model, batch)
    loss.backward()
    rows = pair_rows(pairs)
    tokens = sum(len(chosen) for _, chosen, _ in pairs)
    objective = OrpoObjective(Orpo(0.3), len(pairs), tokens)
    result = run(engine, [(rows[:4], objective), (rows[4:], objective)])
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    names = (*REWARDS, *LOGPS, "nll_loss", "log_odds_ratio", "log_odds_chosen")
    assert_same_figures(result.figures, {name: [value] for name, value in figures.items()}, names)
    assert_same_gradients(engine, theirs.model)


@pytest.mark.parametrize("sign", [1, -1])
def test_kto(folder: Path, engine: Engine, tmp_path: Path, sign: int) -> None:
    set_lora(engine, seed=3, std=sign * 0.05)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    theirs = trainer("kto", folder, engine, tmp_path, beta=0.3, **weights)
    examples = [(prompt, answer) for prompt, chosen, rejected in PAIRS for answer in (chosen, rejected)]
    labels = [True, False, False, False, True, True]
    mismatched = [(prompt, examples[i - 1][1]) for i, (prompt, _) in enumerate(examples)]
    batch = theirs.data_collator(
        [
            {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": label}
            for (prompt, answer), (_, other), label in zip(examples, mismatched, labels, strict=True)
        ]
    )
    loss = theirs.compute_loss(theirs.model, batch)
    loss.backward()
    rows = [
        row(*example, Role.DESIRABLE if label else Role.UNDESIRABLE)
        for example, label in zip(examples, labels, strict=True)
    ]
    strange = [row(*example, Role.EXAMPLE) for example in mismatched]
    base = reference(engine, rows)
    drift = [
        now - before
        for now, before in zip(scores(engine, "a", strange), reference(engine, strange), strict=True)
    ]
    kl = max(0.0, sum(drift) / len(drift))
    assert (kl > 0) is (sign < 0)
    result = run(
        engine,
        [
            (rows[part], KtoObjective(Kto(0.3, **weights), labels[part], base[part], kl, good=3, bad=3))
            for part in (slice(0, 1), slice(1, 4), slice(4, 6))
        ],
    )
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert_same_figures(result.figures, theirs._metrics["train"], ("kl", *REWARDS[:3], *LOGPS))
    assert_same_gradients(engine, theirs.model)
