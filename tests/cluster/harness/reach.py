"""Who reaches whom: connections tried from inside pods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tests.cluster.harness.kubectl import Kubectl, Object
from tests.cluster.harness.release import Release

# Tries every host:port given, side by side; prints those that took the connection.
TRY = """
import concurrent.futures, json, socket, sys

def opens(target):
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.5).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return True

targets = sys.argv[1:]
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps([t for t, open in zip(targets, pool.map(opens, targets)) if open]))
"""
PORTS = {
    "accounts": (7460, 9090),
    "datasets": (7460, 9090),
    "models": (7460, 9090),
    "jobs": (7460, 9090),
    "gateway": (7460, 8080, 9090),
    "engine": (7460, 9090, 6379, 8265, 10001),
    "postgres": (5432,),
    "seaweedfs": (8333,),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A port of a component's pod."""

    component: str
    port: int
    address: str

    @property
    def place(self) -> str:
        return f"{self.address}:{self.port}"


def targets(release: Release) -> list[Target]:
    """Every port of every component that is ready: another pod of it may be on its way out."""
    found = []
    for component, ports in PORTS.items():
        for pod in release.ready_pods(component)[:1]:
            found += [Target(component, port, pod["status"]["podIP"]) for port in ports]
    return found


def reached(
    kubectl: Kubectl, pod: Object, chosen: Sequence[Target], container: str = ""
) -> set[tuple[str, int]]:
    """The (component, port) that the pod reaches. A refused connection has got through."""
    answer = kubectl.exec(
        pod["metadata"]["name"], "python", "-c", TRY, *(one.place for one in chosen), container=container
    )
    places = set(json.loads(answer))
    return {(one.component, one.port) for one in chosen if one.place in places}


def stranger(namespace: str, image: str) -> Object:
    """A pod that is none of Lathe's, with Python in it."""
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "stranger",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", "import time; time.sleep(3600)"],
        "securityContext": security,
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}},
    }
    spec = {
        "containers": [container],
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    metadata = {"name": "stranger", "namespace": namespace, "labels": {"app": "stranger"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
