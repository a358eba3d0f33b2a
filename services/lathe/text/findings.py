"""What can be found in a training file: each code with its severity, its meaning and what to do about it.

A code never changes its meaning. What is not listed here (a code of a newer version in a stored report) counts as an
error, so that nothing unknown is trained on silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from lathe.text.privacy import redacted


class Severity(StrEnum):
    """ERROR: cannot be trained on. WARNING: trains, but hardly as it was meant. NOTE: good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


SEVERITIES = (Severity.ERROR, Severity.WARNING, Severity.NOTE)
"""The gravest first: the order in which findings are shown."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a code stands for. meaning: one sentence without its full stop. advice: sentences that say what to do."""

    severity: Severity
    meaning: str
    advice: str


def kind_of(code: str) -> Kind:
    """The code's entry, or one that says that this version does not know it."""
    return KINDS.get(code, _UNKNOWN)


_UNKNOWN = Kind(
    Severity.ERROR,
    "a finding that this version of Lathe does not know",
    "Read the message of each line, or upload the file again.",
)

_JSON = "Write one JSON object a line, in UTF-8, with a JSON library."
_ROW = "Correct the row; docs/data.md shows a row of each format."
_TOOLS = "Write tools and tool calls as OpenAI's API takes them."

_ERRORS = {
    "invalid_utf8": ("a line is not UTF-8", "Save the file as UTF-8; half a surrogate pair is no text."),
    "invalid_json": ("a line is not JSON", _JSON),
    "too_deep": ("a value nests too deeply", "Flatten the schema or the arguments: nothing that deep can be rendered."),
    "line_too_long": (
        "a line is longer than a row may be",
        "Split the row; what is that long does not fit into a context.",
    ),
    "data_type": ("a value has the wrong type", _ROW),
    "mixed_formats": (
        "a row has another format than the first one",
        "Put the rows of each format into a file of their own.",
    ),
    "invalid_n_examples": ("the file has too few examples", "Add examples; ten is the least."),
    "empty_file": ("the file has no example", "Upload a file with at least one row."),
    "missing_messages_list": ("a row has no list of messages", _ROW),
    "message_missing_key": ("a message lacks a key", _ROW),
    "message_unrecognized_key": ("a key is unknown", "Remove the key, or correct its spelling."),
    "unrecognized_role": ("a message has an unknown role", _ROW),
    "missing_content": ("a message or text is empty", "Give it a text, or leave the row out."),
    "example_missing_assistant_message": ("a row has no answer", "Add the assistant's message, or leave the row out."),
    "invalid_weight": ("a weight stands where none may, or is neither 0 nor 1", _ROW),
    "invalid_tools": ("tools or tool calls are not well formed", _TOOLS),
    "missing_input": ("a preference row has no input", _ROW),
    "missing_output": ("a preference row lacks an output", _ROW),
    "invalid_output": ("an output is not one message of the assistant", _ROW),
    "identical_outputs": (
        "both outputs of a preference row are the same",
        "Leave the row out, or raise the limit if only what was cut differed.",
    ),
    "invalid_label": ("a label is neither true nor false", _ROW),
    "invalid_prompt": ("a prompt does not end with a message to answer", _ROW),
    "compressed_file": ("the file is compressed or an archive", "Unpack it and upload what is inside."),
    "wrong_file_type": (
        "the file is not of the type that its name or the request says",
        "Give the file the right ending, or say its type.",
    ),
    "too_many_errors": ("most rows are bad", "Correct what the first findings say, and upload the file again."),
    "invalid_csv": ("a row is not CSV, or has more or fewer cells than the header", "Write it with a CSV library."),
    "invalid_parquet": ("the file is not Parquet, or is damaged", "Write it again, and upload it again."),
    "missing_column": ("a column that the mapping names is not in the file", "Correct the mapping of columns."),
    "unknown_column": ("the mapping names what is no key of a training row", "Correct the mapping of columns."),
    "too_large": (
        "the file unpacks to more than can be",
        "Split the file, or write it with smaller pages and row groups.",
    ),
    "unreadable_file": ("the program that reads such files ended", "Write the file again, or as JSONL."),
    "unsupported_format": ("rows of a kind that nothing here trains on", "Use a file of another format."),
    "unsupported_content": (
        "a message has a part that is no text, such as an image",
        "Leave the row out, or only its text: models that see or hear are not there yet.",
    ),
    "wrong_format": ("the method does not train on files of this format", "Choose the method that the message names."),
    "frozen_row": (
        "a row is in a frozen held-out set",
        "Drop such rows (lathe datasets drop, --finding frozen_row), or train on another file.",
    ),
    "cannot_prepare": (
        "the dataset cannot be made of its parent's rows as it was asked for",
        "Correct the operation; a dry run says beforehand what it would give.",
    ),
    "parent_deleted": ("the dataset that it is made from is gone", "Make it from another dataset."),
    "digest_mismatch": ("the bytes are not those that were announced", "Upload the file again."),
    "import_refused": (
        "what it is to be imported from may not be fetched",
        "Use a public address, or upload the file.",
    ),
    "import_too_large": (
        "what is imported is too large, or takes too long",
        "Upload the file, or import it in pieces.",
    ),
    "import_failed": ("what is imported cannot be fetched", "Look whether the source is there, then import it again."),
    "upload_lost": ("the uploaded bytes are gone", "Upload the file again."),
    "server_error": ("Lathe itself failed", "Try again; if it stays, tell your operator the words of the message."),
    "nothing_trained": (
        "a row has no token that would be trained",
        "Give an answer the weight 1, raise the context limit, or leave the row out.",
    ),
    "template_error": (
        "the base model's chat template refuses a row",
        "Bring the roles into the order that the template wants, or choose another base model.",
    ),
    "row_too_heavy": (
        "a row takes more memory than its audit may have, or each process that audited it was ended",
        "Split the row, or write it more simply; if it is a small one, tell your operator: its machine may have too "
        "little memory.",
    ),
    "text_too_long": (
        "a text is longer than the base model's tokenizer may take at once",
        "Split it, or put spaces or line breaks into it; most tokenizers take a text in pieces that end at these.",
    ),
    "too_many_turns": (
        "a conversation has so many trained turns that finding their tokens takes too long",
        "Split the conversation, or give earlier turns weight 0; it hardly fits into a context.",
    ),
    "turn_not_maskable": (
        "it cannot be told which tokens of a turn to train",
        "Give the turn weight 0, split the row so that the turn is its last, or drop such rows (lathe datasets drop); "
        "where the message says to correct the template, do that or choose another base model.",
    ),
    "context_exceeded": (
        "a row is longer than the context limit",
        "Shorten the row, raise the limit, or let rows be cut (truncation: end).",
    ),
}  # fmt: skip

