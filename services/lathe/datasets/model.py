"""What datasets is about: files, findings, audits, and the rules that need nothing from outside."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from lathe.common.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unimplemented
from lathe.datasets.operations import Preparation
from lathe.text.columns import resolve_columns
from lathe.text.errors import RowError
from lathe.text.filekinds import FileType, file_type_of
from lathe.text.findings import (
    MAX_FINDINGS,
    Finding,
    FindingGroup,
    Severity,
    Tally,
    gravity,
    kind_of,
    rank,
    tally_of,
)
from lathe.text.formats import METHOD_FORMATS, Layout, RowFormat, described
from lathe.text.jsonl import Report as RowReport
from lathe.text.rowindex import VERSION as INDEX_VERSION

PURPOSES = ("fine-tune", "evals", "batch", "assistants", "vision", "user_data")
RESULTS_PURPOSE = "fine-tune-results"
MAX_BYTES = 8 << 30
MAX_NAME = 255
MAX_RESULT_BYTES = 3 << 20
MAX_OVERLAP_LINES = 20
MAX_FOUND_BYTES = 1 << 20
"""A longer row is not sent along with the places where it is."""
# So often a process may end in the middle of an audit before it is given up: it may be what ends them.
AUDIT_BEGINS = 3
# Far longer than deleting an object takes: a claim this old is one of a call that broke off.
CLAIM_LEASE = timedelta(minutes=10)
MAX_COLUMNS = 50
MIN_LIFE = timedelta(hours=1)
MAX_LIFE = timedelta(days=30)
# A client computes expire_time from its own clock and the call takes a while.
_LIFE_SLACK = timedelta(minutes=5)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FILE_ENDING = re.compile(r"(?<=.)\.(jsonl|ndjson|json|csv|tsv|parquet)$", re.IGNORECASE)
_FROZEN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class DatasetState(StrEnum):
    """UPLOADING -> VALIDATING -> READY or ERROR; DELETING from any, never shown."""

    UPLOADING = "uploading"
    VALIDATING = "validating"
    READY = "ready"
    ERROR = "error"
    DELETING = "deleting"


class AuditState(StrEnum):
    """RUNNING until the token object is stored, or it is known that there can be none.

    ERROR is about the rows and stays; FAILED is about Lathe itself and is forgotten at the next start.
    """

    RUNNING = "running"
    READY = "ready"
    ERROR = "error"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of the values of all rows. A quantile is the smallest value at or below which that share of them lies."""

    count: int = 0
    min: int = 0
    p10: int = 0
    median: int = 0
    mean: float = 0.0
    p90: int = 0
    p99: int = 0
    max: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """So many rows are of that kind."""

    value: str
    count: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an audit counted over all rows; see the message of the same name."""

    prompt_tokens: Distribution = Distribution()
    completion_tokens: Distribution = Distribution()
    turn_tokens: Distribution = Distribution()
    row_tokens: Distribution = Distribution()
    turns: Distribution = Distribution()
    languages: tuple[Share, ...] = ()
    answers: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What validation or an audit found: the first findings of `finding_count`. format: that of a training file's rows;
    None for other files, and where no row is a good one. groups: all findings by code, the gravest first. statistics:
    an audit's. layout: how the rows are written; validation's."""

    example_count: int = 0
    finding_count: int = 0
    findings: tuple[Finding, ...] = ()
    format: RowFormat | None = None
    groups: tuple[FindingGroup, ...] = ()
    statistics: Statistics | None = None
    layout: Layout | None = None

    @property
    def has_errors(self) -> bool:
        """Whether something keeps the file from being trained on."""
        return any(kind_of(group.code).severity is Severity.ERROR for group in self.groups)


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How an upload becomes JSONL. columns: key of a training row -> column or key of the file; empty to take all as
    they are named."""

    file_type: FileType
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dataset:
    """One immutable file, uploaded or made from others. staging_key: where its bytes came or come in; empty once
    nothing is there. preparation: how it was made; None for an upload. frozen_as: its name as a held-out set.
    source: where it was imported from, as it may be shown. import_options: how it is converted before it is stored;
    None where it is stored as it is uploaded. source_sha256,
    source_size_bytes: of what was uploaded, once it is converted."""

    project: str
    id: str
    display_name: str
    purpose: str
    state: DatasetState
    create_time: datetime
    expire_time: datetime | None = None
    size_bytes: int = 0
    sha256: str = ""
    report: Report | None = None
    staging_key: str = ""
    preparation: Preparation | None = None
    frozen_as: str = ""
    import_options: ImportOptions | None = None
    source_sha256: str = ""
    source_size_bytes: int = 0
    source: str = ""

    @property
    def name(self) -> str:
        return f"projects/{self.project}/datasets/{self.id}"

    @property
    def uploaded(self) -> tuple[int, str]:
        """Size and digest of the bytes that came in."""
        if self.source_sha256:
            return self.source_size_bytes, self.source_sha256
        return self.size_bytes, self.sha256

    @property
    def unwritten(self) -> bool:
        """Whether the platform has yet to write it: it is VALIDATING, but there is nothing to validate."""
        return self.preparation is not None and not self.sha256 and self.state is DatasetState.VALIDATING


@dataclass(frozen=True, slots=True)
class Overlap:
    """Rows of one file that are also in a frozen one: how many, and the first lines. count is None until somebody
    has looked. Both files are named by their digests: the answer never changes."""

    frozen_sha256: str
    dataset_sha256: str
    count: int | None = None
    lines: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """method: a key of METHOD_FORMATS. context_limit: tokens; 0 for the base model's own. truncation: end or error."""

    method: str = "supervised"
    context_limit: int = 0
    truncation: str = "end"


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A file that a base model's tokenizer is made from."""

    path: str
    object_key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class BaseModelInfo:
    """What an audit needs to know of a base model."""

    name: str
    tokenizer_digest: str
    template_digest: str
    context_length: int
    tunable: bool
    not_tunable_reason: str
    files: tuple[TokenizerFile, ...]


