from __future__ import annotations

from datetime import datetime

import pytest

from lathe.text import template as module
from lathe.text.errors import TemplateError
from lathe.text.template import ChatTemplate
from tests.fixtures.templates import LLAMA3, MISTRAL

USER = {"role": "user", "content": "hi"}


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(TemplateError, match="conversation roles must alternate"):
        ChatTemplate(MISTRAL, "<s>", "</s>").render([USER, USER])


def test_time_is_an_argument() -> None:
    template = ChatTemplate(LLAMA3, "<s>", "</s>", now=lambda: datetime(2030, 1, 2))
    assert "02 Jan 2030" in template.render([USER])
    assert "03 Jan 2030" in template.render([USER], now=datetime(2030, 1, 3))


def test_json_is_not_escaped_for_html() -> None:
    assert ChatTemplate("{{ messages | tojson }}").render([{"a": "<é>"}]) == '[{"a": "<é>"}]'


def test_a_second_template_for_tools() -> None:
    template = ChatTemplate("plain", tool_source="tools")
    assert (template.render([USER]), template.render([USER], [{}])) == ("plain", "tools")


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ messages[0].missing + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ range(10000000) | length }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([USER])


def test_what_a_template_writes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(TemplateError, match="more than 1000 characters"):
        ChatTemplate("{% for i in range(99999) %}xxxxxxxx{% endfor %}").render([USER])


def test_generation_blocks() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    )
    text, spans = template.render_marked([USER, {"content": ""}, USER])
    assert (text, spans) == ("<hi><><hi>", [(1, 3), (5, 5), (7, 9)])
    assert template.render([USER]) == "<hi>"
    with pytest.raises(TemplateError, match="noncharacters"):
        template.render_marked([{"content": "\ufdd0"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in [[0] * 99] * 99 recursive %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_works_without_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lathe.text.template.MAX_STEPS", 5_000)
    with pytest.raises(TemplateError, match="too many steps"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_a_template_that_takes_too_long_is_stopped() -> None:
    time = iter(range(0, 10_000, 7))
    template = ChatTemplate("{% for a in range(9) %}{{ a }}{% endfor %}", monotonic=lambda: float(next(time)))
    with pytest.raises(TemplateError, match="20 seconds"):
        template.render([{"role": "user", "content": "x"}])