_WARNINGS = {
    "truncated": (
        "a row is longer than the context limit and loses its end, and with it the end of its answer",
        "Shorten the rows (lathe datasets truncate), raise the context limit, or drop them: the model learns to stop "
        "in the middle.",
    ),
    "stop_not_trained": (
        "the token that ends the turn is not trained",
        "Correct the base model's chat template or its eos_token: a model tuned on this does not learn to stop.",
    ),
    "tools_not_rendered": (
        "a row has tools, but the chat template does not write them",
        "Choose a base model whose template knows tools, or remove the tools: the model learns calls to what it "
        "never saw.",
    ),
    "message_dropped": (
        "the chat template leaves out a message, or what it says",
        "Move its content into a message that the template writes, or choose another base model.",
    ),
    "messages_reordered": (
        "the chat template writes the messages in another order",
        "Order the messages as the template writes them.",
    ),
    "special_token_in_text": (
        "a text holds a special token of the tokenizer, which the model reads as its own control token",
        "Remove or rewrite it: inside a message it can end the turn or begin another role's.",
    ),
    "duplicate": (
        "a row is the same as an earlier one",
        "Remove the repetitions (`lathe datasets dedupe`): each is one more epoch of that row.",
    ),
    "validation_duplicate": (
        "a training row is also in the validation file",
        "Remove it from one of the two: the validation loss says nothing about rows that were trained on.",
    ),
    "validation_near_duplicate": (
        "a training row is nearly the same as one of the validation file",
        "Remove it from one of the two: the validation loss is too good for such rows.",
    ),
    "empty_answer": (
        "an answer has no visible character",
        "Write the answer, or drop the row: the model learns to say nothing.",
    ),
    "secret": (
        "a text holds what looks like a key, a password or a token",
        "Remove it, and make the key invalid if it is a real one: a tuned model can repeat what it was trained on.",
    ),
    "card_number": (
        "a text holds what looks like a payment card's number (its check digit is right)",
        "Replace it by an invented one: a tuned model can repeat what it was trained on.",
    ),
    "bank_account": (
        "a text holds what looks like a bank account's number (an IBAN whose check digits are right)",
        "Replace it by an invented one: a tuned model can repeat what it was trained on.",
    ),
    "label_imbalance": (
        "few different answers, and one of them is nearly all",
        "Add examples of the rare answers: a model that always gives the common one has a low loss here.",
    ),
}  # fmt: skip

