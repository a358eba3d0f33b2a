"""The texts on which an export is measured: given ones, or a few that ask for different kinds of answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common.errors import InvalidArgument
from lathe.text.chat import parse_messages
from lathe.text.decoding import decode_json
from lathe.text.errors import RowError, TemplateError
from lathe.text.render import prepare
from lathe.text.tokenizer import Tokenizer

ROWS = 16
ROW_TOKENS = 512
# Greedy answers and divergences run llama.cpp token by token: on the first few only.
PROMPTS = 4
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences what a binary search does.",
    "Give me a JSON object with a name and an age.",
)


@dataclass(frozen=True, slots=True)
class Probe:
    """prompt: rendered, up to where an answer begins; row: the prompt, with the answer where one was given.
    messages: what the prompt was rendered from, none for plain text."""

    prompt: str
    row: str
    messages: tuple[Mapping[str, Any], ...] = ()


def default_probes(tokenizer: Tokenizer) -> list[Probe]:
    """Rendered with the chat template where there is one."""
    if not tokenizer.has_template:
        return [Probe(question, question) for question in QUESTIONS]
    return [_chat(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


def read_probes(path: Path, tokenizer: Tokenizer) -> list[Probe]:
    """The first rows of a file: a line is a chat row (a JSON object with `messages`) or plain text.

    Raises InvalidArgument naming the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            probes = list(_probes(file, tokenizer, path.name))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}.") from error
    if not probes:
        raise InvalidArgument(f"{path.name} holds no text; give a line each of chat rows or plain text.")
    return probes


def _probes(lines: Iterable[str], tokenizer: Tokenizer, name: str) -> Iterable[Probe]:
    found = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _probe(line.strip(), tokenizer)
        except (RowError, TemplateError) as error:
            raise InvalidArgument(f"{name}, line {number}: {error}") from error
        found += 1
        if found == ROWS:
            return


def _probe(line: str, tokenizer: Tokenizer) -> Probe:
    if not line.startswith("{"):
        return Probe(line, line)
    row = decode_json(line.encode())
    if not isinstance(row, dict) or "messages" not in row:
        raise RowError("messages", "missing_messages_list", "the row has no list of messages")
    return _chat(tokenizer, parse_messages(row["messages"]).messages)


def _chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Probe:
    prepared = prepare(messages, tokenizer.template)
    asked = prepared[:-1] if len(prepared) > 1 and prepared[-1]["role"] == "assistant" else prepared
    prompt = tokenizer.template.render(asked, add_generation_prompt=True)
    row = prompt if asked is prepared else tokenizer.template.render(prepared)
    return Probe(prompt, row, tuple(asked))


def rows_of(tokenizer: Tokenizer, probes: Sequence[Probe]) -> list[list[int]]:
    """Ids of the rows, long ones cut."""
    return [ids for probe in probes if (ids := tokenizer.encode(probe.row)[:ROW_TOKENS])]
