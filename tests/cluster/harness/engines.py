"""What jobs makes for engines, what KubeRay makes of that, and the ports of Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lathe.jobs.launchers.manifests import (
    ENGINE_LABEL,
    JOB_ANNOTATION,
    NODE_TYPE_LABEL,
    RELEASE_LABEL,
    object_name,
)
from tests.cluster.harness.kubectl import Kubectl, Object, ready
from tests.cluster.harness.release import Release

KINDS = "rayjobs,rayclusters,deployments,pods,services,secrets,jobs.batch"
RAY = frozenset({"RayJob", "RayCluster"})
GPU = "nvidia.com/gpu"
# Every port of Ray is asked twice, by somebody without the token and by one who has it. Prints {question: [both]}.
ASK_RAY = """
import json, os, urllib.error, urllib.request
import grpc

def get(path, token):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    asked = urllib.request.Request(f"http://{os.environ['POD_IP']}:8265{path}", headers=headers)
    try:
        return urllib.request.urlopen(asked, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code

def call(port, method, token):
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"{os.environ['POD_IP']}:{port}") as channel:
        ask = channel.unary_unary(method, lambda it: it, lambda it: it)
        try:
            ask(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"

token = os.environ["RAY_AUTH_TOKEN"]
answers = {f"8265 {path}": [get(path, who) for who in ("", "wrong", token)] for path in ("/api/jobs/", "/api/version")}
for port, method in ((6379, "NodeInfoGcsService/GetAllNodeInfo"), (10001, "RayletDriver/ClusterInfo")):
    answers[f"{port} {method}"] = [call(port, f"/ray.rpc.{method}", who) for who in ("", "wrong", token)]
print(json.dumps(answers))
"""


def made_for_engines(kubectl: Kubectl) -> list[Object]:
    """Everything in the namespace that is there for an engine, whoever made it."""
    return [one for one in kubectl.items(KINDS) if _of_an_engine(one)]


def _of_an_engine(one: Object) -> bool:
    labels = one["metadata"].get("labels") or {}
    owned_by_ray = RAY & {owner["kind"] for owner in _owners(one)}
    return one["kind"] in RAY or bool(owned_by_ray) or ENGINE_LABEL in labels or "ray.io/cluster" in labels


def names(objects: Sequence[Object]) -> list[str]:
    return sorted(f"{one['kind']}/{one['metadata']['name']}" for one in objects)


def first_owner(one: Object, others: Sequence[Object]) -> str:
    """KIND/NAME of that from which all of its owners come; itself if nobody owns it."""
    by_uid = {other["metadata"]["uid"]: other for other in others}
    for owner in _owners(one):
        above = by_uid.get(owner["uid"])
        return first_owner(above, others) if above is not None else f"{owner['kind']}/{owner['name']}"
    return f"{one['kind']}/{one['metadata']['name']}"


def _owners(one: Object) -> list[dict[str, Any]]:
    return list(one["metadata"].get("ownerReferences") or ())


def rayjobs(kubectl: Kubectl, engine_class: str = "cpu") -> list[Object]:
    """Of the pools' engines that nobody has told to end; those of one job are `dedicated_to`."""
    return [
        one
        for one in kubectl.items("rayjobs", ENGINE_LABEL)
        if "deletionTimestamp" not in one["metadata"]
        and JOB_ANNOTATION not in one["metadata"]["annotations"]
        and one["metadata"]["annotations"]["lathe.internal/engine-class"] == engine_class
    ]


def placed(kubectl: Kubectl, engine_class: str = "cpu") -> list[Object]:
    """The pods of the pools' engines of a class that have found a node."""
    engines = {one["metadata"]["labels"][ENGINE_LABEL] for one in rayjobs(kubectl, engine_class)}
    return [
        pod
        for pod in kubectl.items("pods", ENGINE_LABEL)
        if pod["metadata"]["labels"][ENGINE_LABEL] in engines and pod["spec"].get("nodeName")
    ]


def dedicated_to(kubectl: Kubectl, job_name: str) -> list[Object]:
    """The RayJobs of a job's own engine."""
    return [
        one
        for one in kubectl.items("rayjobs", ENGINE_LABEL)
        if one["metadata"]["annotations"].get(JOB_ANNOTATION) == job_name.rpartition("/")[2]
    ]


def pods_of(kubectl: Kubectl, job_name: str) -> list[Object]:
    """The pods of a job's own engine, its other workers' too."""
    engines = {one["metadata"]["labels"][ENGINE_LABEL] for one in dedicated_to(kubectl, job_name)}
    return [
        pod
        for pod in kubectl.items("pods", ENGINE_LABEL)
        if pod["metadata"]["labels"][ENGINE_LABEL] in engines
    ]


def ready_workers(kubectl: Kubectl, job_name: str) -> list[Object]:
    """Those of them that are not the engine, and ready."""
    return [
        pod
        for pod in pods_of(kubectl, job_name)
        if pod["metadata"]["labels"][NODE_TYPE_LABEL] == "worker" and ready(pod)
    ]


def ask_ray(kubectl: Kubectl, pod: str) -> dict[str, list[object]]:
    """What each port of Ray answers: without the token, with a wrong one, with the right one."""
    answers: dict[str, list[object]] = json.loads(
        kubectl.exec(pod, "python", "-c", ASK_RAY, container="engine")
    )
    return answers


def orphan(release: Release, engine_id: str) -> Object:
    """A RayJob with the labels of an engine that is in nobody's books. Suspended: it runs nothing."""
    template = {"spec": {"containers": [{"name": "engine", "image": "nothing"}]}}
    metadata = {
        "name": object_name(release.full_name, engine_id),
        "labels": {ENGINE_LABEL: engine_id, RELEASE_LABEL: release.name},
        "annotations": {"lathe.internal/engine-class": "nobody's"},
    }
    spec = {
        "suspend": True,
        "entrypoint": "true",
        "submissionMode": "HTTPMode",
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": {"headGroupSpec": {"rayStartParams": {}, "template": template}},
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


@contextmanager
def gpu_on(kubectl: Kubectl, node: str) -> Iterator[None]:
    """The node says that it has one GPU; there is nothing behind it."""
    _patch_status(kubectl, node, "merge", {"status": {"capacity": {GPU: "1"}, "allocatable": {GPU: "1"}}})
    try:
        yield
    finally:
        gone = [
            {"op": "remove", "path": f"/status/{part}/{GPU.replace('/', '~1')}"}
            for part in ("capacity", "allocatable")
        ]
        _patch_status(kubectl, node, "json", gone)


def _patch_status(kubectl: Kubectl, node: str, how: str, patch: object) -> None:
    kubectl.run("patch", "node", node, "--subresource=status", f"--type={how}", "-p", json.dumps(patch))
