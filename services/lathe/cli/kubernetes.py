"""`lathe doctor --kubernetes`: what the pods of an installation say, when nothing answers yet.

`kubectl` is asked for JSON, and pure functions make findings of it: the cluster is only read.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lathe.cli.examination import Checked
from lathe.cli.podstate import ClusterState, findings, logs_wanted, of_release
from lathe.common.errors import FailedPrecondition, InvalidArgument, Unavailable

_KUBECTL_S = 20.0
_LOG_LINES = 3


@dataclass(frozen=True, slots=True)
class Kubectl:
    """The command, on one namespace."""

    namespace: str

    def items(self, kinds: str, *, namespaced: bool = True) -> Sequence[Mapping[str, Any]]:
        """All objects of these kinds. Raises Unavailable, FailedPrecondition."""
        where = ("-n", self.namespace) if namespaced else ()
        found: list[Mapping[str, Any]] = json.loads(self._run("get", kinds, *where, "-o", "json"))["items"]
        return found

    def last_lines(self, pod: str, container: str, *, previous: bool) -> str:
        """The end of a container's log. Raises Unavailable when there is none (any more)."""
        flags = ("--previous",) if previous else ()
        return self._run("logs", pod, "-c", container, "-n", self.namespace, f"--tail={_LOG_LINES}", *flags)

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                ["kubectl", *arguments], capture_output=True, text=True, timeout=_KUBECTL_S, check=False
            )
        except FileNotFoundError as error:
            raise FailedPrecondition("kubectl is not there: install it, or put it on PATH.") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(
                f"kubectl {arguments[0]} did not answer within {_KUBECTL_S:.0f} seconds."
            ) from error
        if done.returncode:
            raise Unavailable(f"kubectl {' '.join(arguments[:2])} failed: {said(done.stderr)}")
        return done.stdout


def said(stderr: str) -> str:
    """What kubectl said, each line once: asked for several kinds, it says the same of each."""
    return " ".join(dict.fromkeys(line.strip() for line in stderr.splitlines() if line.strip()))


def examine_kubernetes(place: str) -> Iterator[Checked]:
    """Findings on `NAMESPACE` or `NAMESPACE/RELEASE`. Raises InvalidArgument, Unavailable, FailedPrecondition."""
    namespace, _, release = place.partition("/")
    if not namespace:
        raise InvalidArgument(f"{place!r} names no namespace: give NAMESPACE or NAMESPACE/RELEASE.")
    kubectl = Kubectl(namespace)
    state = read_state(kubectl, release)
    for finding in findings(state, namespace, release):
        yield Checked("cluster", finding)


def read_state(kubectl: Kubectl, release: str) -> ClusterState:
    """What kubectl tells of a release (every release of the namespace if empty)."""
    objects = kubectl.items("pods,deployments,statefulsets,jobs,persistentvolumeclaims,events")
    try:
        classes: Sequence[Mapping[str, Any]] | None = kubectl.items("storageclasses", namespaced=False)
    except Unavailable:
        # They belong to the cluster, which not everybody may read.
        classes = None
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for one in objects:
        if one["kind"] == "Event" or of_release(one, release):
            by_kind.setdefault(one["kind"], []).append(one)
    pods = by_kind.get("Pod", [])
    return ClusterState(
        pods=pods,
        owners=[one for kind in ("Deployment", "StatefulSet", "Job") for one in by_kind.get(kind, [])],
        claims=by_kind.get("PersistentVolumeClaim", []),
        events=by_kind.get("Event", []),
        storage_classes=classes,
        logs={key: _log(kubectl, *key, previous) for key, previous in logs_wanted(pods).items()},
    )


def _log(kubectl: Kubectl, pod: str, container: str, previous: bool) -> str:
    try:
        return kubectl.last_lines(pod, container, previous=previous)
    except Unavailable:
        # The container is gone with its log; what the pod's status says has to do.
        return ""
