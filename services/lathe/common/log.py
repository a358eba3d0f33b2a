"""Logging: JSON lines for a cluster, readable lines for a terminal. Secrets are blotted out in both."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

# API keys, bearer tokens, passwords in URLs, and anything logged as `secret=…` or `"secret_key": "…"`.
_SECRETS = (
    (re.compile(r"sk-lathe-[A-Za-z0-9_-]+"), "sk-lathe-***"),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]+"), r"\1***"),
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+(@)"), r"\1***\2"),
    (
        re.compile(
            r"(?i)([\w-]*(?:secret|password|token|api[_-]?key|access[_-]?key)[\w-]*['\"]?\s*[=:]\s*['\"]?)[^\s'\",}&]+"
        ),
        r"\1***",
    ),
)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET_FIELD = re.compile(r"(?i)secret|password|authorization|api[_-]?key|access[_-]?key|(^|_)token$")


def redact(text: str) -> str:
    """`text` with everything that looks like a secret blotted out."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def last_line(text: str) -> str:
    """The last line of a log that is not blank; of one in JSON its message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    return str(entry["message"]) if isinstance(entry, dict) and "message" in entry else line


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {
        key: "***" if _SECRET_FIELD.search(key) else redact(value) if isinstance(value, str) else value
        for key, value in vars(record).items()
        if key not in _STANDARD and not key.startswith("_")
    }


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, what `extra=` held, and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
            **_extra(record),
        }
        if record.exc_info:
            entry["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(entry, default=lambda value: redact(str(value)), ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """`12:00:00 INFO lathe.jobs message key=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line, _, trace = super().format(record).partition("\n")
        extra = "".join(f" {key}={value}" for key, value in _extra(record).items())
        return redact(line) + extra + (f"\n{redact(trace)}" if trace else "")


def configure(
    level: str = "INFO", style: Literal["console", "json"] = "console", stream: TextIO | None = None
) -> None:
    """Send every logger's records to `stream` (standard error by default). Called once by each `main`."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else ConsoleFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # They log each statement, request or migration step at INFO, values included.
    for noisy in ("sqlalchemy", "alembic", "urllib3", "httpx", "httpcore", "asyncio", "aiosqlite"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
