"""What the gateway needs from outside."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol, TypeVar

from lathe.common.rpc.principal import Principal
from lathe.gateway.model import (
    AnnouncedFile,
    BaseModelRef,
    Deployment,
    EngineInfo,
    IdempotencyRow,
    PartTarget,
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


class DeploymentStore(Protocol):
    """The deployments that are kept, by full name."""

    async def add(self, deployment: Deployment, request_id: str) -> Deployment:
        """Keep a new one, or answer with the one that the same request_id made. Raises AlreadyExists."""
        ...

    async def get(self, name: str) -> Deployment | None: ...

    async def list(self, project: str, *, after: str, limit: int) -> Sequence[Deployment]:
        """By name, the ones after `after`."""
        ...

    async def update(self, deployment: Deployment, expected_version: int) -> bool:
        """Write it over `expected_version`; False if that is no longer the current one."""
        ...

    async def delete(self, name: str, expected_version: int | None) -> bool:
        """False if there is none of that name (and version, when given)."""
        ...


class IdempotencyStore(Protocol):
    """The creates at the HTTP door, so that a retry joins the first try."""

    async def begin(self, key_id: str, path: str, digest: str) -> IdempotencyRow:
        """A new row in state running."""
        ...

    async def finish(self, row_id: str, status: int, body: bytes) -> None:
        """Keep the answer."""
        ...

    async def discard(self, row_id: str) -> None:
        """Forget a try that a retry should do again."""
        ...

    async def newest(
        self, key_id: str, path: str, digest: str, *, within_s: float = 600
    ) -> IdempotencyRow | None:
        """The last such row that began within `within_s` seconds."""
        ...

    async def get(self, row_id: str) -> IdempotencyRow | None:
        """None once it was discarded or swept."""
        ...

    async def sweep(self, older_than_s: float) -> int:
        """Forget rows that are too old to be joined; how many there were."""
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

    async def get(self, principal: Principal, name: str) -> Committed_co:
        """The dataset as it is. Raises NotFound."""
        ...

    async def target(self, principal: Principal, name: str) -> UploadTarget:
        """Where the dataset's bytes go. Raises NotFound."""
        ...

    async def open_part(self, principal: Principal, name: str) -> PartTarget:
        """Where the next part of an upload in parts goes. Raises NotFound, FailedPrecondition when it is over."""
        ...

    async def commit(self, principal: Principal, name: str, upload: StoredUpload) -> Committed_co:
        """Hand a finished upload over."""
        ...

    async def blob_key(self, principal: Principal, name: str) -> str:
        """The object with the dataset's bytes. Raises NotFound, FailedPrecondition while there is none."""
        ...


class ModelOwner(Protocol[Committed_co]):
    """The models service as uploads need it."""

    async def announced(self, principal: Principal, base_model: str, path: str) -> AnnouncedFile:
        """What the import said of this file. Raises NotFound when it does not name it."""
        ...

    async def commit(
        self, principal: Principal, base_model: str, path: str, upload: StoredUpload
    ) -> Committed_co:
        """Hand one uploaded file over."""
        ...