_NOTES = {
    "unused_keys": (
        "rows have keys that nothing is done with, such as an id",
        "Nothing to do, if they are what you expect; rename what should be trained on.",
    ),
    "tail_cut": (
        "a row is longer than the context limit and loses its end, but nothing of it that is trained",
        "Nothing is wrong with what is trained; a higher limit keeps the row whole.",
    ),
    "split": (
        "a text is longer than the context limit and was split into several rows",
        "Nothing is lost; a higher limit keeps longer texts together.",
    ),
    "near_duplicate": (
        "a row is nearly the same as an earlier one",
        "Look at some of them; drop them (`lathe datasets dedupe`) where they teach nothing new.",
    ),
    "tiny_answer": (
        "an answer has hardly any token beside the end of its turn",
        "Right for labels; elsewhere look at the rows.",
    ),
    "other_language": (
        "a row is in another language than most",
        "Look at some of them; drop them where they are there by accident.",
    ),
    "email": (
        "a text holds an e-mail address",
        "Replace addresses of real people: a tuned model can repeat what it was trained on.",
    ),
}

KINDS: dict[str, Kind] = {
    code: Kind(severity, meaning, advice)
    for severity, kinds in ((Severity.ERROR, _ERRORS), (Severity.WARNING, _WARNINGS), (Severity.NOTE, _NOTES))
    for code, (meaning, advice) in kinds.items()
}


MAX_FINDINGS = 20
"""So many findings are shown of a report, and so many lines of each code."""


@dataclass(frozen=True, slots=True)
class Finding:
    """line: 1-based, 0 for the file as a whole. field: path within the row. code: a key of KINDS. message: what is
    wrong there, for people."""

    line: int
    field: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class FindingGroup:
    """All findings of one code. count: how many lines have it. lines: the first of them, as they were found."""

    code: str
    count: int
    lines: tuple[int, ...]


class Tally:
    """Counts findings by code as they are found, and keeps the first ones, without what is sensitive in the names or
    values that they quote. Of a line a code counts once, if all its findings are added in a row."""

    def __init__(self) -> None:
        self.count = 0
        self._counts: dict[str, int] = {}
        self._lines: dict[str, list[int]] = {}
        self._last: dict[str, int] = {}
        self._first: dict[Severity, list[Finding]] = {severity: [] for severity in SEVERITIES}

    def add(self, finding: Finding) -> None:
        """One more."""
        if self._last.get(finding.code) == finding.line:
            return
        self._last[finding.code] = finding.line
        self.count += 1
        self._counts[finding.code] = self._counts.get(finding.code, 0) + 1
        lines = self._lines.setdefault(finding.code, [])
        if len(lines) < MAX_FINDINGS:
            lines.append(finding.line)
        first = self._first[kind_of(finding.code).severity]
        if len(first) < MAX_FINDINGS:
            first.append(replace(finding, field=redacted(finding.field), message=redacted(finding.message)))

    @property
    def has_errors(self) -> bool:
        """Whether there is a finding that keeps the file from being trained on."""
        return bool(self._first[Severity.ERROR])

    def first(self) -> tuple[Finding, ...]:
        """The first findings, the gravest before the others."""
        ordered = [finding for severity in SEVERITIES for finding in self._first[severity]]
        return tuple(ordered[:MAX_FINDINGS])

    def groups(self) -> tuple[FindingGroup, ...]:
        """By code: the gravest first, among them the most frequent, then by name."""
        found = [FindingGroup(code, count, tuple(self._lines[code])) for code, count in self._counts.items()]
        return tuple(sorted(found, key=rank))


def tally_of(findings: Sequence[Finding]) -> Tally:
    """A tally of a few findings that are there already."""
    tally = Tally()
    for finding in findings:
        tally.add(finding)
    return tally


def gravity(finding: Finding) -> int:
    """Where a finding stands: 0 for the gravest."""
    return SEVERITIES.index(kind_of(finding.code).severity)


def rank(group: FindingGroup) -> tuple[int, int, str]:
    """Where a group stands among others: the gravest first, then the most frequent, then by name."""
    return SEVERITIES.index(kind_of(group.code).severity), -group.count, group.code


def as_page() -> str:
    """The table of docs/audit.md."""
    lines = ["| Code | Severity | Meaning | What to do |", "|---|---|---|---|"]
    lines += [
        f"| `{code}` | {kind.severity} | {kind.meaning} | {kind.advice} |" for code, kind in KINDS.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_page(), end="")