@dataclass(frozen=True, slots=True)
class AuditTask:
    """All that an audit's result depends on. files: where the tokenizer is; no part of the key, because the digests
    stand for them. now: when it was first asked for.
    compared: the keys of two finished audits, of a training and a validation file: the task is then to find what both
    hold, and nothing is tokenised."""

    key: str
    dataset_sha256: str
    base_model: str
    tokenizer_digest: str
    template_digest: str
    options: AuditOptions
    files: tuple[TokenizerFile, ...]
    now: datetime
    compared: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What an audit made: the digest of the token object with all rows that could be tokenised, and counts.
    findings_sha256: of the object that names all findings by line (`lathe.text.findinglines`).

    rows: what a batch counts: a chat row, a preference pair, one of the pieces of a long text. max_row_tokens: of one
    sequence.
    """

    sha256: str = ""
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_rows: int = 0
    max_row_tokens: int = 0
    findings_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Audit:
    """A stored audit, or the answer while the dataset itself is not ready (then `key` is empty)."""

    key: str
    state: AuditState
    report: Report = Report()
    result: AuditResult = AuditResult()

    @property
    def object_key(self) -> str:
        """What is trained from; empty unless READY."""
        return self.tokens_key if self.state is AuditState.READY else ""

    @property
    def tokens_key(self) -> str:
        """The rows that could be tokenised, also of a file with errors; empty while there are none."""
        return blob_key(self.result.sha256) if self.result.sha256 else ""

    @property
    def findings_key(self) -> str:
        """The object that names all findings by line; empty while there is none."""
        return blob_key(self.result.findings_sha256) if self.result.findings_sha256 else ""


def blob_key(sha256: str) -> str:
    """Where an immutable object of this service lies."""
    return f"blobs/{sha256}"


def index_key(sha256: str) -> str:
    """Where the row index of the file with this digest lies."""
    return f"{index_prefix(sha256)}v{INDEX_VERSION}"


def index_prefix(sha256: str) -> str:
    """Where the row indexes of all versions lie."""
    return f"rowindexes/{sha256}."


def same_staging(given: str, kept: str) -> bool:
    """Whether a committed key is the one that was handed out; a prefix may end in a slash."""
    return bool(kept) and given.rstrip("/") == kept


def audit_key(
    dataset_sha256: str,
    tokenizer_digest: str,
    template_digest: str,
    canonical_options: str,
    text_version: str,
) -> str:
    """SHA-256 over all that decides the bytes of a token object."""
    parts = [dataset_sha256, tokenizer_digest, template_digest, canonical_options, text_version]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def comparison_key(training_key: str, validation_key: str, text_version: str) -> str:
    """SHA-256 over all that decides what two audits are found to share."""
    parts = ["comparison", training_key, validation_key, text_version]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def with_overlap(audit: Audit, comparison: Audit) -> Audit:
    """The training file's audit with what was found to be in the validation file too; RUNNING before that is known."""
    if comparison.state is not AuditState.READY:
        return Audit("", comparison.state, comparison.report)
    return replace(audit, report=_joined(audit.report, comparison.report))


