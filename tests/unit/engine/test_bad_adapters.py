"""Adapter files that must not be taken: each refused with words, and the engine goes on with what it has."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lathe.common.errors import InvalidArgument
from lathe.engine.adapters import check_own
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams

MakeEngine = Callable[..., Engine]
WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
GREEDY = SamplingParams(max_tokens=4, temperature=0)


@pytest.fixture
def good(make_engine: MakeEngine, tmp_path: Path) -> Path:
    engine = make_engine()
    engine.create_adapter("a", LoraSpec(r=4, use_dora=True, target_modules=("q_proj", "lm_head")), seed=1)
    engine.save("a", tmp_path / "adapter", with_optimizer=False)
    return tmp_path / "adapter"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Spoils the weights."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return spoil


def config(**changes: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def pickle_by_another_name(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (as_pickle, "never pickle"),
    "disguised pickle": (pickle_by_another_name, "adapter_model.safetensors cannot be read"),
    "torn": (cut, "adapter_model.safetensors cannot be read"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cannot be read"),
    "NaN": (tensors(lambda t: t[f"{Q}.lora_A.weight"][1].fill_(float("nan"))), "q_proj.*NaN"),
    "infinity": (tensors(lambda t: t[f"{Q}.lora_B.weight"][0].fill_(float("inf"))), "q_proj.*infinity"),
    "beyond fp32": (
        tensors(lambda t: t.update({f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"].double() + 1e300})),
        "infinity",
    ),
    "shape": (tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 3)})), r"\(4, 3\)"),
    "whole numbers": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].int()})),
        "floating point",
    ),
    "missing": (tensors(lambda t: t.pop(f"{Q}.lora_magnitude_vector")), "magnitude_vector is missing"),
    "unknown": (tensors(lambda t: t.update({"x.lora_A.weight": torch.zeros(1)})), "x.lora_A.weight is not"),
    "other head": (
        tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(96, 32)})),
        "lm_head.base_layer.weight is not the base model's own",
    ),
    "module": (config(target_modules=["q_proj", "wat_proj"]), "wat_proj"),
    "rank": (config(r=1000), r"the base model needs \(1000,"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "no object": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "must hold a JSON object",
    ),
    "option": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "new option": (config(kasa_config={"beta": 1}), "kasa_config"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_it_is_refused_and_the_others_go_on(make_engine: MakeEngine, good: Path, how: str) -> None:
    spoil, words = SPOILED[how]
    engine = make_engine()
    engine.load_adapter("good", good)
    before = engine.memory()
    expected = sampled(engine)
    spoil(good)
    with pytest.raises(InvalidArgument, match=words):
        engine.load_adapter("bad", good)
    assert engine.adapter_keys() == ("good",)
    assert engine.memory().adapter_bytes == before.adapter_bytes
    assert sampled(engine) == expected


def sampled(engine: Engine) -> list[int]:
    state = engine.open_sequence("good", [1, 2, 3], GREEDY)
    while state.finished is None:
        engine.step([state])
    engine.close_sequence(state)
    return state.tokens


def test_the_bases_own_tensors_beside_the_lora_are_taken(make_engine: MakeEngine, good: Path) -> None:
    engine = make_engine()
    head = engine.decoder.weights.head.dense()
    tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": head.clone()}))(good)
    engine.load_adapter("a", good)
    assert engine.adapter_keys() == ("a",)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_the_bases_own_tensors_may_be_kept_in_either_precision(wide: torch.dtype) -> None:
    own = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(wide)
    for tensor, base in ((own.bfloat16(), own), (own, own.bfloat16()), (own, own)):
        check_own("lm_head", tensor, base)
    for other in (own + 0.1, own[:3]):
        with pytest.raises(InvalidArgument, match="lm_head is not the base model's own"):
            check_own("lm_head", other.bfloat16(), own)
