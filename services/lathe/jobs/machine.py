"""What this machine can do, where engines are its own processes."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# On x86 and on ARM.
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def has_bfloat16(cpuinfo: Path = _CPUINFO) -> bool | None:
    """Whether its CPUs have instructions for bfloat16; None where that cannot be told."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not _BFLOAT16.isdisjoint(words.split())
    return None
