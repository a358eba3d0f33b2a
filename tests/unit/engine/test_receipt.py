"""How two adapters are compared, and what a receipt says of the machine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lathe.engine.model import SlicePlan
from lathe.engine.receipt import compare, differences, environment


def adapter(folder: Path, **tensors: list[float]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {name: torch.tensor(values, dtype=torch.float32) for name, values in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_the_same_bits_are_identical(tmp_path: Path) -> None:
    first = adapter(tmp_path / "1", a=[1.0, math.nan, -0.0], b=[2.0])
    second = adapter(tmp_path / "2", b=[2.0], a=[1.0, math.nan, -0.0])
    found = compare(first, second)
    assert (found.bit_identical, found.largest_difference, found.not_compared_reason) == (True, 0.0, "")


def test_the_tensor_with_the_largest_difference_is_named(tmp_path: Path) -> None:
    first = adapter(tmp_path / "1", a=[1.0, 2.0], b=[1.0], c=[0.0])
    second = adapter(tmp_path / "2", a=[1.0, 2.25], b=[-1.0], c=[-0.0])
    found = compare(first, second)
    assert (found.bit_identical, found.tensor, found.largest_difference) == (False, "b", 2.0)
    parts = differences(first / "adapter_model.safetensors", second / "adapter_model.safetensors")
    assert [(parts[name].largest, parts[name].same_bits) for name in "abc"] == [
        (0.25, False),
        (2.0, False),
        (0.0, False),
    ]


@given(pair=st.tuples(*[st.floats(width=32, allow_nan=True, allow_infinity=True)] * 2))
def test_any_two_numbers_have_a_difference(
    tmp_path_factory: pytest.TempPathFactory, pair: tuple[float, float]
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    a, b = pair
    found = compare(adapter(folder / "1", x=[a]), adapter(folder / "2", x=[b]))
    if a == b or (math.isnan(a) and math.isnan(b)):
        assert found.largest_difference == 0.0
    else:
        assert not found.bit_identical and found.largest_difference > 0


@pytest.mark.parametrize(
    ("other", "reason"),
    [({"a": [1.0]}, "tensor b"), ({"a": [1.0], "b": [1.0, 2.0]}, "tensor b is"), (None, "cannot be read")],
)
def test_what_cannot_be_compared_is_said(
    tmp_path: Path, other: dict[str, list[float]] | None, reason: str
) -> None:
    first = adapter(tmp_path / "1", a=[1.0], b=[1.0])
    second = tmp_path / "2"
    if other is None:
        second.mkdir()
        (second / "adapter_model.safetensors").write_bytes(b"torn")
    else:
        adapter(second, **other)
    found = compare(first, second)
    assert not found.bit_identical and reason in found.not_compared_reason


def test_the_environment_names_what_decides_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = environment(SlicePlan(320, 2, "bfloat16", "cpu"))
    assert found.versions["torch"] == torch.__version__
    assert {"lathe", "python", "safetensors"} <= found.versions.keys()
    assert found.flags["num_threads"] == "2" and found.flags["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert found.flags["cpu_capability"] and found.flags["torch_build"]
