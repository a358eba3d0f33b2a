"""Everything that is in a namespace."""

from __future__ import annotations

from tests.cluster.harness.kubectl import Kubectl, Object

# What happened, and figures about pods: neither is an object that somebody made.
NO_OBJECTS = {"events", "events.events.k8s.io", "pods.metrics.k8s.io"}
# Kubernetes itself puts them into every namespace.
EVERYWHERE = {"configmap/kube-root-ca.crt", "serviceaccount/default"}


def inventory(kubectl: Kubectl) -> dict[str, Object]:
    """Every object of the namespace, of whatever kind the cluster knows, as `kind/name`."""
    kinds = kubectl.run("api-resources", "--verbs=list", "--namespaced", "-o", "name").split()
    found = kubectl.items(",".join(kind for kind in kinds if kind not in NO_OBJECTS))
    named = {f"{item['kind'].lower()}/{item['metadata']['name']}": item for item in found}
    return {name: item for name, item in named.items() if name not in EVERYWHERE}


def versions(objects: dict[str, Object], *but: str) -> dict[str, str]:
    """What changes with any change of an object, without those of some kinds."""
    return {
        name: item["metadata"]["resourceVersion"]
        for name, item in objects.items()
        if name.partition("/")[0] not in but
    }
