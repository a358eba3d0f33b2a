"""The models service over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe.common import names
from lathe.common.rpc.channel import call
from lathe.datasets.model import BaseModelInfo, TokenizerFile
from lathe.text.files import is_tokenizer_file
from lathe.v1 import models_pb2

if TYPE_CHECKING:
    # The generated code has these names for type checkers only.
    from lathe.v1.models_pb2_grpc import ModelsInternalServiceAsyncStub


class RpcBaseModels:
    """Implements ports.BaseModels."""

    def __init__(self, internal: ModelsInternalServiceAsyncStub) -> None:
        self._internal = internal

    async def resolve(self, project: str, base_model: str) -> BaseModelInfo:
        request = models_pb2.ResolveModelRequest(project=names.PROJECT.format(project), model_id=base_model)
        base = (await call(self._internal.ResolveModel, request)).base_model
        return BaseModelInfo(
            name=base.name,
            tokenizer_digest=base.tokenizer_digest,
            template_digest=base.template_digest,
            context_length=base.context_length,
            tunable=base.tunable,
            not_tunable_reason=base.not_tunable_reason,
            files=tuple(
                TokenizerFile(file.path, file.object_key, file.sha256)
                for file in base.files
                if is_tokenizer_file(file.path)
            ),
        )
