"""What an attempt's numbers depend on beside its data and configuration, and how two adapters differ."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lathe import __version__
from lathe.common.errors import InvalidArgument
from lathe.engine.model import WEIGHTS_FILES, Environment, SlicePlan, WeightComparison

_PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
# Environment variables by which these libraries choose other kernels.
_KERNEL_VARIABLES = ("ATEN_", "CUBLAS_", "DNNL_", "KMP_", "MKL_", "NVIDIA_TF32", "OMP_", "ONEDNN_")


def environment(plan: SlicePlan, *, workers: int = 1, sharded: bool = False) -> Environment:
    """What this process computes with. Two attempts with equal ones, alone on their engines, give the same bits.

    workers: ranks that share a batch, whose gradients' sum has another order. sharded: their base's matrices are not in
    a layout that only whole ones have.
    """
    spread = {"workers": str(workers), "base": "sharded" if sharded else "whole"} if workers > 1 else {}
    return Environment(versions=_versions(), flags=_flags(plan) | spread)


def _versions() -> dict[str, str]:
    found = {"lathe": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _flags(plan: SlicePlan) -> dict[str, str]:
    flags = {
        "num_threads": str(plan.threads),
        "dtype": plan.dtype,
        "device": plan.device,
        "train_tokens_per_slice": str(plan.train_tokens_per_slice),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_build": str(torch.version.git_version),
        "mkl": str(torch.backends.mkl.is_available()),  # type: ignore[no-untyped-call]
        "mkldnn": str(torch.backends.mkldnn.enabled),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
    }
    if plan.device == "cuda":
        flags |= {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
            "gpu": torch.cuda.get_device_name(),
            "gpu_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        }
    chosen = {name: value for name, value in os.environ.items() if name.startswith(_KERNEL_VARIABLES)}
    return flags | dict(sorted(chosen.items()))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


@dataclass(frozen=True, slots=True)
class Difference:
    """largest: the largest absolute difference of two elements; infinite where one is no number and the other is.
    same_bits: not even the sign of a zero differs."""

    largest: float
    same_bits: bool


def differences(first: Path, second: Path) -> dict[str, Difference]:
    """How two safetensors files differ, tensor by tensor.

    Raises InvalidArgument where they cannot be compared: a file cannot be read, or a tensor is in one of them only, or
    has another shape or dtype there.
    """
    try:
        with safe_open(first, framework="pt") as ours, safe_open(second, framework="pt") as theirs:
            names = _same(set(ours.keys()), set(theirs.keys()))
            return {name: _difference(name, ours.get_tensor(name), theirs.get_tensor(name)) for name in names}
    except (SafetensorError, OSError) as error:
        raise InvalidArgument(f"the weights cannot be read for a comparison: {error}") from error


def compare(first: Path, second: Path) -> WeightComparison:
    """Two folders of tuned models. What cannot be compared is said, not raised: a comparison fails no attempt."""
    try:
        found = differences(_weights(first), _weights(second))
    except InvalidArgument as error:
        return WeightComparison(bit_identical=False, not_compared_reason=error.message)
    if all(item.same_bits for item in found.values()):
        return WeightComparison(bit_identical=True)
    tensor = max(found, key=lambda name: found[name].largest)
    return WeightComparison(bit_identical=False, largest_difference=found[tensor].largest, tensor=tensor)


def _weights(folder: Path) -> Path:
    return next(
        (folder / name for name in WEIGHTS_FILES if (folder / name).exists()), folder / WEIGHTS_FILES[0]
    )


def _same(ours: Iterable[str], theirs: Iterable[str]) -> list[str]:
    only = sorted(set(ours) ^ set(theirs))
    if only:
        raise InvalidArgument(f"only one of the two adapters has the tensor {only[0]}.")
    return sorted(ours)


def _difference(name: str, first: torch.Tensor, second: torch.Tensor) -> Difference:
    if first.shape != second.shape or first.dtype != second.dtype:
        raise InvalidArgument(
            f"the tensor {name} is {tuple(first.shape)} of {first.dtype} in one adapter and {tuple(second.shape)} of "
            f"{second.dtype} in the other."
        )
    if torch.equal(_bits(first), _bits(second)):
        return Difference(0.0, same_bits=True)
    apart = (first.double() - second.double()).abs()
    # Where both are no number, or the same infinity, there is nothing between them.
    apart[(first == second) | (first.isnan() & second.isnan())] = 0.0
    return Difference(float(apart.nan_to_num(nan=float("inf")).max()), same_bits=False)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
