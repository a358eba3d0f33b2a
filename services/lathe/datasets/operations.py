"""Preparation: which operations there are, what they need to be, and how they are stored. `selection` says which rows
each one keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.datasets.strata import check_path
from lathe.text.findings import KINDS
from lathe.text.jsonl import MIN_EXAMPLES
from lathe.text.shortening import Policy

MAX_LINES = 10_000
TRAIN, HELD_OUT = "train", "held_out"
TOO_LONG = ("truncated", "tail_cut", "split", "nothing_trained", "identical_outputs", "context_exceeded")
"""What an audit can find of a row that is longer than its limit; the last three also of others."""
FROZEN_ROW = "frozen_row"
_SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class Split:
    """fraction or count (the other is 0): how many rows are held out. stratify_by: see `strata`; empty for none."""

    seed: int
    fraction: float = 0.0
    count: int = 0
    stratify_by: str = ""


@dataclass(frozen=True, slots=True)
class AuditChoice:
    """The audit whose findings are meant, as it was asked for; and its key, once there is one."""

    base_model: str
    method: str = ""
    context_limit: int = 0
    truncation: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Dedupe:
    """The first of each set of equal rows; with an audit, also without what is nearly the same as an earlier row."""

    audit: AuditChoice | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """All rows but those of these lines, ascending, and those for which an audit found one of these codes. frozen: the
    digests of the held-out sets whose rows the code FROZEN_ROW means, once they are known."""

    lines: tuple[int, ...] = ()
    codes: tuple[str, ...] = ()
    audit: AuditChoice | None = None
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """count rows."""

    seed: int
    count: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """All rows, those over the context limit of the audit made shorter: by `policy`, one of lathe.text.shortening's.
    keep_unfit: what cannot be made to fit stays as it is; else it is dropped."""

    audit: AuditChoice
    policy: str = Policy.DROP_OLDEST.value
    keep_unfit: bool = False


# Those that take rows as they are.
Choosing = Split | Dedupe | Drop | Sample
Operation = Choosing | Truncate
_KINDS: dict[str, type[Operation]] = {
    "split": Split,
    "dedupe": Dedupe,
    "drop": Drop,
    "sample": Sample,
    "truncate": Truncate,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Parent:
    """A dataset that another was made from, and the digest of its bytes, by which it can be known when it is gone."""

    id: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a dataset was made. part: TRAIN or HELD_OUT of a split; empty for what makes one dataset."""

    parents: tuple[Parent, ...]
    operation: Operation
    part: str = ""


def parts_of(operation: Operation) -> tuple[str, ...]:
    """The datasets that it makes, in order."""
    return (TRAIN, HELD_OUT) if isinstance(operation, Split) else ("",)


def name_of(operation: Operation) -> str:
    """split, dedupe, drop, sample or truncate."""
    return _NAMES[type(operation)]


def check_operation(operation: Operation) -> None:
    """Raise InvalidArgument for one that cannot be meant."""
    match operation:
        case Split(seed, fraction, count, stratify_by):
            _check_seed("split", seed)
            if stratify_by:
                check_path(stratify_by)
            if (fraction != 0) == (count != 0):
                raise invalid_operation("split", "give either fraction or count: how much is held out")
            if count < 0 or (fraction != 0 and not 0 < fraction < 1):
                raise invalid_operation("split", "fraction must be above 0 and below 1, count 1 or more")
        case Sample(seed, count):
            _check_seed("sample", seed)
            if count < 1:
                raise invalid_operation("sample.count", "must be 1 or more")
        case Drop(lines, codes, audit, _):
            if not (lines or codes) or len(lines) > MAX_LINES or min(lines, default=1) < 1:
                raise invalid_operation(
                    "drop.lines", f"must be 1 to {MAX_LINES} lines, counted from 1, or give codes"
                )
            unknown = [code for code in codes if code not in KINDS]
            if unknown:
                raise invalid_operation("drop.codes", f"{unknown[0]!r} is no code; docs/audit.md lists them")
            if bool(codes) != (audit is not None):
                raise invalid_operation(
                    "drop.base_model", "findings are of an audit: give codes and a base model"
                )
        case Truncate():
            _check_truncate(operation)
        case Dedupe():
            pass


def _check_truncate(operation: Truncate) -> None:
    if operation.policy not in list(Policy):
        raise invalid_operation("truncate.policy", f"{operation.policy!r} must be one of {', '.join(Policy)}")
    if operation.keep_unfit and operation.policy == Policy.DROP_ROW:
        raise invalid_operation(
            "truncate.keep_unfit", "drop_row drops what does not fit; take another policy"
        )


