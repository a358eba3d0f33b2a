"""What a stored folder holds: configuration, tensors by their headers, tokenizer and template."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lathe.common.errors import LatheError
from lathe.common.objectstore.base import ObjectStore
from lathe.models import tensors
from lathe.models.model import BaseModel, Facts, ModelFile, bad_folder, refuse_remote_code
from lathe.models.tensors import Tensor
from lathe.text.families import describe
from lathe.text.files import is_tokenizer_file
from lathe.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# A configuration file is text that people wrote; a tokenizer.json may be large.
MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20
INDEX = "model.safetensors.index.json"


async def inspect(model: BaseModel, store: ObjectStore) -> Facts:
    """Check the whole folder and say what it is. Every file must be stored.

    Raises InvalidArgument naming the file that is wrong; what the store raises passes through.
    """
    documents = await _documents(model, store)
    refuse_remote_code(documents)
    config = documents["config.json"]
    shards = {
        file.path: await _header(file, store) for file in model.files if file.path.endswith(".safetensors")
    }
    found = tensors.merge_shards(shards, documents.get(INDEX))
    family = describe(config)
    if family.supported:
        tensors.check_required(config, found)
    tokenizer = await _tokenizer(model, store)
    if family.vocab_size and tokenizer.vocab_size > family.vocab_size:
        raise bad_folder(
            f"tokenizer.json has ids up to {tokenizer.vocab_size - 1}, but config.json's vocab_size is "
            f"{family.vocab_size}: tokenizer and weights do not belong together."
        )
    reason = family.reason or _weights_reason(found)
    return Facts(
        tokenizer_digest=tokenizer.digest,
        template_digest=tokenizer.template_digest,
        architecture=family.architecture,
        parameter_count=family.parameter_count or sum(tensor.elements for tensor in found.values()),
        context_length=family.context_length,
        tunable=not reason,
        not_tunable_reason=reason,
        methods=family.methods if not reason else (),
        target_modules=family.target_modules if not reason else (),
        chat_template=tokenizer.template.source if tokenizer.has_template else "",
    )


def _weights_reason(found: Mapping[str, Tensor]) -> str:
    strange = sorted({tensor.dtype for tensor in found.values()} - tensors.FLOATS)
    return (
        f"the weights are of type {', '.join(strange)}; LoRA needs bf16, fp16 or fp32 weights."
        if strange
        else ""
    )


async def _documents(model: BaseModel, store: ObjectStore) -> dict[str, dict[str, Any]]:
    """The JSON files that configure the model: path -> content."""
    documents: dict[str, dict[str, Any]] = {}
    for file in model.files:
        if not file.path.endswith(".json") or file.path in ("tokenizer.json", "vocab.json"):
            continue
        if file.size_bytes > MAX_CONFIG_BYTES:
            raise bad_folder(f"{file.path} has {file.size_bytes} bytes, too many for a configuration file.")
        try:
            content = json.loads(await store.get(file.object_key))
        except ValueError as error:
            raise bad_folder(f"{file.path} is not JSON: {error}.") from error
        if isinstance(content, dict):
            documents[file.path] = content
        elif file.path == "config.json":
            raise bad_folder("config.json must be one JSON object.")
    return documents


async def _header(file: ModelFile, store: ObjectStore) -> dict[str, Tensor]:
    first = await _read(store, file.object_key, 0, tensors.LENGTH_BYTES)
    length = tensors.header_length(file.path, first, file.size_bytes)
    header = await _read(store, file.object_key, tensors.LENGTH_BYTES, length)
    return await asyncio.to_thread(tensors.parse_header, file.path, header, file.size_bytes)


async def _read(store: ObjectStore, key: str, offset: int, length: int) -> bytes:
    return b"".join([chunk async for chunk in store.stream(key, offset=offset, length=length)])


async def _tokenizer(model: BaseModel, store: ObjectStore) -> Tokenizer:
    with tempfile.TemporaryDirectory(prefix="lathe-tokenizer-") as temporary:
        folder = Path(temporary)
        for file in filter(lambda file: is_tokenizer_file(file.path), model.files):
            if file.size_bytes > MAX_TOKENIZER_BYTES:
                raise bad_folder(f"{file.path} has {file.size_bytes} bytes, too many for a tokenizer.")
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            await store.fetch(file.object_key, target)
        return await asyncio.to_thread(_load, folder)


def _load(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_folder(folder)
    except LatheError as error:
        raise bad_folder(f"The tokenizer cannot be used: {error.message}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # Files of a shape that nobody writes: still the folder's fault, not the server's.
        log.info("A tokenizer was refused.", exc_info=True)
        raise bad_folder(f"The tokenizer's files cannot be read ({error!r}).") from error
