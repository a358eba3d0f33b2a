"""What the gateway needs from outside."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol, TypeVar

from lathe.common.rpc.principal import Principal
from lathe.gateway.model import (
    BaseModelRef,
    EngineInfo,
    SampleCall,
    SampleEvent,
    ServedModel,
    StoredUpload,
    UploadTarget,
)
from lathe.text.tokenizer import Tokenizer

Committed_co = TypeVar("Committed_co", covariant=True)


class KeyService(Protocol):
    """Knows API keys."""

    async def authenticate(self, secret: str) -> Principal:
        """Whose key it is. Raises Unauthenticated for unknown and revoked keys alike, Unavailable."""
        ...


class ModelResolver(Protocol):
    """Knows what model ids mean."""

    async def resolve(self, principal: Principal, model_id: str) -> ServedModel:
        """Raises NotFound for what means nothing in the principal's project, Unavailable."""
        ...


class TokenizerSource(Protocol):
    """Gives the tokenizer of a base model."""

    async def get(self, base: BaseModelRef) -> Tokenizer:
        """Raises Unavailable while the store is away, FailedPrecondition for a model without tokenizer."""
        ...


class EngineFeed(Protocol):
    """Knows which engines serve, and has more of them started."""

    def watch(self) -> AsyncIterator[tuple[EngineInfo, ...]]:
        """The whole list at once and whenever it changed. Raises LatheError when the stream breaks."""
        ...

    async def ensure(self, base_model: str) -> bool:
        """Ask for an engine of `baseModels/{id}`; true if there is one already."""
        ...


class EngineConnector(Protocol):
    """Samples on engines."""

    def sample(self, address: str, call: SampleCall) -> AsyncGenerator[SampleEvent, None]:
        """Closing the generator frees the sequence. Raises LatheError; Unavailable if the engine is lost."""
        ...

    async def keep_only(self, addresses: set[str]) -> None:
        """Close the connections to all other engines."""
        ...


class DatasetOwner(Protocol[Committed_co]):
    """The datasets service as uploads need it."""

    async def target(self, principal: Principal, name: str) -> UploadTarget:
        """Where the dataset's bytes go. Raises NotFound."""
        ...

    async def commit(self, principal: Principal, name: str, upload: StoredUpload) -> Committed_co:
        """Hand a finished upload over."""
        ...

    async def blob_key(self, principal: Principal, name: str) -> str:
        """The object with the dataset's bytes. Raises NotFound, FailedPrecondition while there is none."""
        ...


class ModelOwner(Protocol[Committed_co]):
    """The models service as uploads need it."""

    async def check(self, principal: Principal, base_model: str, path: str) -> None:
        """Raises NotFound or InvalidArgument when the import does not name this file."""
        ...

    async def commit(
        self, principal: Principal, base_model: str, path: str, upload: StoredUpload
    ) -> Committed_co:
        """Hand one uploaded file over."""
        ...
