"""Of the conversations in every known layout the tokens are transformers', and what is trained is what TRL trains with
`assistant_only_loss`, through the real templates that TRL ships: one as its model has it, and one with markers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lathe.text.chat import Chat
from lathe.text.render import RenderOptions
from lathe.text.rows import parse_line
from lathe.text.sequences import Tokenised, tokenise_rows
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import build_tiny_tokenizer

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"
# Template -> (what ends a turn, other special tokens that it writes).
TEMPLATES = {
    "gemma3": ("<end_of_turn>", ("<start_of_turn>",)),
    "llama3": ("<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "phi3_5": ("<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")),
    "qwen2_5": ("<|im_end|>", ()),
    "qwen3_instruct_2507": ("<|im_end|>", ()),
}
BOS, EOS = "<s>", "<|endoftext|>"


def _template(name: str) -> str:
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def _folder(folder: Path, name: str) -> Path:
    build_tiny_tokenizer(folder, chat_template=None)
    end, others = TEMPLATES[name]
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, end, *others)])
    backend.save(str(folder / "tokenizer.json"))
    # Phi-3 writes its end of text behind the whole conversation.
    config = {"bos_token": BOS, "eos_token": EOS if name == "phi3_5" else end}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}), encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(_template(name), encoding="utf-8")
    return folder


def _chats() -> list[tuple[str, bytes, Chat]]:
    """The first rows of each file whose parts are conversations, all turns of the assistant trained."""
    found = []
    for path in sorted(FORMATS.glob("*.jsonl")):
        for line in path.read_bytes().splitlines()[:3]:
            content = parse_line(line).parts[0].content
            if not isinstance(content, Chat) or not any(content.weights):
                continue
            roles = [message["role"] for message in content.messages]
            if list(content.weights) == [int(role == "assistant") for role in roles]:
                found.append((path.stem, line, content))
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_trl_trains(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = _folder(tmp_path, name)
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))
    compared = set()
    for file, line, chat in _chats():
        (found,) = tokenise_rows(ours, [parse_line(line)], RenderOptions(65536))
        expected = _expected(theirs, chat, _template(f"{name}_training"))
        if expected is None:
            assert not isinstance(found, Tokenised), (file, "only transformers refuses it")
            continue
        assert isinstance(found, Tokenised), (file, found)
        _, example = found.sequences[0]
        assert example.tokens == expected["input_ids"], file
        marks = expected["assistant_masks"]
        assert not any(own and not mark for own, mark in zip(example.mask, marks, strict=True)), file
        # TRL trains white space around a turn besides, which is the prompt's or stands behind its end, as Phi's end of
        # text does.
        only_theirs = [
            theirs.decode([token])
            for token, own, mark in zip(example.tokens, example.mask, marks, strict=True)
            if mark and not own
        ]
        assert {text.strip() for text in only_theirs} <= ({"", EOS} if name == "phi3_5" else {""}), file
        compared.add(file)
    assert {"openai_chat", "alpaca", "sharegpt", "question_answer", "question_preference"} <= compared


def _expected(theirs: Any, chat: Chat, template: str) -> dict[str, list[int]] | None:
    """None where the model's template or the one with markers refuses the conversation."""
    # None of these templates knows the newer name of a system message.
    messages = [{**m, "role": "system" if m["role"] == "developer" else m["role"]} for m in chat.messages]
    tools = chat.tools and list(chat.tools)
    try:
        ids = theirs.apply_chat_template(messages, tools=tools)["input_ids"]
    except Exception:
        return None
    found: dict[str, list[int]] = theirs.apply_chat_template(
        messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == ids
    return found
