"""A tokenizer as a base model brings it, with its chat template and its stop tokens."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from lathe.text import pieces
from lathe.text.errors import TemplateError, TokenizerError
from lathe.text.stream import StreamDecoder, TokenBytes
from lathe.text.template import ChatTemplate

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_TRIMMING_PROCESSORS = frozenset({"ByteLevel", "RobertaProcessing"})


class Tokenizer:
    """Immutable; safe to share between threads.

    bos_id: None where the model has none.
    eos_id: the one that ends a text outside any chat; None where the model names none.
    eos_ids: every id that ends a turn, ascending: eos of tokenizer_config, generation_config and config, and
    the special token with which the chat template closes an assistant's turn.
    end_texts: these as texts.
    special_texts: the special tokens as a text would hold them.
    plain_added: id -> text of the added tokens, where they are recognised as they are written; None where a
    normaliser or word boundaries have a say.
    digest: SHA-256 over the canonical tokenizer.json, named special tokens and stop ids; template_digest:
    over the template's sources (of the empty string where there is none). Both lower-case hex.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None,
        configured_eos: Sequence[int],
        digest_source: bytes,
        *,
        places: pieces.Places | None,
    ) -> None:
        """places: where long texts may be cut, to be tokenised in pieces."""
        self._backend = backend
        self._places = places
        self._template = chat_template
        self._special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.special_texts: tuple[str, ...] = tuple(
            str(token.content) for token in added.values() if token.special
        )
        self._anchor_ids = frozenset(id_ for id_, token in added.items() if not token.single_word)
        normalizes = backend.normalizer is not None
        plain = not any(token.single_word or (normalizes and token.normalized) for token in added.values())
        # Found in a text as they are written, so that a text's and those among its ids correspond.
        self.plain_added: Mapping[int, str] | None = (
            {id_: str(token.content) for id_, token in added.items()} if plain else None
        )
        self.bos_id: int | None = self._named_id("bos_token")
        self.pad_id: int | None = self._named_id("pad_token")
        named = self._named_id("eos_token")
        self.eos_id: int | None = named if named is not None else next(iter(configured_eos), None)
        eos = {*configured_eos, named, self._end_of_turn()}
        self.eos_ids: tuple[int, ...] = tuple(sorted(id_ for id_ in eos if id_ is not None))
        self.end_texts: tuple[str, ...] = tuple(
            token for id_ in self.eos_ids if (token := self.token_of(id_))
        )
        # Ids need not be dense: what a model's embedding must hold is the highest one, plus one.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._encode_short = lru_cache(maxsize=256)(lambda text: tuple(self.encode(text)))
        canonical = json.dumps([self._special_tokens, list(self.eos_ids)], sort_keys=True).encode()
        self.digest: str = hashlib.sha256(digest_source + b"\n" + canonical).hexdigest()
        self.template_digest: str = hashlib.sha256(_template_bytes(chat_template)).hexdigest()

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Reads tokenizer.json, and tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
        generation_config.json and config.json where they exist. Raises TokenizerError or TemplateError."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"{folder.name} has no tokenizer.json; a fast tokenizer is needed")
        config = {
            **_read_json(folder / "special_tokens_map.json"),
            **_read_json(folder / "tokenizer_config.json"),
        }
        template: str | dict[str, str] | None = _read_template(folder, config)
        return cls.from_files(
            file.read_bytes(),
            config,
            template,
            generation_config=_read_json(folder / "generation_config.json"),
            config=_read_json(folder / "config.json"),
        )

    @classmethod
    def from_files(
        cls,
        tokenizer_json: bytes,
        tokenizer_config: Mapping[str, Any],
        chat_template: str | Mapping[str, str] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Tokenizer:
        """The same from contents. Raises TokenizerError or TemplateError.

        A chat template given apart wins over tokenizer_config's own; a mapping names several (`default`,
        `tool_use`).
        """
        try:
            parsed = json.loads(tokenizer_json)
        except ValueError as error:
            raise TokenizerError(f"tokenizer.json is not JSON: {error}") from None
        if not isinstance(parsed, dict):
            raise TokenizerError("tokenizer.json must be one JSON object")
        canonical = json.dumps(parsed, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
        text = (
            json.dumps(parsed, ensure_ascii=False) if _keep_spaces(parsed) else tokenizer_json.decode("utf-8")
        )
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the binding raises bare Exception
            raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        _add_missing_tokens(backend, tokenizer_config)
        special = {name: _token_text(tokenizer_config.get(name)) for name in _NAMED_TOKENS}
        known = {name: value for name, value in special.items() if value is not None}
        template = _chat_template(chat_template or _templates(tokenizer_config.get("chat_template")), known)
        eos = [*_eos_ids(generation_config), *_eos_ids(config)]
        places = pieces.places_of(parsed, backend.get_added_tokens_decoder().values())
        return cls(backend, known, template, eos, canonical, places=places)

    @property
    def template(self) -> ChatTemplate:
        """Raises TemplateError where the model has no chat template."""
        if self._template is None:
            raise TemplateError("the base model has no chat template")
        return self._template

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def anchor_ids(self) -> frozenset[int]:
        """Added tokens: text is split at them before all else, so the two sides of one do not influence each
        other's tokens."""
        return self._anchor_ids

    @cached_property
    def anchor(self) -> str:
        """An added token to put before a continuation, so that it is not tokenised as the beginning of a text
        (some tokenizers prepend a space there); empty where there is none."""
        for token in self._backend.get_added_tokens_decoder().values():
            if token.special and not (token.rstrip or token.single_word):
                return str(token.content)
        return ""

    @cached_property
    def document_prefix(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts before a text outside any chat: its bos, or nothing."""
        alone, whole = self.encode("a"), self.encode("a", add_special_tokens=True)
        places = (n for n in range(len(whole)) if whole[n : n + len(alone)] == alone)
        return tuple(whole[: next(places, 0)])

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a rendered text. Special tokens within the text are recognised, none is added by default."""
        if len(text) > pieces.SIZE and not add_special_tokens:
            return self.encode_batch([text])[0]
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. Cheaper than encode_spans: no offsets are made, and what is tokenised at once takes
        little memory where the texts can be cut."""
        ids: list[list[int]] = [[] for _ in texts]
        owned = ((owner, piece) for owner, text in enumerate(texts) for piece in self._cut(text))
        for group in pieces.grouped(owned):
            found = self._backend.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (owner, _), one in zip(group, found, strict=True):
                long = len(texts[owner]) > pieces.SIZE
                ids[owner] += map(self._numbers.__getitem__, one.ids) if long else one.ids
        return ids

    @cached_property
    def _numbers(self) -> Sequence[int]:
        """One object for each id: a long text has millions of tokens, and each would bring its own."""
        return list(range(self.vocab_size))

    def encode_spans(
        self, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[tokenizers.Encoding]:
        """As encode_batch, with offsets: characters of the text as given, spaces included in their token."""
        return list(self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens))

    def offsets(self, text: str) -> tuple[array[int], array[int]]:
        """The characters at which the tokens of a text begin, and those at which they end. Where a long text was cut a
        space may count to the token before or behind it."""
        starts, ends, base = array("q"), array("q"), 0
        left_out = 0 if self._places is None else self._places.left_out
        for piece in self._cut(text):
            found = self._backend.encode(piece, add_special_tokens=False).offsets
            starts.extend(base + start for start, _ in found)
            ends.extend(base + end for _, end in found)
            base += len(piece) + left_out
        return starts, ends

    def whole_bytes(self, text: str) -> int:
        """How much of a text has to be tokenised at once, in bytes of UTF-8: its longest stretch without a place to
        cut; 0 where it is short in any case."""
        return pieces.longest(self._cut(text)) if len(text) > pieces.MAX_BYTES // 4 else 0

    def _cut(self, text: str) -> Iterable[str]:
        return (text,) if self._places is None else self._places.cut(text)

    def encode_short(self, text: str) -> tuple[int, ...]:
        """As encode, remembered: for the few headers that every row has."""
        return self._encode_short(text) if len(text) <= 128 else tuple(self.encode(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_of(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_of(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, as bytes (logprobs show them)."""
        return self._token_bytes(token_id) or b""

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return StreamDecoder(
            self._token_bytes, skipped, lambda ids: self.decode(ids, skip_special_tokens=False)
        )

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        added = {id_: token.content for id_, token in self._backend.get_added_tokens_decoder().items()}
        decoder = (
            json.loads(self._backend.to_str()).get("decoder") if self._backend.decoder is not None else None
        )
        return TokenBytes(decoder, self.token_of, added)

    def _named_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self.id_of(token)

    def _end_of_turn(self) -> int | None:
        """The special token with which the template closes an assistant's turn: what a tuned model emits to
        stop, whatever its configuration calls eos."""
        if self._template is None:
            return None
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "lathe"}
        try:
            text = self._template.render([user, answer])
        except TemplateError:
            return None  # a template for special conversations only: the configured ids stand
        _, found, rest = text.rpartition("lathe")
        ids = self.encode(rest.lstrip()) if found else []
        return ids[0] if ids and ids[0] in self._special_ids else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise TokenizerError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path.name} must be one JSON object")
    return data


def _read_template(folder: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    """chat_template.jinja and additional_chat_templates win over tokenizer_config, as in transformers."""
    found = {
        path.stem: path.read_text("utf-8")
        for path in sorted(folder.glob("additional_chat_templates/*.jinja"))
    }
    main = folder / "chat_template.jinja"
    if main.is_file():
        found["default"] = main.read_text("utf-8")
    legacy = _read_json(folder / "chat_template.json").get("chat_template")
    return found or _templates(legacy) or _templates(config.get("chat_template"))


def _templates(value: object) -> dict[str, str] | None:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    return None


def _chat_template(given: str | Mapping[str, str] | None, special: Mapping[str, str]) -> ChatTemplate | None:
    if not given:
        return None
    sources = {"default": given} if isinstance(given, str) else dict(given)
    if "default" not in sources:
        names = ", ".join(sorted(sources))
        raise TemplateError(f"the model has chat templates named {names}, but none is the default")
    return ChatTemplate(sources["default"], special_tokens=special, tool_source=sources.get("tool_use"))


def _template_bytes(template: ChatTemplate | None) -> bytes:
    if template is None:
        return b""
    if template.tool_source is None:
        return template.source.encode()
    return json.dumps([template.source, template.tool_source], ensure_ascii=False).encode()


def _token_text(value: object) -> str | None:
    """A token in tokenizer_config is a string or an AddedToken as an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _eos_ids(config: Mapping[str, Any] | None) -> list[int]:
    value = (config or {}).get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [id_ for id_ in values if isinstance(id_, int) and not isinstance(id_, bool)]


def _keep_spaces(parsed: dict[str, Any]) -> bool:
    """Stops the post-processor from trimming spaces out of offsets; ids stay equal. True if it changed
    anything.

    A trimmed offset moves the start of a space token past it, and with it the edge of the loss mask.
    """
    processor = parsed.get("post_processor")
    changed = False
    for part in [processor, *((processor or {}).get("processors") or [])]:
        if isinstance(part, dict) and part.get("type") in _TRIMMING_PROCESSORS and part.get("trim_offsets"):
            part["trim_offsets"] = False
            changed = True
    return changed


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that tokenizer_config declares and tokenizer.json lacks; they must get the ids it declares."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, Mapping):
        return
    for id_, entry in sorted(
        ((int(key), value) for key, value in declared.items()), key=lambda pair: pair[0]
    ):
        content = _token_text(entry)
        if content is None or backend.token_to_id(content) is not None:
            continue
        flags = {
            key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry
        }
        token = tokenizers.AddedToken(content, special=bool(entry.get("special")), **flags)
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
        if backend.token_to_id(content) != id_:
            raise TokenizerError(
                f"tokenizer_config.json gives the token {content!r} the id {id_}, tokenizer.json leaves "
                f"{backend.token_to_id(content)} for it; save the tokenizer again with both files agreeing"
            )