def check_size(operation: Operation, rows: int) -> None:
    """Raise InvalidArgument for what a dataset of so many rows cannot give, as far as their number alone says it;
    `check_parts` says the rest, once the rows were looked at."""
    match operation:
        case Split(_, fraction, count, _):
            held_out = held_out_rows(rows, fraction, count)
            check_parts(operation, (rows - held_out, held_out))
        case Sample(_, count):
            if count > rows:
                raise invalid_operation(
                    "sample.count", f"{count} rows were asked for; the dataset has {rows}"
                )
            check_parts(operation, (count,))
        case Drop(lines):
            check_parts(operation, (rows - len(set(lines)),))
        case _:
            pass


def check_parts(operation: Operation, sizes: Sequence[int]) -> None:
    """Raise InvalidArgument where one of the operation's parts, of these sizes, has too few rows for a dataset. None
    is made then: a good one beside a bad one would be taken for the whole answer."""
    if min(sizes) >= MIN_EXAMPLES:
        return
    least = f"a dataset has at least {MIN_EXAMPLES} rows"
    if isinstance(operation, Split):
        train, held_out = sizes
        raise invalid_operation(
            "split",
            f"{held_out} rows would be held out and {train} left to train on (equal rows stay together), and {least}",
        )
    raise invalid_operation(name_of(operation), f"{sizes[0]} rows would be left, and {least}")


def audit_of(operation: Operation) -> AuditChoice | None:
    """The audit that decides about rows; None where none does."""
    return None if isinstance(operation, Split | Sample) else operation.audit


def with_audit(operation: Operation, audit: AuditChoice) -> Operation:
    """The same with this audit, where one decides about rows."""
    return operation if isinstance(operation, Split | Sample) else replace(operation, audit=audit)


def with_frozen(operation: Operation, frozen: Sequence[str]) -> Operation:
    """The same with these held-out sets, where it drops their rows. Raises InvalidArgument where there are none."""
    if not isinstance(operation, Drop) or FROZEN_ROW not in operation.codes:
        return operation
    if not frozen:
        raise invalid_operation("drop.codes", f"{FROZEN_ROW}: the project has no held-out set")
    return replace(operation, frozen=tuple(sorted(set(frozen))))


def findings_of(operation: Operation) -> tuple[str, ...]:
    """The codes of an audit whose lines the operation does something to; empty where findings do not matter."""
    match operation:
        case Drop(_, codes):
            return codes
        case Dedupe(audit) if audit is not None:
            return ("near_duplicate",)
        case Truncate():
            return TOO_LONG
        case _:
            return ()


def to_json(preparation: Preparation) -> dict[str, Any]:
    """As it is stored."""
    operation = {"kind": name_of(preparation.operation), **asdict(preparation.operation)}
    if not operation.get("frozen"):
        # The version before this one knows no such key.
        operation.pop("frozen", None)
    parents = [asdict(parent) for parent in preparation.parents]
    return {"parents": parents, "operation": operation, "part": preparation.part}


def from_json(stored: Mapping[str, Any]) -> Preparation:
    """What `to_json` made."""
    settings = dict(stored["operation"])
    kind = _KINDS[settings.pop("kind")]
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if settings.get("audit") is not None:
        settings["audit"] = AuditChoice(**settings["audit"])
    parents = tuple(Parent(**parent) for parent in stored["parents"])
    return Preparation(parents, kind(**settings), stored["part"])


def held_out_rows(total: int, fraction: float, count: int) -> int:
    """How many of `total` rows a split holds out. Raises InvalidArgument if it would leave a side without rows."""
    wanted = count or round(total * fraction)
    if not 0 < wanted < total:
        raise invalid_operation(
            "split",
            f"the dataset has {total} rows; holding out {wanted} of them leaves "
            f"{'nothing to train on' if wanted else 'nothing held out'}",
        )
    return wanted


def _check_seed(kind: str, seed: int) -> None:
    if not -_SEED_LIMIT <= seed < _SEED_LIMIT:
        raise invalid_operation(f"{kind}.seed", "must fit into 64 bits")


def invalid_operation(field: str, cause: str) -> InvalidArgument:
    """An InvalidArgument about one field of an operation."""
    message = f"operation.{field}: {cause}."
    return InvalidArgument(message, violations=[FieldViolation(f"operation.{field}", message)])
