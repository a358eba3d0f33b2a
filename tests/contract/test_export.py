"""Each export, loaded by the tool that it is for: transformers, PEFT, llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lathe.cli.main import app
from lathe.common.errors import FailedPrecondition, InvalidArgument, LatheError, ResourceExhausted
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.export.export import (
    Exported,
    MergedType,
    export_gguf,
    export_peft,
    export_safetensors,
)
from lathe.engine.export.gguf_file import GgufType
from lathe.engine.export.llamacpp import LlamaCpp, post
from lathe.engine.export.reference import Reference
from lathe.engine.export.source import Lineage, Source
from lathe.engine.export.texts import default_probes
from lathe.engine.export.verify import MEAN_KL, check_gguf
from lathe.engine.full import FullSpec
from tests.fixtures.tiny_families import build_tiny
from tests.fixtures.tiny_llama import build_tiny_llama

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": LINEARS},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "use_dora": True},
    "embeddings": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
    "head-dora": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
}
LINEAGE = Lineage("ft:tiny:default::1", "tiny", "apache-2.0", {"seed": "7"})
ROW = list(range(3, 40))
# Every architecture of llama.cpp's, with what its metadata has to say; windows as long as the checks need.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": False},
    "llama-llama3": {},
    "llama-biases": {},
    "qwen2": {},
    "qwen2-yarn": {},
    "qwen3": {},
    "mistral": {"sliding_window": 120},
    "gemma3": {
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
    },
    "phi": {},
    "phi3": {"sliding_window": 120},
    "phi3-longrope": {},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base, base.parent / "plain", ADAPTERS["plain"])


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(base: Path, folder: Path, options: dict[str, Any]) -> Path:
    """By PEFT itself, far from where training begins."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(base), LoraConfig(**options, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(value.shape, generator=generator)
                value.copy_(value + 0.3 * drawn.abs() if "magnitude" in name else 0.1 * drawn)
    model.save_pretrained(folder)
    return folder


def with_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), adapter)


