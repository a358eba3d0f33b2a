"""Ollama's Modelfile: the chat template in Go's notation, and the strings that end a turn.

Ollama renders with its own templates, not with the model's. Ours is read off what the chat template makes of marked
messages, and is written only if it then makes the same of other conversations (white space around a message apart,
which some templates cut).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lathe.text.errors import TemplateError
from lathe.text.template import ChatTemplate
from lathe.text.tokenizer import Tokenizer

_S, _U, _A, _V = "«system»", "«user»", "«assistant»", "«again»"
_Turn = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Turns:
    """A chat template without conditions. default: what precedes a conversation without a system message; each role's
    text stands between its two strings (the system's first one holds what begins a conversation); `assistant[0]` opens
    the answer."""

    default: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: Sequence[_Turn]) -> str:
        """The conversation with the answer opened."""
        text = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = getattr(self, message["role"])
            text += before + message["content"] + after
        return text + self.assistant[0]


def modelfile(gguf_name: str, tokenizer: Tokenizer, *, bos_added: bool) -> str:
    """bos_added: llama.cpp puts the first token before a text by itself, so the template must not."""
    lines = [f"FROM ./{gguf_name}"]
    turns = read_turns(tokenizer.template) if tokenizer.has_template else None
    if turns is not None:
        lines.append(f'TEMPLATE """{_go(_without_bos(turns, tokenizer) if bos_added else turns)}"""')
    elif tokenizer.has_template:
        lines.append(
            "# The chat template says more than a Modelfile can; Ollama goes by the one inside the GGUF file where it "
            "knows it."
        )
    for id_ in tokenizer.eos_ids:
        token = tokenizer.token_of(id_)
        if token is not None and '"' not in token:
            lines.append(f'PARAMETER stop "{token}"')
    return "\n".join(lines) + "\n"


def read_turns(template: ChatTemplate) -> Turns | None:
    """None where the template does more than put strings around messages."""
    try:
        turns = _read(template)
        return turns if turns is not None and _same(template, turns) else None
    except TemplateError:
        return None


def _without_bos(turns: Turns, tokenizer: Tokenizer) -> Turns:
    bos = (tokenizer.token_of(tokenizer.bos_id) if tokenizer.bos_id is not None else None) or ""
    before, after = turns.system
    return replace(turns, default=turns.default.removeprefix(bos), system=(before.removeprefix(bos), after))


def _read(template: ChatTemplate) -> Turns | None:
    user, answer, again = _turn("user", _U), _turn("assistant", _A), _turn("user", _V)
    alone = _cut(template.render([user]), _U)
    answered = _cut(template.render([user, answer]), _U, _A)
    whole = _cut(template.render([user, answer, again]), _U, _A, _V)
    opened = _cut(template.render([user], add_generation_prompt=True), _U)
    systemic = _cut(template.render([_turn("system", _S), user]), _S, _U)
    if not (alone and answered and whole and opened and systemic):
        return None
    user_after = alone[1]
    answer_before, answer_after = opened[1].removeprefix(user_after), answered[2]
    user_before = whole[2].removeprefix(answer_after)
    system_after = systemic[1].removesuffix(user_before)
    default = alone[0].removesuffix(user_before)
    return Turns(
        default, (systemic[0], system_after), (user_before, user_after), (answer_before, answer_after)
    )


def _same(template: ChatTemplate, turns: Turns) -> bool:
    user, answer = _turn("user", "Is it\n so?"), _turn("assistant", "Yes.\n\nIt  is.")
    system = _turn("system", "Be brief.")
    conversations = ([user], [system, user], [user, answer, user], [system, user, answer, user, answer, user])
    pieces = [turns.default, *turns.system, *turns.user, *turns.assistant]
    return not any("{{" in piece or '"""' in piece for piece in pieces) and all(
        template.render(messages, add_generation_prompt=True) == turns.render(messages)
        for messages in conversations
    )


def _go(turns: Turns) -> str:
    """Go's template over Ollama's .Messages and .System. Every text is a quoted string: white space within actions is
    none of the template's."""

    def text(value: str) -> str:
        return f"{{{{ {_quoted(value)} }}}}" if value else ""

    def turn(role: str, before: str, after: str) -> str:
        return f'{{{{ if eq .Role "{role}" }}}}{text(before)}{{{{ .Content }}}}{text(after)}{{{{ end }}}}'

    default = f"{{{{ if not .System }}}}{text(turns.default)}{{{{ end }}}}" if turns.default else ""
    roles = "".join(turn(role, *getattr(turns, role)) for role in ("system", "user", "assistant"))
    return f"{default}{{{{ range .Messages }}}}{roles}{{{{ end }}}}{text(turns.assistant[0])}"


def _quoted(value: str) -> str:
    """A Go string literal within a Modelfile's triple quotes."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _cut(text: str, *marks: str) -> list[str] | None:
    """The pieces around the marks, each of which must be there once, in this order."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(piece)
    return [*pieces, text]
