"""Every `lathe …` that the README and docs/ show is a command with these options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import typer

from lathe.cli import main

ROOT = Path(__file__).parents[3]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "charts").rglob("*.md")))
_INNER = re.compile(r"\$\([^)]*\)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of each command in the page's blocks of shell, without what stands in $(…)."""
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    for block in (block for language, block in blocks if language in ("", "sh", "bash")):
        for line in _INNER.sub("…", block.replace("\\\n", " ")).splitlines():
            if "lathe " in line:
                yield from _commands(line)


def _commands(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    for piped, words in groupby(lexer, key=lambda word: word.strip("|&;") == ""):
        command, *rest = words
        if not piped and command in ("lathe", ".venv/bin/lathe"):
            yield rest


SHOWN = [
    pytest.param(words, id=f"{page.name}:{' '.join(words)}") for page in PAGES for words in commands_of(page)
]


@pytest.mark.parametrize("words", SHOWN)
def test_a_documented_command_is_there_with_its_options(words: list[str]) -> None:
    command = typer.main.get_command(main.app)
    known = {option for one in command.params for option in one.opts}
    for word in words:
        inner = getattr(command, "commands", {})
        if not inner:
            break
        if not word.startswith("-") and word in inner:
            command = inner[word]
    assert not getattr(command, "commands", {}), f"no command: lathe {' '.join(words)}"
    known |= {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
    given = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z].*", word)}
    assert given <= known


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/preparation.md"])
def test_the_commands_of_a_page_are_seen(page: str) -> None:
    assert len(list(commands_of(ROOT / page))) > 5