def _joined(report: Report, more: Report) -> Report:
    """A report with the findings of another one; their codes differ."""
    return replace(
        report,
        finding_count=report.finding_count + more.finding_count,
        findings=tuple(sorted((*report.findings, *more.findings), key=gravity)[:MAX_FINDINGS]),
        groups=tuple(sorted((*report.groups, *more.groups), key=rank)),
    )


def check_new(display_name: str, purpose: str, expire_time: datetime | None, now: datetime) -> None:
    """Raise InvalidArgument for a dataset that cannot be made."""
    if not display_name or len(display_name) > MAX_NAME or _CONTROL.search(display_name):
        raise invalid(
            "dataset.display_name",
            f"dataset.display_name must be 1 to {MAX_NAME} characters without control characters.",
        )
    if purpose not in PURPOSES:
        raise invalid("dataset.purpose", f"dataset.purpose {purpose!r} must be one of {', '.join(PURPOSES)}.")
    if expire_time is not None:
        life = expire_time - now
        if not MIN_LIFE - _LIFE_SLACK <= life <= MAX_LIFE + _LIFE_SLACK:
            raise invalid(
                "dataset.expire_time", "dataset.expire_time must be between 1 hour and 30 days from now."
            )


def resolve_import(
    display_name: str, purpose: str, given: ImportOptions | None, original_name: str = ""
) -> ImportOptions | None:
    """How a new upload is converted: as it was asked for, else by its name, or that which it had where it comes from;
    None where it is stored as it is.

    Raises InvalidArgument.
    """
    if purpose != "fine-tune":
        if given is not None:
            raise invalid(
                "dataset.import_options",
                f"dataset.import_options is for the purpose fine-tune, not {purpose}.",
            )
        return None
    options = given or ImportOptions(file_type_of(display_name, original_name))
    if len(options.columns) > MAX_COLUMNS or any(len(name) > 255 for name in options.columns.values()):
        raise invalid(
            "dataset.import_options.columns",
            f"dataset.import_options.columns has at most {MAX_COLUMNS} names of at most 255 characters.",
        )
    try:
        resolve_columns(options.columns)
    except RowError as error:
        raise invalid(f"dataset.import_options.columns[{error.field}]", error.message) from None
    return None if options.file_type is FileType.JSONL and not options.columns else options


def check_upload(size_bytes: int, sha256: str) -> None:
    """Raise InvalidArgument for the facts of an upload that cannot be."""
    if not 0 <= size_bytes <= MAX_BYTES:
        raise invalid("size_bytes", f"size_bytes is {size_bytes}; a dataset has at most {MAX_BYTES} bytes.")
    if not _SHA256.fullmatch(sha256):
        raise invalid("sha256", "sha256 must be 64 lower-case hex digits.")


def resolve_options(options: AuditOptions, base: BaseModelInfo) -> AuditOptions:
    """The options with every default filled in from the base model.

    Raises InvalidArgument, and Unimplemented for a method that is not built yet.
    """
    if options.method and options.method not in METHOD_FORMATS:
        known = ", ".join(METHOD_FORMATS)
        raise Unimplemented(f"options.method {options.method!r} is not offered yet; use one of {known}.")
    if options.truncation not in ("", "end", "error"):
        raise invalid(
            "options.truncation", f"options.truncation {options.truncation!r} must be end or error."
        )
    limit = options.context_limit or base.context_length
    if not 0 < limit <= base.context_length:
        raise invalid(
            "options.context_limit",
            f"options.context_limit {options.context_limit} must be 1 to {base.context_length}, "
            f"the context of {base.name}.",
        )
    return AuditOptions(options.method or "supervised", limit, options.truncation or "end")


