"""Rotary position embeddings (Su et al. 2021) and the rescalings that model configs ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """The rotary embedding of a layer.

    kind: "default", "linear", "llama3", "yarn" or "longrope", with the numbers each needs. size: how many features
    of a head are rotated, the first ones; the others are left alone. scale: factor of the rotated features
    (attention_factor in configs). short, long: longrope's divisors of the frequencies, [size / 2] each, for
    sequences within original_context and for longer ones.
    """

    theta: float
    size: int
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    scale: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation tables of a pass: cos and (sign-folded) sin, [T, 1, size], in the compute dtype."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """x [T, heads, head_dim] -> rotated copy (rotate_half convention)."""
        return self._turn(x, 1)

    def rotate_(self, x: Tensor) -> None:
        """The same in place: x may be a view, and its graph is lost."""
        turned = x[..., : self.cos.shape[-1]]
        half = turned.roll(turned.shape[-1] // 2, -1)
        turned.mul_(self.cos).addcmul_(half, self.sin)

    def unrotate(self, x: Tensor) -> Tensor:
        """The transpose: the gradient of `rotate`."""
        return self._turn(x, -1)

    def _turn(self, x: Tensor, sign: int) -> Tensor:
        size = self.cos.shape[-1]
        if size == x.shape[-1]:
            return (x * self.cos).addcmul_(x.roll(size // 2, -1), self.sin, value=sign)
        turned, rest = x[..., :size], x[..., size:]
        return torch.cat(
            ((turned * self.cos).addcmul_(turned.roll(size // 2, -1), self.sin, value=sign), rest), -1
        )


class RopeTables:
    """Makes a pass's tables for one RopeSpec."""

    def __init__(self, spec: RopeSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._spec, self._dtype = spec, dtype
        self._short = frequencies(spec, long=False).to(device)
        self._long = frequencies(spec, long=True).to(device) if spec.long else None

    def at(self, positions: Tensor, lengths: Sequence[int], reach: Sequence[int]) -> Rope:
        """Tables for positions [T] of sequences with `lengths` tokens in this pass.

        reach: tokens of each whole sequence, which decides between longrope's two sets of frequencies. The first
        half of sin is negated so that rotation is x cos + roll(x) sin.
        """
        angles = positions[:, None].float() * self._frequencies(lengths, reach)
        cos, sin = (angles.cos() * self._spec.scale), (angles.sin() * self._spec.scale)
        cos, sin = cos.to(self._dtype), sin.to(self._dtype)
        return Rope(torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])

    def _frequencies(self, lengths: Sequence[int], reach: Sequence[int]) -> Tensor:
        if self._long is None or max(reach) <= self._spec.original_context:
            return self._short[None, :]
        far = torch.tensor([n > self._spec.original_context for n in reach])
        rows = far.repeat_interleave(torch.tensor(list(lengths))).to(self._short.device)
        return torch.where(rows[:, None], self._long, self._short)


def frequencies(rope: RopeSpec, *, long: bool = False) -> Tensor:
    """Inverse frequencies [size / 2]. long: of longrope, those for sequences beyond the original context."""
    exponents = torch.arange(0, rope.size, 2, dtype=torch.float32) / rope.size
    match rope.kind:
        case "linear":
            return 1.0 / rope.theta**exponents / rope.factor
        case "llama3":
            return _llama3(rope, 1.0 / rope.theta**exponents)
        case "yarn":
            return _yarn(rope, rope.theta**exponents)
        case "longrope":
            return 1.0 / (torch.tensor(rope.long if long else rope.short) * rope.theta**exponents)
    return 1.0 / rope.theta**exponents


def _llama3(rope: RopeSpec, inverse: Tensor) -> Tensor:
    """The piecewise scaling of Llama 3.1's release."""
    wavelength = 2 * math.pi / inverse
    low, high = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = torch.where(wavelength > low, inverse / rope.factor, inverse)
    return torch.where((wavelength <= low) & (wavelength >= high), between, scaled)


def _yarn(rope: RopeSpec, periods: Tensor) -> Tensor:
    """Interpolated low frequencies, kept high ones, a ramp between (Peng et al. 2023, section 3.2)."""

    def place(rotations: float) -> float:
        turns = math.log(rope.original_context / (rotations * 2 * math.pi))
        return rope.size * turns / (2 * math.log(rope.theta))

    low, high = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(rope.size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return ramp / (rope.factor * periods) + (1 - ramp) / periods


def yarn_scale(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """YaRN's factor of the rotated features: 0.1 ln(factor) + 1, or DeepSeek's ratio of two of them."""

    def one(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return one(mscale) / one(mscale_all_dim) if mscale and mscale_all_dim else one(1.0)


def longrope_scale(factor: float, original_context: int) -> float:
    """LongRoPE's factor of the rotated features (Ding et al. 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0
