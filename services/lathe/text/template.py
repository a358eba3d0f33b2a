"""Chat templates, rendered as transformers' apply_chat_template renders them, in a sandbox."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lathe.text.errors import TemplateError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 64 << 20
_MAX_REPEAT = 1 << 20
# Turns of all loops and calls of all macros in one rendering: some thousand times what a real row needs.
MAX_STEPS = 1_000_000
MAX_SECONDS = 20.0
# Unicode noncharacters mark what `{% generation %}` encloses: no text may hold them in interchange.
_START, _END = "\ufdd0", "\ufdd1"

NowFn = Callable[[], datetime]

TRAINING_DATE = datetime(2026, 1, 1)
"""What a template that writes the date reads of every row that is trained on. It is always the same, so that a row
gives the same tokens whenever it is audited: rows of files that were audited on different days are compared by them."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: transformers' marker of what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)
    marked = False

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
        return f"{_START}{caller()}{_END}" if self.marked else caller()


class _MarkedGeneration(_Generation):
    marked = True


class _Budget:
    """What one rendering may still spend. now: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._end = now() + MAX_SECONDS
        self._steps = MAX_STEPS

    def spend(self) -> None:
        """One step. Raises TemplateError when there is nothing left."""
        self._steps -= 1
        if self._steps < 0:
            raise TemplateError(f"the chat template takes too many steps; {MAX_STEPS} are allowed")
        if self._now() > self._end:
            raise TemplateError(f"the chat template takes longer than {MAX_SECONDS:.0f} seconds")


# Of the rendering that runs in this thread or task: compiled templates are shared by many.
_BUDGET: ContextVar[_Budget] = ContextVar("lathe_template_budget")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with `*` and `**` bounded so that one expression cannot fill the memory, and with every turn of
    a loop and every call of a macro counted: the sandbox bounds one range, not loops within loops."""

    intercepted_binops = frozenset({"*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_tick(), lineno=loop.lineno))
            if loop.test is not None:
                # What a condition leaves out never reaches the body.
                loop.test = nodes.And(_tick(), loop.test, lineno=loop.lineno)
        for macro in tree.find_all(nodes.Macro):
            macro.body.insert(0, nodes.ExprStmt(_tick(), lineno=macro.lineno))
        for block in tree.find_all(nodes.CallBlock):
            block.body.insert(0, nodes.ExprStmt(_tick(), lineno=block.lineno))
        tree.set_environment(self)
        return tree

    @property
    def tick(self) -> bool:
        """Counts one step of the running rendering; compiled into every loop and macro. It is read and not called: a
        call goes through the sandbox, which takes ten times as long."""
        _BUDGET.get().spend()
        return True

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise TemplateError("the chat template raises a number to too high a power")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and len(value) * max(times, 0) > _MAX_REPEAT:
                    raise TemplateError("the chat template repeats a text too often")
        return super().call_binop(context, operator, left, right)


def _tick() -> nodes.EnvironmentAttribute:
    return nodes.EnvironmentAttribute("tick")


class _TemplateDict:
    """`dict(…)` without the class itself, whose attributes could lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _TemplateNamespace(Namespace):
    """`namespace(…)` that holds no underscore names, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named self: `namespace(self=…)` is a template's right.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_namespace_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_namespace_name(name)
        super().__setitem__(name, value)


def _check_namespace_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a chat template cannot store the underscore name {name!r} in a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment(generation: type[_Generation]) -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    return environment


class ChatTemplate:
    """One compiled chat template.

    source: the Jinja source; tool_source: the one for conversations with tools, where a model has two.
    special_tokens: what the template sees beside the messages (`bos_token`, `eos_token`, …).
    now: what `strftime_now` reads (transformers reads the local clock). monotonic: seconds, to stop what does not end.
    Raises TemplateError when the source does not compile or is longer than MAX_TEMPLATE_CHARS.
    """

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        tool_source: str | None = None,
        now: NowFn = datetime.now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self._monotonic = monotonic
        self.tool_source = tool_source
        self.now: NowFn = now
        self._variables: dict[str, str] = dict(special_tokens or {})
        if bos_token is not None:
            self._variables["bos_token"] = bos_token
        if eos_token is not None:
            self._variables["eos_token"] = eos_token
        self._plain = _compile(source, _Generation)
        self._plain_tools = None if tool_source is None else _compile(tool_source, _Generation)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return dict(self._variables)

    @property
    def has_generation_markers(self) -> bool:
        return any("endgeneration" in source for source in (self.source, self.tool_source or ""))

    @property
    def knows_developer(self) -> bool:
        """Whether the template treats the role `developer` in its own way."""
        return "developer" in self.source

    @cached_property
    def _marked(self) -> tuple[jinja2.Template, jinja2.Template | None]:
        tools = None if self.tool_source is None else _compile(self.tool_source, _MarkedGeneration)
        return _compile(self.source, _MarkedGeneration), tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        *,
        now: datetime | None = None,
    ) -> str:
        """The conversation as text. `now` fixes the time for several renderings of one conversation.
        Raises TemplateError with the template's own words when it refuses the conversation."""
        template = self._plain if tools is None or self._plain_tools is None else self._plain_tools
        return self._render(template, messages, tools, add_generation_prompt, now)

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        now: datetime | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the half-open character spans that `{% generation %}` encloses, in order."""
        plain, with_tools = self._marked
        template = plain if tools is None or with_tools is None else with_tools
        marked = self._render(template, messages, tools, False, now)
        if marked.count(_START) != marked.count(_END):
            raise TemplateError(
                "the conversation holds the Unicode noncharacters U+FDD0 or U+FDD1; remove them"
            )
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        position = 0
        for index, piece in enumerate(marked.split(_START)):
            inside, end, outside = piece.partition(_END)
            if (index == 0) == bool(end):
                raise TemplateError("the generation blocks of the chat template are nested")
            if index:
                spans.append((position, position + len(inside)))
            pieces += [inside, outside]
            position += len(inside) + len(outside)
        return "".join(pieces), spans

    def _render(
        self,
        template: jinja2.Template,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        now: datetime | None,
    ) -> str:
        moment = now if now is not None else self.now()
        variables: dict[str, Any] = {
            **self._variables,
            # As apply_chat_template does: a key that is null is a key that is not there.
            "messages": [{k: v for k, v in message.items() if v is not None} for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": moment.strftime,
        }
        pieces: list[str] = []
        size = 0
        outer = _BUDGET.set(_Budget(self._monotonic))
        try:
            for piece in template.generate(variables):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise TemplateError(f"the chat template wrote more than {MAX_RENDERED_CHARS} characters")
                pieces.append(piece)
        except TemplateError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(error.message or str(error) or type(error).__name__) from error
        except Exception as error:
            # A template is a program: what it trips over (a missing key, a wrong type) is in the row.
            raise TemplateError(f"the chat template failed on this conversation: {error}") from error
        finally:
            _BUDGET.reset(outer)
        return "".join(pieces)


def _compile(source: str, generation: type[_Generation]) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters")
    try:
        template = _environment(generation).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template does not compile: line {error.lineno}: {error.message}"
        ) from error
    except RecursionError as error:
        raise TemplateError("the chat template does not compile: nested too deeply") from error
    # Copied for each rendering: a chain of maps takes five times as long as a dict.
    template.globals = dict(template.globals)
    return template
