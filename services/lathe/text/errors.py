"""What can be wrong with a row or with a template."""

from __future__ import annotations

from lathe.common.errors import FieldViolation, InvalidArgument


class RowError(InvalidArgument):
    """A row that cannot be used.

    field: path within the row (`messages[2].content`), empty for the row as a whole.
    code: stable lower-case code (`missing_content`), as the vendor's data-preparation notebook names them.
    Field and message may quote the row; they are cut, since a row may have any length.
    """

    default_reason = "INVALID_ROW"

    def __init__(self, field: str, code: str, message: str) -> None:
        field, message = _cut(field, 200), _cut(message, 500)
        super().__init__(
            f"{field}: {message}" if field else message,
            metadata={"field": field, "code": code},
            violations=(FieldViolation(field, message),) if field else (),
        )
        self.field = field
        self.code = code
        self.detail = message

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str]]:
        """Processes send it to each other."""
        return type(self), (self.field, self.code, self.detail)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


class TemplateError(InvalidArgument):
    """A chat template that does not compile, refuses a conversation, or writes too much."""

    default_reason = "CHAT_TEMPLATE"


class TokenizerError(InvalidArgument):
    """Tokenizer files that are missing or cannot be read."""

    default_reason = "TOKENIZER"
