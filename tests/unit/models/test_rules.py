"""What a base model's folder and an adapter may be."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import InvalidArgument
from lathe.models import model as rules
from lathe.models import tensors
from lathe.models.model import ModelFile
from tests.fixtures.models import CONFIG, SHAPES, safetensors, tiny_folder

SHA = "0" * 64


def header_of(content: bytes) -> dict[str, tensors.Tensor]:
    length = tensors.header_length("model.safetensors", content[:8], len(content))
    return tensors.parse_header("model.safetensors", content[8 : 8 + length], len(content))


@pytest.mark.parametrize(
    "path",
    [
        *("pytorch_model.bin", "x.pt", "x.pth", "x.pkl", "x.ckpt", "weights.BIN", "modeling_x.py", "a.so"),
        *("../config.json", "/config.json", "a/../b.json", ".hidden.json", "a//b.json", "model.gguf", ""),
    ],
)
def test_what_could_run_code_or_leave_the_folder_is_refused_by_name(path):
    with pytest.raises(InvalidArgument) as error:
        rules.check_files([*tiny_folder().files(), ModelFile(path, 100, SHA)])
    assert error.value.violations[0].field == "base_model.files[5].path"


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_lacks_nothing_that_is_needed(missing):
    with pytest.raises(InvalidArgument, match=missing.removeprefix("model")):
        rules.check_files(tiny_folder().without(missing).files())


@pytest.mark.parametrize("base_model_id", ["", "A", "x" * 64, "a/b", "a:b", ".a", "-a"])
def test_ids_of_base_models(base_model_id):
    with pytest.raises(InvalidArgument):
        rules.check_base_model_id(base_model_id)


def test_the_digest_is_over_what_matters_in_any_order():
    files = tiny_folder().files()
    digest = rules.folder_digest(files)
    assert rules.folder_digest(reversed(files)) == digest
    assert rules.folder_digest(file for file in files if file.path != "README.md") == digest
    for file in files:
        if file.path != "README.md":
            changed = [replace(other, sha256=SHA) if other == file else other for other in files]
            assert rules.folder_digest(changed) != digest


def test_tuned_ids():
    assert rules.parse_tuned_id("ft:smollm2-135m:default:tickets:AbC123") == rules.TunedId(
        "smollm2-135m", "default", "tickets", "AbC123", None
    )
    assert rules.parse_tuned_id("ft:b:p::x:ckpt-step-12") == rules.TunedId("b", "p", "", "x", 12)
    for other in ("b", "ft:b:p:x", "ft:b:p:s:x:ckpt-step-", "ft:b:p:s:x:ckpt-step-1:y", "ft:b/c:p:s:x"):
        assert rules.parse_tuned_id(other) is None


def test_a_good_file_gives_its_tensors():
    found = header_of(safetensors(SHAPES))
    assert {name: tensor.shape for name, tensor in found.items()} == dict(SHAPES)


@given(cut=st.integers(min_value=1, max_value=2000), longer=st.booleans())
def test_a_file_cut_short_or_extended_is_refused(cut, longer):
    content = safetensors({"a": (10, 10), "b": (4,)})
    broken = content + b"\0" * cut if longer else content[: max(len(content) - cut, 9)]
    with pytest.raises(InvalidArgument, match=r"model\.safetensors"):
        header_of(broken)


@given(st.binary(min_size=9, max_size=200))
def test_any_bytes_are_refused_in_words(content):
    try:
        header_of(content)
    except InvalidArgument:
        return
    assert json.loads(content[8:].split(b"\0", 1)[0]) is not None


def test_overlapping_tensors_are_refused():
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    with pytest.raises(InvalidArgument, match="overlap"):
        tensors.parse_header("x.safetensors", header, 8 + len(header) + 16)


def test_a_tensor_that_the_architecture_needs_is_missing_or_of_another_shape():
    shapes = dict(SHAPES)
    del shapes["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(InvalidArgument, match=r"no tensor 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        tensors.check_required(CONFIG, header_of(safetensors(shapes)))
    shapes = {**SHAPES, "model.norm.weight": (9,)}
    with pytest.raises(InvalidArgument, match=r"shape \[9\]; by config.json it must be \[8\]"):
        tensors.check_required(CONFIG, header_of(safetensors(shapes)))
    untied = {**CONFIG, "tie_word_embeddings": False}
    with pytest.raises(InvalidArgument, match="lm_head"):
        tensors.check_required(untied, header_of(safetensors(SHAPES)))


def test_shards_and_their_index():
    one = {"a": tensors.Tensor("1.safetensors", "F32", (1,))}
    two = {"b": tensors.Tensor("2.safetensors", "F32", (1,))}
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    assert set(tensors.merge_shards({"1.safetensors": one, "2.safetensors": two}, index)) == {"a", "b"}
    with pytest.raises(InvalidArgument, match="in both"):
        tensors.merge_shards({"1.safetensors": one, "2.safetensors": one}, None)
    with pytest.raises(InvalidArgument, match="where it is not"):
        tensors.merge_shards({"1.safetensors": one}, index)
