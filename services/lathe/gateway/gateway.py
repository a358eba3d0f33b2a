"""The collaborators of the gateway, as its HTTP door gets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lathe.common.clock import Clock
from lathe.common.ids import IdFactory
from lathe.common.metrics import Metrics
from lathe.gateway.auth import Authenticator
from lathe.gateway.engines import EngineDirectory
from lathe.gateway.inference import Inference
from lathe.gateway.model_downloads import ModelDownloads
from lathe.gateway.model_uploads import ModelUploads
from lathe.gateway.peers import Peers
from lathe.gateway.ports import IdempotencyStore
from lathe.gateway.service import DeploymentService
from lathe.gateway.settings import GatewaySettings
from lathe.gateway.uploads import DatasetUploads
from lathe.v1 import datasets_pb2, models_pb2


@dataclass(frozen=True, slots=True)
class Gateway:
    """Everything behind the doors. grpc_port is the bound one. draining: whether the process is about to stop."""

    settings: GatewaySettings
    clock: Clock
    ids: IdFactory
    metrics: Metrics
    authenticator: Authenticator
    peers: Peers
    datasets: DatasetUploads[datasets_pb2.Dataset]
    models: ModelUploads[models_pb2.ModelFile]
    model_downloads: ModelDownloads
    inference: Inference
    deployments: DeploymentService
    idempotency: IdempotencyStore
    engines: EngineDirectory
    grpc_port: int
    version: str
    draining: Callable[[], bool] = lambda: False
