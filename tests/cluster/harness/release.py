"""One installed release: its pods, its addresses, its key, and what is in its store."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lathe.client import Client
from tests.cluster.harness.commands import until
from tests.cluster.harness.helm import Helm, Values
from tests.cluster.harness.kind import Kind
from tests.cluster.harness.kubectl import Kubectl, Object, node_address, ready
from tests.fixtures.platforms import Platform

SERVICES = ("accounts", "datasets", "models", "jobs", "gateway")
SERVERS = ("postgres", "seaweedfs")
READY_S = 180.0
# The object's bytes as base64, read by a pod that may reach the store.
READ_OBJECT = """
import asyncio, base64, sys
from lathe.common.objectstore.factory import open_store
from lathe.datasets.settings import DatasetsSettings

store = open_store(DatasetsSettings.load().store)
sys.stdout.write(base64.b64encode(asyncio.run(store.get(sys.argv[1]))).decode())
"""


@dataclass(frozen=True)
class Release:
    """`helm install name` in a namespace of the cluster."""

    kind: Kind
    helm: Helm
    kubectl: Kubectl
    name: str

    @property
    def namespace(self) -> str:
        return self.kubectl.namespace

    @property
    def full_name(self) -> str:
        """What the chart's objects begin with."""
        return self.name if "lathe" in self.name else f"{self.name}-lathe"

    # --- helm --------------------------------------------------------------------------------------------

    def make_namespace(self) -> None:
        """One that enforces the restricted pod security standard."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        metadata = {"name": self.namespace, "labels": labels}
        self.kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})

    def install(self, values: Values) -> float:
        """Seconds until everything was ready. Raises CommandFailed."""
        started = time.monotonic()
        self.helm.install(self.name, self.namespace, values)
        return time.monotonic() - started

    def upgrade(self, values: Values) -> None:
        self.helm.upgrade(self.name, self.namespace, values)

    # --- pods --------------------------------------------------------------------------------------------

    def selector(self, component: str) -> str:
        """Of a component's pods."""
        return f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component={component}"

    def pods(self, component: str) -> list[Object]:
        return self.kubectl.items("pods", self.selector(component))

    def ready_pods(self, component: str) -> list[Object]:
        return [pod for pod in self.pods(component) if ready(pod)]

    def pod(self, component: str) -> Object:
        """One that runs, the newest."""
        running = [
            pod
            for pod in self.pods(component)
            if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        assert running, f"no pod of {component} runs"
        return max(running, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def node_of(self, component: str) -> str:
        return str(self.pod(component)["spec"]["nodeName"])

    def wait_ready(self, timeout: float = READY_S) -> None:
        """Until every Deployment and StatefulSet of the chart has all its pods ready."""
        chart = f"app.kubernetes.io/instance={self.name},app.kubernetes.io/managed-by=Helm"
        workloads = self.kubectl.run("get", "deploy,statefulset", f"--selector={chart}", "-o", "name").split()
        assert workloads, f"{self.name} has no workloads in {self.namespace}"
        self.kubectl.rollout(*workloads, timeout=timeout)

    def engine_container(self, pod: Object) -> str:
        """The id of the container that holds the engine."""
        statuses = pod["status"]["containerStatuses"]
        chosen = next((one for one in statuses if one["name"] == "engine"), statuses[0])
        return str(chosen["containerID"]).rpartition("//")[2]

    def signal_engine(self, pod: Object, name: str) -> int:
        """Send a signal to the engine's own processes in a pod; how many there were."""
        return self.kind.signal(
            pod["spec"]["nodeName"], self.engine_container(pod), name, "lathe.engine.main"
        )

    # --- what a client needs ------------------------------------------------------------------------------

    def secret(self, name: str, key: str) -> str:
        data = self.kubectl.get("secret", f"{self.full_name}-{name}")["data"]
        return base64.b64decode(data[key]).decode()

    def address(self, port: str) -> str:
        """host:port of the gateway's Service, on the node that no test kills."""
        service = self.kubectl.get("service", f"{self.full_name}-gateway")
        number = next(one["nodePort"] for one in service["spec"]["ports"] if one["name"] == port)
        return f"{node_address(self.kubectl, self.kind.control_plane())}:{number}"

    def read_object(self, key: str) -> bytes:
        """Of the object store, through a service that may reach it."""
        target = f"deploy/{self.full_name}-datasets"
        return base64.b64decode(self.kubectl.exec(target, "python", "-c", READ_OBJECT, key))

    def platform(self) -> Platform:
        """As e2e tests know one."""
        return Platform(
            grpc=self.address("grpc"),
            http=f"http://{self.address('http')}",
            api_key=self.secret("bootstrap", "api-key"),
            read_object=self.read_object,
        )

    @contextmanager
    def client(self, timeout: float = 90.0) -> Iterator[Client]:
        """timeout: a call may wait until pods have come back."""
        platform = self.platform()
        with Client(platform.grpc, platform.api_key, timeout=timeout) as connected:
            yield connected

    def wait_for_engine(self, timeout: float = 180.0) -> Object:
        """The pod of an engine that runs."""
        return until(
            lambda: next((pod for pod in self.pods("engine") if ready(pod)), None), timeout, "an engine's pod"
        )


@contextmanager
def installed(release: Release, values: Values) -> Iterator[Release]:
    """A release in a namespace of its own; afterwards both are gone."""
    release.make_namespace()
    try:
        print(f"\n   helm install in {release.namespace}: {release.install(values):.0f} s", flush=True)
        yield release
    finally:
        # What it has beyond its namespace only helm takes away.
        if release.kubectl.exists("secret", f"sh.helm.release.v1.{release.name}.v1"):
            release.helm.uninstall(release.name, release.namespace)
        release.kubectl.run("delete", "namespace", release.namespace, "--wait=false")
