"""lathe.text gives the text and the ids that transformers' apply_chat_template gives."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import ByteLevel, TemplateProcessing

from lathe.text.errors import TemplateError
from lathe.text.render import Example, RenderOptions
from lathe.text.rows import parse_line
from lathe.text.sequences import Tokenised, tokenise_rows
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.templates import BOS, EOS, REAL, SPECIAL
from tests.fixtures.tiny import tiny_tokenizer_json

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather "now" & <here>, à Paris',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
SNIPPETS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "[INST]",
    "<|eot_id|>",
    "\n\n",
    "  ",
    "é",
    "你好",
    "🙂",
    "{% x %}",
    "<tool_call>",
]
TEXTS = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=12)), min_size=1, max_size=4).map(
    "".join
)
WORDS = TEXTS.filter(bool)
CALL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {
                "name": st.just("get_weather"),
                "arguments": st.dictionaries(TEXTS, st.one_of(TEXTS, st.integers()), max_size=2),
            }
        ),
    }
)


def _message(role: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"role": st.just(role), "content": TEXTS})


CALLING = st.fixed_dictionaries(
    {"role": st.just("assistant"), "tool_calls": st.lists(CALL, min_size=1, max_size=2)}
)
TURN = st.one_of(
    st.tuples(_message("user"), _message("assistant")),
    st.tuples(_message("user"), CALLING, _message("tool"), _message("assistant")),
    st.tuples(_message("user")),
)
CHATS = st.tuples(st.lists(_message("system"), max_size=1), st.lists(TURN, min_size=1, max_size=3)).map(
    lambda pair: [*pair[0], *(message for turn in pair[1] for message in turn)]
)


def _folder(root: Path, name: str) -> Path:
    backend = Backend.from_str(tiny_tokenizer_json())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = ByteLevel(trim_offsets=True)
    folder = root / name
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS[name], "eos_token": EOS[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(REAL[name], encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=sorted(REAL))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    folder = _folder(tmp_path_factory.mktemp("text"), request.param)
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))


@given(messages=CHATS, tools=st.sampled_from([None, TOOLS]), prompt=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_equal_text_and_ids(
    pair: tuple[Tokenizer, Any],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    prompt: bool,
) -> None:
    ours, theirs = pair
    try:
        expected = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
    except Exception as error:
        with pytest.raises(TemplateError) as refused:
            ours.template.render(messages, tools, prompt)
        assert str(error) in str(refused.value)
        return
    text = ours.template.render(messages, tools, prompt)
    assert text == expected
    ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.encode_batch([text, "x"])[0] == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_generation_markers_enclose_what_transformers_marks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    folder = _folder(tmp_path, "qwen")
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}] * 2
    found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    text, spans = ours.template.render_marked(messages)
    encoding = ours.encode_spans([text])[0]
    marked = [int(any(start <= place < end for start, end in spans)) for place, _ in encoding.offsets]
    assert (encoding.ids, marked) == (found["input_ids"], found["assistant_masks"])


def test_the_date_is_todays(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    messages = [{"role": "user", "content": "hi"}]
    text = ours.template.render(messages, now=datetime(2031, 2, 3))
    assert ("03 Feb 2031" in text) == ("strftime_now" in ours.template.source)


def _examples(tokenizer: Tokenizer, row: dict[str, Any]) -> list[Example]:
    (found,) = tokenise_rows(tokenizer, [parse_line(json.dumps(row).encode())], RenderOptions(4096))
    assert isinstance(found, Tokenised)
    return [example for _, example in found.sequences]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def documents(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    """A tokenizer that puts a bos before a text, as Llama's does, and one that does not, as Qwen's."""
    from transformers import AutoTokenizer

    folder = _folder(tmp_path_factory.mktemp("documents"), "llama3")
    if request.param:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        bos = BOS["llama3"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))


@given(text=WORDS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_text_is_what_transformers_tokenises_with_its_end(
    documents: tuple[Tokenizer, Any], text: str
) -> None:
    ours, theirs = documents
    ids = theirs(text)["input_ids"]
    (example,) = _examples(ours, {"text": text})
    assert example.tokens == (ids if ids[-1] == theirs.eos_token_id else [*ids, theirs.eos_token_id])
    trained = [index for index, mark in enumerate(example.mask) if mark]
    assert trained == list(range(max(1, len(ours.document_prefix)), len(example.tokens)))


@given(prompt=TEXTS, completion=WORDS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_completion_follows_the_prompt_as_transformers_tokenises_it(
    documents: tuple[Tokenizer, Any], prompt: str, completion: str
) -> None:
    ours, theirs = documents
    ids = theirs(prompt)["input_ids"]
    (example,) = _examples(ours, {"prompt": prompt, "completion": completion})
    assert example.tokens[: len(ids)] == ids
    first = max(1, len(ids))  # nothing precedes a text's first token
    assert example.mask == bytes(first) + b"\1" * (len(example.tokens) - first)
    text = theirs.decode(example.tokens, skip_special_tokens=False)
    assert text in (theirs.decode(ids) + completion, theirs.decode(ids) + completion + theirs.eos_token)


@given(user=WORDS, chosen=WORDS, rejected=WORDS)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_pair_is_the_prompt_and_what_the_template_writes_behind_it(
    pair: tuple[Tokenizer, Any], user: str, chosen: str, rejected: str
) -> None:
    ours, theirs = pair
    prompt = [{"role": "user", "content": user}]
    outputs = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    row = {"input": {"messages": prompt}, "preferred_output": outputs[0], "non_preferred_output": outputs[1]}
    texts = [theirs.apply_chat_template([*prompt, *output], tokenize=False) for output in outputs]
    if texts[0] == texts[1]:
        return
    ids = theirs.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    for example, text in zip(_examples(ours, row), texts, strict=True):
        assert example.tokens[: len(ids)] == ids and not any(example.mask[: len(ids)])
        assert example.mask[len(ids)]
        assert theirs.decode(example.tokens, skip_special_tokens=False) == text
