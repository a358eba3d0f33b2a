"""Which LoRA an adapter is: PEFT's LoraConfig as far as Lathe trains and serves it, read and written as PEFT does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.engine.jsonfile import read_object

CONFIG_FILE = "adapter_config.json"
# PEFT's word for every linear of the layers; the head and the embeddings are named when they are wanted.
ALL_LINEAR = "all-linear"
MAX_RANK = 1024
# Options of a config that say nothing about what the weights in the file compute.
_NEUTRAL = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "inference_mode",
        "init_lora_weights", "layers_pattern", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core",
        "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "alpha_pattern", "lora_alpha", "lora_dropout", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
    }
)  # fmt: skip
# Other ways to initialise (PiSSA, OLoRA, LoftQ, CorDA, …) change the base model's own weights.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_WHY_REFUSED = {
    "modules_to_save": "whole trained modules are not supported; train LoRA on them (target_modules), "
    "or tune the full model",
    "ensure_weight_tying": "embeddings and head have LoRA of their own; tying it is not supported",
}
# A module's path, possibly anchored: no quantifiers and no groups, so that matching takes no time worth counting.
_PATTERN = re.compile(r"\^?[\w.\\]+\$?")


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The part of PEFT's LoraConfig that Lathe trains and serves. Raises InvalidArgument naming the field.

    target_modules: names as in the model, checked against the base by the bank. lora_dropout acts in training only.
    use_dora: Liu et al. 2024. rank_pattern, alpha_pattern: module path (or its end) -> what it has instead of r and
    lora_alpha, the first that matches as in PEFT.
    """

    r: int = 16
    lora_alpha: float = 32
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        if not self.target_modules:
            raise invalid("target_modules", "empty; name at least one module, or all-linear")
        if not 0 <= self.lora_dropout < 1:
            raise invalid("lora_dropout", f"{self.lora_dropout} is outside 0 … 1 (not included)")
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                _check_pattern(name, key)
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key}]", rank)
        for key, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{key}]", alpha)

    def rank_of(self, path: str) -> int:
        """The rank of the module at this path ("model.layers.0.self_attn.q_proj")."""
        return int(_matched(self.rank_pattern, path, self.r))

    def scale_of(self, path: str) -> float:
        """What B A x is multiplied by in this module: alpha / r, or alpha / sqrt(r) with use_rslora."""
        rank, alpha = self.rank_of(path), _matched(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_config(self, base_model: str = "") -> dict[str, object]:
        """adapter_config.json as PEFT reads it."""
        modules = sorted(self.target_modules)
        return {
            "alpha_pattern": {key: _number(alpha) for key, alpha in self.alpha_pattern.items()},
            "base_model_name_or_path": base_model or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": _number(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "target_modules": ALL_LINEAR if modules == [ALL_LINEAR] else modules,
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> LoraSpec:
        """Reads an adapter_config.json. Raises InvalidArgument for what would change the arithmetic unseen."""
        if config.get("peft_type") != "LORA":
            raise invalid("peft_type", f"{config.get('peft_type')!r}; only LORA adapters are supported")
        if config.get("bias", "none") != "none":
            raise invalid("bias", f"{config['bias']!r}; only 'none' is supported")
        if config.get("init_lora_weights", True) not in _INITIALISATIONS:
            raise invalid(
                "init_lora_weights",
                f"{config['init_lora_weights']!r} changes the base model's weights; convert the adapter to plain LoRA",
            )
        for name in sorted(set(config) - _NEUTRAL - _READ):
            if config[name]:
                why = _WHY_REFUSED.get(name, "this option is not supported")
                raise invalid(name, f"{config[name]!r}; {why}")
        return cls(
            r=_integer("r", config.get("r")),
            lora_alpha=_float("lora_alpha", config.get("lora_alpha")),
            target_modules=_modules(config.get("target_modules")),
            use_rslora=bool(config.get("use_rslora", False)),
            use_dora=bool(config.get("use_dora", False)),
            lora_dropout=_float("lora_dropout", config.get("lora_dropout") or 0.0),
            rank_pattern={k: _integer("rank_pattern", v) for k, v in _table(config, "rank_pattern").items()},
            alpha_pattern={k: _float("alpha_pattern", v) for k, v in _table(config, "alpha_pattern").items()},
        )


def read_spec(folder: Path) -> LoraSpec:
    """The LoraSpec of an adapter folder. Raises InvalidArgument."""
    return LoraSpec.from_config(read_object(folder / CONFIG_FILE))


def invalid(name: str, what: str) -> InvalidArgument:
    """The refusal of one field."""
    return InvalidArgument(f"{name}: {what}.", violations=(FieldViolation(name, what),))


def _matched(pattern: Mapping[str, float], path: str, otherwise: float) -> float:
    # PEFT's get_pattern_key: the key is a regular expression for the end of the path, from a dot or the beginning.
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return otherwise


def _check_pattern(name: str, key: str) -> None:
    try:
        re.compile(key)
        simple = _PATTERN.fullmatch(key) is not None
    except re.error:
        simple = False
    if not simple:
        raise invalid(
            f"{name}[{key}]",
            "only a module's path is supported (letters, digits, dots), no other regular expression",
        )


def _check_rank(name: str, rank: int) -> None:
    if not 1 <= rank <= MAX_RANK:
        raise invalid(name, f"{rank} is outside 1 … {MAX_RANK}")


def _check_alpha(name: str, alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise invalid(name, f"{alpha} is not a positive number")


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _integer(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid(name, f"{value!r} is not a whole number")
    return value


def _float(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise invalid(name, f"{value!r} is not a number")
    return float(value)


def _modules(value: object) -> tuple[str, ...]:
    if value == ALL_LINEAR:
        return (ALL_LINEAR,)
    if not isinstance(value, list):
        raise invalid(
            "target_modules", f"{value!r}; a list of module names is needed (no regular expression)"
        )
    return tuple(sorted({str(name) for name in value}))


def _table(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise invalid(name, f"{value!r} is not an object")
    return value
