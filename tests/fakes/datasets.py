"""What datasets needs from models, in memory."""

from __future__ import annotations

import hashlib
import json

from lathe.common.errors import NotFound
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.model import BaseModelInfo, TokenizerFile
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import CHATML, tiny_tokenizer_config, tiny_tokenizer_json


class FakeBaseModels:
    """BaseModels with what was added to it."""

    def __init__(self) -> None:
        self.models: dict[str, BaseModelInfo] = {}

    async def resolve(self, project: str, base_model: str) -> BaseModelInfo:
        if base_model not in self.models:
            raise NotFound(f"The model {base_model!r} was not found.", reason="MODEL_NOT_FOUND")
        return self.models[base_model]

    async def add_tiny(
        self,
        objects: ObjectStore,
        *,
        name: str = "baseModels/tiny",
        context_length: int = 512,
        template: str = CHATML,
    ) -> BaseModelInfo:
        """A base model with the tiny tokenizer, its files put into the store."""
        config = tiny_tokenizer_config(template)
        contents = {
            "tokenizer.json": tiny_tokenizer_json().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
        files = []
        for path, content in contents.items():
            sha256 = hashlib.sha256(content).hexdigest()
            key = f"basemodels/files/{sha256}"
            await objects.put(key, content)
            files.append(TokenizerFile(path, key, sha256))
        tokenizer = Tokenizer.from_files(contents["tokenizer.json"], config)
        self.models[name] = BaseModelInfo(
            name=name,
            tokenizer_digest=tokenizer.digest,
            template_digest=tokenizer.template_digest,
            context_length=context_length,
            tunable=True,
            not_tunable_reason="",
            files=tuple(files),
        )
        return self.models[name]