def check_format(method: str, report: Report) -> Finding | None:
    """What is wrong with training on a file of this report by this method; None where nothing is."""
    wanted = METHOD_FORMATS[method]
    # Files that were validated before there were other formats say none.
    found = report.format or RowFormat.CHAT
    if found in wanted:
        return None
    fitting = " or ".join(name for name, formats in METHOD_FORMATS.items() if found in formats)
    instead = (
        f"Use the method {fitting}, or another file." if fitting else "No method trains on such files yet."
    )
    return Finding(
        0,
        "",
        "wrong_format",
        f"The method {method} trains on a file in which each row is {' or '.join(map(described, wanted))}; in this one "
        f"each is {described(found)}. {instead}",
    )


def check_frozen_name(name: str) -> None:
    """Raise InvalidArgument for a name that a held-out set cannot have."""
    if not _FROZEN_NAME.fullmatch(name):
        raise invalid(
            "frozen_as",
            f"frozen_as {name!r} must be 1 to 63 lower-case letters, digits and any of . _ -, beginning with a letter "
            "or digit.",
        )


def check_rows(dataset: Dataset) -> None:
    """Raise FailedPrecondition for a dataset that has no training rows to work with."""
    if dataset.purpose != "fine-tune":
        raise FailedPrecondition(
            f"{dataset.name} has the purpose {dataset.purpose}; only files of purpose fine-tune have training rows.",
            reason="WRONG_PURPOSE",
        )
    if dataset.state is not DatasetState.READY:
        raise FailedPrecondition(
            f"{dataset.name} is {dataset.state}; wait until it is ready, or see what validation found.",
            reason="NOT_READY",
        )


def derived_name(display_name: str, operation: str, part: str) -> str:
    """`train.csv` and held_out as `train.held_out.jsonl`: what is made of a dataset is JSONL, as it is stored. The
    operation stands for the part where it makes one dataset."""
    word = part or operation
    made = f"{_FILE_ENDING.sub('', display_name)}.{word}.jsonl"
    return made if len(made) <= MAX_NAME else f"{word}.jsonl"


def leaked(overlaps: Sequence[tuple[str, Overlap]]) -> Report | None:
    """What is wrong with training on a file that shares rows with frozen sets (name, overlap); None if nothing is."""
    findings = [
        Finding(
            0,
            "",
            "frozen_row",
            f"{overlap.count} row(s) are in the frozen held-out set {name!r}, such as on line(s) "
            f"{', '.join(map(str, overlap.lines))}: a model that has seen them cannot be judged by it. Drop them "
            "(lathe datasets drop, --finding frozen_row), or train on another file.",
        )
        for name, overlap in overlaps
        if overlap.count
    ]
    return report_of(0, tally_of(findings)) if findings else None


def training_report(found: RowReport) -> Report:
    """The report on a training file whose rows were checked."""
    return Report(
        example_count=found.rows,
        finding_count=found.finding_count,
        findings=found.findings,
        format=found.format,
        groups=found.groups,
        layout=found.layout,
    )


def report_of(
    example_count: int, tally: Tally, found: RowFormat | None = None, statistics: Statistics | None = None
) -> Report:
    """The report on a file whose findings were tallied."""
    return Report(example_count, tally.count, tally.first(), found, tally.groups(), statistics)


def whole_file(code: str, message: str) -> Report:
    """A report with one finding about the whole file."""
    return report_of(0, tally_of([Finding(0, "", code, message)]))


def invalid(field: str, message: str) -> InvalidArgument:
    """An InvalidArgument about one field."""
    return InvalidArgument(message, violations=[FieldViolation(field, message)])


def request_key(kind: str, request_id: str) -> str:
    """Under what a create is known, so that its repetition finds it; empty without a request_id."""
    if len(request_id) > 128:
        raise invalid("request_id", "request_id has more than 128 characters; use a UUID.")
    return f"{kind}:{request_id}" if request_id else ""