def logits(model: Any, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_is_base_and_adapter_in_transformers(base: Path, tmp_path: Path, name: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", ADAPTERS[name])
    done = export_safetensors(Source(base, adapter, LINEAGE), tmp_path / "out", MergedType.F32)
    expected = logits(with_peft(base, adapter), ROW)
    torch.testing.assert_close(logits(load(done.folder), ROW), expected, atol=2e-4, rtol=0)
    assert (expected - logits(load(base), ROW)).abs().max() > 0.1
    assert "largest logit difference" in next(iter(done.measured))


@pytest.mark.parametrize("magnitude", [0.0, 5.0])
def test_a_row_of_zeros_stays_one_with_dora(base: Path, tmp_path: Path, magnitude: float) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", ADAPTERS["dora"])
    sparse, name = Path(shutil.copytree(base, tmp_path / "sparse")), "model.layers.0.self_attn.q_proj"

    def change(path: Path, values: dict[str, float]) -> None:
        tensors = load_file(path)
        for key, value in values.items():
            tensors[key][3] = value
        save_file(tensors, path, metadata={"format": "pt"})

    change(sparse / "model.safetensors", {f"{name}.weight": 0.0})
    lora = f"base_model.model.{name}.lora_"
    change(
        adapter / "adapter_model.safetensors",
        {f"{lora}B.weight": 0.0, f"{lora}magnitude_vector": magnitude},
    )
    done = export_safetensors(Source(sparse, adapter, LINEAGE), tmp_path / "out", MergedType.F32)
    assert not load_file(done.folder / "model.safetensors")[f"{name}.weight"][3].any()


def test_merged_in_shards_of_bf16(base: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    done = export_safetensors(Source(base, adapter, LINEAGE), tmp_path / "out", shard_bytes=60_000)
    assert "model.safetensors.index.json" in done.files
    assert sum(name.endswith(".safetensors") for name in done.files) > 2
    model = load(done.folder)
    expected = logits(with_peft(base, adapter), ROW)
    assert (logits(model, ROW) - expected).abs().max() < 0.5 * expected.std()
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(done.folder).apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )


def test_peft_loads_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = export_peft(Source(base, adapter, LINEAGE), tmp_path / "out")
    assert torch.equal(logits(with_peft(base, done.folder), ROW), logits(with_peft(base, adapter), ROW))
    card = (done.folder / "README.md").read_text()
    assert "base_model: tiny" in card and "| seed | 7 |" in card


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_answers_as_transformers_does(tmp_path: Path, name: str) -> None:
    base = build_tiny(tmp_path / "base", name, **FAMILIES[name])
    source = Source(base, None, LINEAGE)
    tokenizer = source.tokenizer()
    probe = default_probes(tokenizer)[0]
    done = export_gguf(source, tmp_path / "out", probes=[probe], threads=1)
    assert done.warnings == ()
    ids = tokenizer.encode(probe.prompt)
    with LlamaCpp(gguf_of(done), context=100, threads=1) as model:
        assert model.tokens(probe.prompt) == ids
        answer = model.greedy(ids, 32)
    theirs = logits(load(base), [*ids, *answer])[len(ids) - 1 : -1]
    for row, token in zip(theirs, answer, strict=True):
        assert row.max() - row[token] < 0.05


@pytest.mark.parametrize("name", ["plain", "head-dora"])
def test_q8_0_of_a_tuned_model_is_near_its_f16(base: Path, tmp_path: Path, name: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", ADAPTERS[name])
    done = export_gguf(Source(base, adapter, LINEAGE), tmp_path / "out", GgufType.Q8_0, threads=1)
    assert float(done.measured["mean KL of q8_0 to f16"].split()[0]) <= MEAN_KL
    assert [name for name in done.files if name.endswith(".gguf")] == ["ft-tiny-default--1-q8_0.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in (done.folder / "Modelfile").read_text()


def test_llama_cpp_is_asked_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    source = Source(build_tiny(tmp_path / "base", "llama"), None, LINEAGE)
    probe = default_probes(source.tokenizer())[0]
    assert export_gguf(source, tmp_path / "out", probes=[probe], threads=1).warnings == ()


def test_a_llama_cpp_that_does_not_answer_is_said_so() -> None:
    with pytest.raises(FailedPrecondition, match=r"llama\.cpp does not answer /completion: .*refused"):
        post("http://127.0.0.1:9", "/completion", {})


def gguf_of(done: Exported) -> Path:
    return next(done.folder / name for name in done.files if name.endswith(".gguf"))


def test_a_file_of_another_model_does_not_pass(base: Path, tmp_path: Path) -> None:
    other = build_tiny_llama(tmp_path / "other", seed=1)
    files = [
        gguf_of(export_gguf(Source(folder, None, LINEAGE), tmp_path / out, kind, verify=False))
        for folder, out, kind in ((base, "a", GgufType.F16), (other, "b", GgufType.F16), (other, "c", GgufType.Q8_0))
    ]  # fmt: skip
    tokenizer = Source(base, None, LINEAGE).tokenizer()

    def check(f16: Path, q8_0: Path | None) -> None:
        check_gguf(
            f16, Reference(base), tokenizer, default_probes(tokenizer), q8_0=q8_0, context=512, threads=1
        )

    check(files[0], None)
    with pytest.raises(
        FailedPrecondition, match="does not answer as the model does: at greedy token"
    ) as raised:
        check(files[1], None)
    assert raised.value.reason == "EXPORT_DIFFERS"
    with pytest.raises(FailedPrecondition, match="too far from f16"):
        check(files[0], files[2])


def test_an_unchecked_file_says_so(base: Path, tmp_path: Path) -> None:
    done = export_gguf(Source(base, None, LINEAGE), tmp_path / "out", verify=False)
    assert done.warnings == ("not verified: it was asked for without a check",)
    assert "not verified" in (done.folder / "README.md").read_text()


def bad_nan(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")


def bad_base(base: Path, adapter: Path) -> None:
    build_tiny_llama(base, hidden_size=32, intermediate_size=64)


def bad_tokenizer(base: Path, adapter: Path) -> None:
    (base / "tokenizer.json").unlink()


def bad_base_nan(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, base / "model.safetensors")


def bad_pickle(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def bad_family(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["FalconForCausalLM"]}))


def bad_pre_tokenizer(base: Path, adapter: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (base / "tokenizer.json").write_text(json.dumps(content))


def bad_out(base: Path, adapter: Path) -> None:
    (base.parent / "out").mkdir()
    (base.parent / "out" / "theirs").touch()


GGUF = (export_gguf,)
BAD: dict[str, tuple[Callable[[Path, Path], None], str, tuple[Callable[..., Exported], ...]]] = {
    "nan": (bad_nan, "NaN or infinity", (export_peft, export_safetensors, export_gguf)),
    "base": (bad_base, "cannot be put on this base model", (export_peft, export_safetensors, export_gguf)),
    "tokenizer": (bad_tokenizer, "has no tokenizer.json", (export_safetensors, export_gguf)),
    "base-nan": (bad_base_nan, "model.norm.weight holds NaN or infinity", GGUF),
    "pickle": (bad_pickle, "never pickle", (export_peft, export_gguf)),
    "family": (bad_family, "FalconForCausalLM; supported are", GGUF),
    "pre-tokenizer": (bad_pre_tokenizer, "llama.cpp has no name for", GGUF),
    "out": (bad_out, "exists and is not empty", (export_peft, export_safetensors, export_gguf)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_left(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    spoil, words, exports = BAD[name]
    mine = Source(
        shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter"), LINEAGE
    )
    spoil(tmp_path / "base", tmp_path / "adapter")
    before = sorted(path.name for path in tmp_path.iterdir())
    for export in exports:
        with pytest.raises(LatheError, match=words):
            export(mine, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_base_model_has_no_adapter_to_export(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no adapter; export it as safetensors or gguf"):
        export_peft(Source(base, None, LINEAGE), tmp_path / "out")


def test_a_model_of_which_every_weight_was_tuned(base: Path, tmp_path: Path) -> None:
    (tuned := tmp_path / "tuned").mkdir()
    engine = Engine.load(base, dtype="float32")
    engine.create_adapter("a", FullSpec(), seed=0)
    rows = (TrainRow(ROW, [True] * len(ROW)),)
    engine.forward_backward([TrainSlice("a", rows, CrossEntropy(len(ROW) - 1))])
    engine.optim_step("a", 0.01)
    engine.save("a", tuned, with_optimizer=False)
    source = Source(base, tuned, LINEAGE)
    done = export_safetensors(source, tmp_path / "out", MergedType.F32)
    torch.testing.assert_close(logits(load(done.folder), ROW), logits(load(tuned), ROW), atol=1e-5, rtol=0)
    assert (logits(load(base), ROW) - logits(load(tuned), ROW)).abs().max() > 0.1
    probes = default_probes(source.tokenizer())[:1]
    assert export_gguf(source, tmp_path / "gguf", probes=probes, threads=1).measured
    with pytest.raises(InvalidArgument, match="Every weight of this model was tuned"):
        export_peft(source, tmp_path / "peft")
    other = build_tiny_llama(tmp_path / "other", hidden_size=32, intermediate_size=64)
    with pytest.raises(InvalidArgument, match="another architecture"):
        export_safetensors(Source(other, tuned, LINEAGE), tmp_path / "wrong")


def test_a_full_disk_is_said_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ResourceExhausted, match="GB free"):
        export_safetensors(Source(base, None, LINEAGE), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["models", "export", *map(str, arguments)])


def test_the_command_exports_local_folders(base: Path, adapter: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    )
    folders = ("--base-folder", base, "--adapter-folder", adapter)
    done = command(*folders, "--format", "gguf", "--out", tmp_path / "out", "--texts", texts, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["folder"] == str(tmp_path / "out")
    assert said["measured"]["greedy tokens equal to ours"].endswith("of 1 answers")
    assert command(*folders, "--format", "peft", "--out", tmp_path / "peft").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "peft", "texts.jsonl"]


def test_the_command_refuses_what_makes_no_sense(base: Path, tmp_path: Path) -> None:
    wrong = command("--base-folder", base, "--format", "gguf", "--type", "bf16", "--out", tmp_path / "out")
    assert wrong.exit_code == 2 and "choose from f16, q8_0" in wrong.output
    unnamed = command("--out", tmp_path / "out")
    assert isinstance(unnamed.exception, InvalidArgument)
    (tmp_path / "texts").write_text('Plain text.\n{"messages": []}\n')
    bad = command("--base-folder", base, "--out", tmp_path / "out", "--texts", tmp_path / "texts")
    assert "texts, line 2: messages" in str(bad.exception)
    assert not (tmp_path / "out").exists()


def test_with_both_folders_no_platform_is_asked(base: Path, adapter: Path, tmp_path: Path) -> None:
    folders = ("--base-folder", base, "--adapter-folder", adapter)
    done = command("ft:tiny:acme::1", *folders, "--format", "peft", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "ft:tiny:acme::1" in (tmp_path / "out" / "README.md").read_text()
