"""What a user may ask of training, what it became, and the rules about both. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.text.formats import METHOD_FORMATS, RowFormat

# OpenAI keeps the checkpoints of the last three epochs.
KEPT_CHECKPOINTS = 3
SCHEDULES = ("cosine", "linear", "constant")
LOSS_TYPES = ("sigmoid", "ipo")
# PEFT can put LoRA on these too; they are taken by name only, never by default.
NAMED_MODULES = ("embed_tokens", "lm_head")
OPTIONS = "job.training"


class Method(StrEnum):
    """How an adapter is trained; docs/methods.md says what each is for."""

    SUPERVISED = "supervised"
    DPO = "dpo"
    ORPO = "orpo"
    KTO = "kto"


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """The hyperparameters as asked for; None means auto.

    The meanings and ranges are those of jobs.proto: Method, LoraConfig and TrainingOptions.
    """

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    lora_r: int | None = None
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    method: Method = Method.SUPERVISED
    beta: float | None = None
    loss_type: str | None = None
    label_smoothing: float | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    full_parameter: bool | None = None
    schedule: str | None = None
    warmup_fraction: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    early_stopping_patience: int | None = None
    eval_every: int | None = None
    keep_checkpoints: int | None = None
    sample_prompts: int | None = None

    @property
    def path(self) -> str:
        """Where its method stands in a CreateJob."""
        return f"job.method.{self.method}"


# Supervised, and everything chosen by the rules.
AUTO = TrainingSpec()


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What auto became. learning_rate is the peak, already multiplied; what its method does not have is 0 or empty."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    lora_r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    method: Method = Method.SUPERVISED
    beta: float = 0.0
    loss_type: str = ""
    label_smoothing: float = 0.0
    desirable_weight: float = 0.0
    undesirable_weight: float = 0.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    full_parameter: bool = False
    schedule: str = "cosine"
    early_stopping_patience: int = 0
    eval_every: int = 0
    keep_checkpoints: int = KEPT_CHECKPOINTS
    sample_prompts: int = 0


def violations(spec: TrainingSpec, *, has_validation: bool) -> list[FieldViolation]:
    """One for every field that is out of its range, or that does not go with another."""
    return [*_out_of_range(spec), *_unknown_words(spec), *_contradictions(spec, has_validation)]


def _out_of_range(spec: TrainingSpec) -> list[FieldViolation]:
    above = math.ulp(0.0)
    numbers, lora = f"{spec.path}.hyperparameters", f"{spec.path}.lora"
    smallest_batch = 2 if spec.method is Method.KTO else 1
    rules: tuple[tuple[str, str, float, float, str], ...] = (
        (numbers, "n_epochs", 1, 50, "1 to 50"),
        (numbers, "batch_size", smallest_batch, 256, f"{smallest_batch} to 256"),
        (numbers, "learning_rate_multiplier", above, 1000, "above 0 and at most 1000"),
        (numbers, "beta", above, 2, "above 0 and at most 2"),
        (numbers, "label_smoothing", 0, math.nextafter(0.5, 0), "0 to below 0.5"),
        (numbers, "desirable_weight", above, 100, "above 0 and at most 100"),
        (numbers, "undesirable_weight", above, 100, "above 0 and at most 100"),
        (lora, "lora_r", 1, 256, "1 to 256"),
        (lora, "lora_alpha", above, 4096, "above 0 and at most 4096"),
        (lora, "lora_dropout", 0, math.nextafter(1, 0), "0 to below 1"),
        (OPTIONS, "warmup_fraction", 0, 1, "0 to 1"),
        (OPTIONS, "weight_decay", 0, 1, "0 to 1"),
        (OPTIONS, "max_grad_norm", above, 1e6, "above 0 and at most 1000000"),
        (OPTIONS, "early_stopping_patience", 0, 1000, "0 to 1000"),
        (OPTIONS, "eval_every", 1, 1_000_000, "1 to 1000000"),
        (OPTIONS, "keep_checkpoints", 1, 100, "1 to 100"),
        (OPTIONS, "sample_prompts", 0, 8, "0 to 8"),
    )
    wrong = []
    for parent, name, low, high, words in rules:
        value = getattr(spec, name)
        # Written so that NaN is refused too.
        if value is not None and not low <= value <= high:
            # PEFT's field is r; lora_r is what it is among all the others.
            path = f"{parent}.{'r' if name == 'lora_r' else name}"
            wrong.append(FieldViolation(path, f"{path} is {value}; it must be {words}."))
    return wrong


def _unknown_words(spec: TrainingSpec) -> list[FieldViolation]:
    wrong = []
    for path, value, known in (
        (f"{spec.path}.hyperparameters.loss_type", spec.loss_type, LOSS_TYPES),
        (f"{OPTIONS}.schedule", spec.schedule, SCHEDULES),
    ):
        if value is not None and value not in known:
            wrong.append(FieldViolation(path, f"{path} is {value[:100]!r}; choose from {', '.join(known)}."))
    return wrong


def _contradictions(spec: TrainingSpec, has_validation: bool) -> list[FieldViolation]:
    wrong = []
    if spec.loss_type == "ipo" and spec.label_smoothing:
        path = f"{spec.path}.hyperparameters.label_smoothing"
        wrong.append(FieldViolation(path, f"{path} goes with the loss_type sigmoid only."))
    if spec.full_parameter and _has_lora(spec):
        path = f"{spec.path}.lora"
        wrong.append(
            FieldViolation(path, f"{path} does not go with {OPTIONS}.full_parameter: leave one out.")
        )
    for name in ("early_stopping_patience", "sample_prompts"):
        if getattr(spec, name) and not has_validation:
            path = f"{OPTIONS}.{name}"
            wrong.append(
                FieldViolation(path, f"{path} needs a validation dataset: name one, or leave it out.")
            )
    return wrong


def _has_lora(spec: TrainingSpec) -> bool:
    given = (spec.lora_r, spec.lora_alpha, spec.lora_dropout, spec.use_rslora, spec.use_dora)
    return bool(spec.target_modules) or any(value is not None for value in given)


def check_target_modules(spec: TrainingSpec, base_id: str, modules: Iterable[str]) -> None:
    """Raise InvalidArgument if LoRA was asked for on what the base model has not. modules: those that it lists."""
    known = (*modules, *NAMED_MODULES)
    unknown = [module for module in spec.target_modules if module not in known]
    if unknown:
        path = f"{spec.path}.lora.target_modules"
        text = f"{path}: {base_id} has no module {', '.join(unknown)}; choose from {', '.join(known)}."
        raise InvalidArgument(text, violations=[FieldViolation(path, text)])


def check_format(spec: TrainingSpec, format_: str, path: str, file: str) -> None:
    """Raise InvalidArgument if the rows of a file are not what the method trains on. format_: may be empty (unknown).

    path: the field that names the file; file: it, in words.
    """
    wanted = METHOD_FORMATS[spec.method]
    if not format_ or format_ in wanted:
        return
    methods = [method for method, formats in METHOD_FORMATS.items() if format_ in formats]
    other = (
        f"Choose the method {' or '.join(methods)}, or"
        if methods
        else "No method trains on those yet; choose"
    )
    text = (
        f"{path}: {file} has {format_.replace('_', ' ')} rows, and {spec.method} trains on "
        f"{' or '.join(name.replace('_', ' ') for name in wanted)} rows. {other} another file."
    )
    raise InvalidArgument(text, reason="WRONG_FORMAT", violations=[FieldViolation(path, text)])


def check_needs_no_template(base_id: str, format_: str, path: str, file: str) -> None:
    """Raise InvalidArgument for rows that are messages whatever they say: a base without a chat template renders none.

    Rows of the other formats may be texts; the audit looks at each.
    """
    if format_ == RowFormat.CHAT:
        text = (
            f"{path}: {file} has chat rows, and {base_id} has no chat template to render messages with; choose a file "
            "of text or completion rows, or a base model that has one (imported with a chat_template.jinja)."
        )
        raise InvalidArgument(text, reason="NO_CHAT_TEMPLATE", violations=[FieldViolation(path, text)])


def inherit(spec: TrainingSpec, parent: TrainingSpec) -> TrainingSpec:
    """A job on a tuned model goes on with that adapter, so what the adapter computes is given: `parent`'s LoRA.

    Only dropout, which training alone has, may be another. Weights that were trained whole are trained whole again.
    Raises InvalidArgument if another shape was asked for.
    """
    path = f"{spec.path}.lora"
    if parent.full_parameter:
        return _whole_again(spec)
    if spec.full_parameter:
        where = f"{OPTIONS}.full_parameter"
        text = f"{where}: an adapter cannot be gone on with by full-parameter training; start from the base model."
        raise InvalidArgument(text, violations=[FieldViolation(where, text)])
    for name, field in (
        ("lora_r", "r"),
        ("lora_alpha", "lora_alpha"),
        ("use_rslora", "use_rslora"),
        ("use_dora", "use_dora"),
    ):
        asked, given = getattr(spec, name), getattr(parent, name)
        if asked is not None and asked != (given or False):
            text = f"{path}.{field} must be {given or False}, as in the adapter to start from."
            raise InvalidArgument(text, violations=[FieldViolation(f"{path}.{field}", text)])
    if spec.target_modules and set(spec.target_modules) != set(parent.target_modules):
        text = f"{path}.target_modules must be those of the adapter to start from: {', '.join(parent.target_modules)}."
        raise InvalidArgument(text, violations=[FieldViolation(f"{path}.target_modules", text)])
    return replace(
        spec,
        lora_r=parent.lora_r,
        lora_alpha=parent.lora_alpha,
        target_modules=parent.target_modules,
        lora_dropout=parent.lora_dropout if spec.lora_dropout is None else spec.lora_dropout,
        use_rslora=parent.use_rslora,
        use_dora=parent.use_dora,
    )


def _whole_again(spec: TrainingSpec) -> TrainingSpec:
    if spec.full_parameter is False or _has_lora(spec):
        path = f"{spec.path}.lora" if _has_lora(spec) else f"{OPTIONS}.full_parameter"
        text = f"{path}: all weights of the model to start from were trained, and are trained again; leave it out."
        raise InvalidArgument(text, violations=[FieldViolation(path, text)])
    return replace(spec, full_parameter=True)
