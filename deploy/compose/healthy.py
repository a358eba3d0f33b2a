"""Exits with 0 if the service of this container is healthy: gRPC's health check on the port without TLS."""

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

with grpc.insecure_channel("127.0.0.1:7461") as channel:
    try:
        status = HealthStub(channel).Check(HealthCheckRequest(), timeout=3).status
    except grpc.RpcError as error:
        sys.exit(f"not healthy: {error.details()}")  # type: ignore[attr-defined]
sys.exit(
    0
    if status == HealthCheckResponse.SERVING
    else f"not healthy: {HealthCheckResponse.ServingStatus.Name(status)}"
)
