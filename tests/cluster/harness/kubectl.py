"""kubectl, as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.cluster.harness.commands import CommandFailed, run, until

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kubectl:
    """kubectl in one namespace."""

    kubeconfig: Path
    namespace: str = "default"

    def within(self, namespace: str) -> Kubectl:
        return replace(self, namespace=namespace)

    def run(self, *args: str | Path, stdin: str | None = None, timeout: float = 120.0) -> str:
        """Raises CommandFailed."""
        return run(*self.command(*args), stdin=stdin, timeout=timeout)

    def command(self, *args: str | Path) -> tuple[str, ...]:
        """The whole command line, for what is run otherwise."""
        where = ("kubectl", f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}")
        return (*where, *(str(word) for word in args))

    def get(self, *args: str) -> Object:
        """One object or a List."""
        found: Object = json.loads(self.run("get", *args, "-o", "json"))
        return found

    def items(self, kind: str, selector: str = "", *args: str) -> list[Object]:
        chosen = (f"--selector={selector}",) if selector else ()
        listed: list[Object] = self.get(kind, *chosen, *args)["items"]
        return listed

    def names(self, kind: str, selector: str = "") -> set[str]:
        return {item["metadata"]["name"] for item in self.items(kind, selector)}

    def exists(self, kind: str, name: str) -> bool:
        return bool(self.run("get", kind, name, "--ignore-not-found", "-o", "name").strip())

    def apply(self, *objects: Mapping[str, Any]) -> None:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.run("apply", "-f", "-", stdin=text)

    def exec(
        self, target: str, *argv: str, container: str = "", stdin: str | None = None, timeout: float = 60.0
    ) -> str:
        """target: a pod's name or deploy/NAME."""
        where = ("--container", container) if container else ()
        tty = ("--stdin",) if stdin is not None else ()
        return self.run("exec", *tty, target, *where, "--", *argv, stdin=stdin, timeout=timeout)

    def kill(self, pod: str) -> None:
        """The pod is gone at once, without a grace; if it has not gone by itself."""
        self.run("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false", "--ignore-not-found")

    def rollout(self, *workloads: str, timeout: float = 120.0) -> None:
        """Wait until each deploy/NAME or statefulset/NAME is as it should be."""
        for workload in workloads:
            self.run("rollout", "status", workload, f"--timeout={timeout:.0f}s", timeout=timeout + 10)

    def events(self) -> str:
        return self.run("get", "events", "--sort-by=.lastTimestamp")


def ready(pod: Object) -> bool:
    """Whether a pod takes calls, and will go on doing so."""
    conditions = {one["type"]: one["status"] for one in pod.get("status", {}).get("conditions", [])}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


def node_address(kubectl: Kubectl, node: str) -> str:
    """Where this machine reaches a node."""
    addresses = kubectl.get("node", node)["status"]["addresses"]
    return str(next(one["address"] for one in addresses if one["type"] == "InternalIP"))


def node_ready(kubectl: Kubectl, node: str) -> bool:
    return any(
        one["type"] == "Ready" and one["status"] == "True"
        for one in kubectl.get("node", node)["status"]["conditions"]
    )


def wait_for_node(kubectl: Kubectl, node: str, is_ready: bool, timeout: float = 120.0) -> None:
    until(
        lambda: node_ready(kubectl, node) is is_ready,
        timeout,
        f"{node} {'ready' if is_ready else 'not ready'}",
    )


def collect(kubectl: Kubectl, namespaces: Sequence[str], folder: Path) -> None:
    """What one wants to see after a failure: objects, events, and each container's log, also the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "nodes.txt", kubectl, "describe", "nodes")
    for namespace in namespaces:
        here, inside = folder / namespace, kubectl.within(namespace)
        here.mkdir(exist_ok=True)
        _write(
            here / "all.txt", inside, "get", "all,pvc,secrets,configmaps,networkpolicies,jobs", "-o", "wide"
        )
        _write(here / "ray.yaml", inside, "get", "rayjobs,rayclusters", "-o", "yaml")
        _write(here / "events.txt", inside, "get", "events", "--sort-by=.lastTimestamp")
        _write(here / "pods.txt", inside, "describe", "pods")
        for pod in inside.items("pods"):
            name = pod["metadata"]["name"]
            for container in _containers(pod):
                log = here / f"{name}.{container}.log"
                _write(log, inside, "logs", name, "-c", container, "--timestamps")
                _write(log.with_suffix(".previous.log"), inside, "logs", name, "-c", container, "--previous")


def _containers(pod: Object) -> list[str]:
    spec = pod["spec"]
    return [one["name"] for one in (*spec.get("initContainers", ()), *spec["containers"])]


def _write(path: Path, kubectl: Kubectl, *args: str) -> None:
    try:
        text = kubectl.run(*args, timeout=60)
    except CommandFailed as error:
        if path.name.endswith(".previous.log"):
            return  # there was none before
        text = str(error)
    path.write_text(text)
