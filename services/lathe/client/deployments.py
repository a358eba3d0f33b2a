"""Names that clients call, and what is behind them."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.field_mask_pb2 import FieldMask

from lathe.client.paging import pages
from lathe.client.transport import Transport, new_request_id
from lathe.v1 import deployments_pb2 as pb
from lathe.v1.deployments_pb2_grpc import DeploymentsServiceStub


class Deployments:
    """The deployments of the caller's project."""

    def __init__(self, transport: Transport, project: str) -> None:
        self._transport = transport
        self._project = project
        self._stub = DeploymentsServiceStub(transport.channel)

    def create(self, deployment_id: str, model_id: str) -> pb.Deployment:
        request = pb.CreateDeploymentRequest(
            parent=self._project,
            deployment_id=deployment_id,
            deployment=pb.Deployment(model_id=model_id),
            request_id=new_request_id(),
        )
        return self._transport.call(self._stub.CreateDeployment, request)

    def get(self, deployment_id: str) -> pb.Deployment:
        request = pb.GetDeploymentRequest(name=self._name(deployment_id))
        return self._transport.call(self._stub.GetDeployment, request)

    def list(self) -> Iterator[pb.Deployment]:
        request = pb.ListDeploymentsRequest(parent=self._project)
        return pages(self._transport, self._stub.ListDeployments, request, "deployments")

    def update(self, deployment_id: str, model_id: str, etag: str = "") -> pb.Deployment:
        """Put another model behind the name. With an etag, only if nobody changed it meanwhile (else Aborted)."""
        request = pb.UpdateDeploymentRequest(
            deployment=pb.Deployment(name=self._name(deployment_id), model_id=model_id, etag=etag),
            update_mask=FieldMask(paths=["model_id"]),
        )
        return self._transport.call(self._stub.UpdateDeployment, request)

    def delete(self, deployment_id: str) -> None:
        request = pb.DeleteDeploymentRequest(name=self._name(deployment_id))
        self._transport.call(self._stub.DeleteDeployment, request)

    def _name(self, deployment_id: str) -> str:
        return deployment_id if "/" in deployment_id else f"{self._project}/deployments/{deployment_id}"
