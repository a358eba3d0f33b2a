"""What is made on Kubernetes for one engine: a RayJob, or a Deployment where there is no KubeRay."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lathe.common.errors import FailedPrecondition
from lathe.jobs.launchers.processes import ENGINE_MODULE, engine_variables, gang_variables
from lathe.jobs.ports import EngineLaunch

Manifest: TypeAlias = dict[str, Any]

ENGINE_LABEL = "lathe.internal/engine"
DIGEST_LABEL = "lathe.internal/base-digest"
BASE_ANNOTATION = "lathe.internal/base-model"
CLASS_ANNOTATION = "lathe.internal/engine-class"
JOB_ANNOTATION = "lathe.internal/job"
RELEASE_LABEL = "app.kubernetes.io/instance"
# On the pods of an engine of several workers: the chart's network policy lets them talk to each other.
GANG_LABEL = "lathe.internal/gang"
# KubeRay's: `head` or `worker`.
NODE_TYPE_LABEL = "ray.io/node-type"
CONTAINER = "engine"

# KubeRay allows 47 characters for a RayJob: it makes longer names from it.
_NAME_LIMIT = 47
_LABEL_LIMIT = 63
_DASHBOARD_PORT = 8265
_GCS_PORT = 6379
_AGENT_PORT = 52365
# What KubeRay goes by: a cluster whose head is lost is not given a new head, in which it would submit the engine anew.
_NO_SECOND_HEAD = "ray.io/disable-provisioned-head-restart"

# What only the head has: the engine must not become a worker's, whose CPU and GPU are another rank's.
_ON_HEAD = {"node:__internal_head__": 0.001}
_SCRAPED = "prometheus.io/"

# Ray is here to start and watch one process: no statistics, no copies of logs, no store for objects it never has, no
# scaling. 80 MB is little more than the smallest object store that Ray takes.
_RAY_START = {
    "dashboard-host": "0.0.0.0",
    "disable-usage-stats": "true",
    "include-log-monitor": "0",
    "no-monitor": "true",
    "num-cpus": "1",
    "object-store-memory": "80000000",
}
_WORKER_START = {
    name: _RAY_START[name] for name in ("num-cpus", "object-store-memory", "include-log-monitor")
}
# Ray must not kill an engine for its memory (the pod's limit does), nor cut its drain short.
_RAY_ENV = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # The engine has drained before Ray is told to end: preStop sees to that.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


@dataclass(frozen=True, slots=True)
class Owner:
    """The Deployment of jobs: with it goes all that jobs made."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Frame:
    """What is the same for every engine of an installation.

    prefix: of the names. release: the Helm release. jobs_address: where engines reach jobs. expiry_s: how long an
    ended engine's pod stays if nobody removes it. stop_wait_s: how long Ray waits for an engine to end by itself.
    """

    prefix: str
    release: str
    jobs_address: str
    ray_version: str
    owner: Owner | None = None
    engine_env: Mapping[str, str] | None = None
    expiry_s: int = 300
    stop_wait_s: int = 30


def object_name(prefix: str, engine_id: str) -> str:
    """The name of an engine's object: short enough for KubeRay, always the same for the same id."""
    mark = hashlib.sha256(engine_id.encode()).hexdigest()[:10]
    room = _NAME_LIMIT - len(f"-engine-{mark}")
    return f"{prefix[:room].rstrip('-.')}-engine-{mark}"


def rayjob(
    launch: EngineLaunch, template: Mapping[str, Any], frame: Frame, suspects: Sequence[str] = ()
) -> Manifest:
    """One RayJob: a head pod, whose one job is the engine, and a worker pod for each further worker.

    KubeRay submits the engine when all of its pods are ready: all workers start, or none.
    suspects: nodes that it had better not be placed on.
    Raises FailedPrecondition for a template without the container `engine`.
    """
    gang = launch.workers > 1
    pod = _head(launch, template, frame, suspects)
    gpus = _devices(_engine_container(pod))
    given_gpus = {"num-gpus": str(gpus)} if gpus else {}
    # Ray places the other ranks where CPUs are: not on the head.
    start = {**_RAY_START, **given_gpus, **({"num-cpus": "0"} if gang else {})}
    cluster: Manifest = {
        "rayVersion": frame.ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": start, "template": pod},
    }
    if gang:
        others = launch.workers - 1
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": others,
                "minReplicas": others,
                "maxReplicas": others,
                "rayStartParams": {**_WORKER_START, **given_gpus},
                "template": _worker(launch, template, frame, suspects),
            }
        ]
    metadata = _metadata(launch, pod, frame)
    metadata["annotations"][_NO_SECOND_HEAD] = "true"
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": _entrypoint(_engine_container(pod)),
            "jobId": launch.engine_id,
            "submissionMode": "HTTPMode",
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": frame.expiry_s,
            **({"entrypointNumGpus": gpus} if gpus else {}),
            **({"entrypointResources": json.dumps(_ON_HEAD)} if gang else {}),
            "rayClusterSpec": cluster,
        },
    }


def _head(
    launch: EngineLaunch, template: Mapping[str, Any], frame: Frame, suspects: Sequence[str]
) -> Manifest:
    pod, container = _ray_pod(launch, template, frame, suspects)
    gang = gang_variables(launch, float(_WORKER_START["num-cpus"]), _devices(container))
    _add_env(container, {"RAY_JOB_STOP_WAIT_TIME_S": str(frame.stop_wait_s), **gang})
    _add_ports(container, {"gcs-server": _GCS_PORT, "dashboard": _DASHBOARD_PORT})
    _add_probes(container, _DASHBOARD_PORT, "/api/gcs_healthz")
    return pod


def _worker(
    launch: EngineLaunch, template: Mapping[str, Any], frame: Frame, suspects: Sequence[str]
) -> Manifest:
    """A pod for one of the other ranks: whatever the engine has, but it answers nobody, and has nothing to drain."""
    pod, container = _ray_pod(launch, template, frame, suspects)
    container.pop("ports", None)
    container.pop("lifecycle", None)
    _add_probes(container, _AGENT_PORT, "/api/local_raylet_healthz")
    annotations = pod["metadata"]["annotations"]
    for name in [name for name in annotations if name.startswith(_SCRAPED)]:
        del annotations[name]
    return pod


def _ray_pod(
    launch: EngineLaunch, template: Mapping[str, Any], frame: Frame, suspects: Sequence[str]
) -> tuple[Manifest, Manifest]:
    """What a head and a worker have in common; the pod and its container of Ray."""
    pod = _pod(launch, template, frame, suspects)
    spec, container = pod["spec"], _engine_container(pod)
    # KubeRay takes the first container for Ray's, and writes its own command.
    spec["containers"] = [container, *(other for other in spec["containers"] if other is not container)]
    container.pop("command", None)
    container.pop("args", None)
    spec["restartPolicy"] = "Never"
    _add_env(container, _RAY_ENV)
    return pod, container


def deployment(
    launch: EngineLaunch, template: Mapping[str, Any], frame: Frame, suspects: Sequence[str] = ()
) -> Manifest:
    """One Deployment of one replica: so exactly this engine can be ended, and its id is known before its pod.

    suspects: nodes that it had better not be placed on.
    Raises FailedPrecondition for a template without the container `engine`.
    """
    pod = _pod(launch, template, frame, suspects)
    container = _engine_container(pod)
    container.setdefault("command", ["python", "-m", ENGINE_MODULE])
    # A Deployment takes no other.
    pod["spec"]["restartPolicy"] = "Always"
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(launch, pod, frame),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "revisionHistoryLimit": 0,
            "selector": {"matchLabels": {ENGINE_LABEL: launch.engine_id, RELEASE_LABEL: frame.release}},
            "template": pod,
        },
    }


def device_resources(container: Mapping[str, Any]) -> dict[str, int]:
    """The devices that a container asks for, such as `nvidia.com/gpu`: every resource of a vendor's name."""
    resources = container.get("resources") or {}
    asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    return {
        name: int(count)
        for name, count in asked.items()
        if "/" in name and not name.startswith("kubernetes.io/") and int(count) > 0
    }


def _pod(
    launch: EngineLaunch, template: Mapping[str, Any], frame: Frame, suspects: Sequence[str]
) -> Manifest:
    """The class's template with what is this engine's own."""
    pod: Manifest = {
        "metadata": copy.deepcopy(dict(template.get("metadata") or {})),
        "spec": copy.deepcopy(dict(template.get("spec") or {})),
    }
    labels = {**(pod["metadata"].get("labels") or {}), **_labels(launch, frame)}
    pod["metadata"] = {"labels": labels, "annotations": dict(pod["metadata"].get("annotations") or {})}
    variables = engine_variables(launch, frame.jobs_address, frame.engine_env or {})
    _add_env(_engine_container(pod), variables)
    if suspects:
        _avoid(pod["spec"], suspects)
    return pod


def _avoid(spec: Manifest, nodes: Sequence[str]) -> None:
    """A wish and not a must: the only node there is has to do."""
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    wishes = affinity.setdefault("preferredDuringSchedulingIgnoredDuringExecution", [])
    wishes.append({"weight": 100, "preference": {"matchFields": fields}})


def _metadata(launch: EngineLaunch, pod: Manifest, frame: Frame) -> Manifest:
    told = {BASE_ANNOTATION: launch.base_model, CLASS_ANNOTATION: launch.engine_class}
    if launch.job_id:
        told[JOB_ANNOTATION] = launch.job_id
    made: Manifest = {
        "name": object_name(frame.prefix, launch.engine_id),
        "labels": dict(pod["metadata"]["labels"]),
        "annotations": told,
    }
    if frame.owner is not None:
        made["ownerReferences"] = [
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": frame.owner.name,
                "uid": frame.owner.uid,
                "controller": False,
                "blockOwnerDeletion": False,
            }
        ]
    return made


def _labels(launch: EngineLaunch, frame: Frame) -> dict[str, str]:
    return {
        ENGINE_LABEL: launch.engine_id,
        DIGEST_LABEL: launch.base_digest[:_LABEL_LIMIT],
        RELEASE_LABEL: frame.release,
        **({GANG_LABEL: "true"} if launch.workers > 1 else {}),
    }


def _engine_container(pod: Mapping[str, Any]) -> Manifest:
    containers: Sequence[Manifest] = pod["spec"].get("containers") or []
    for container in containers:
        if container.get("name") == CONTAINER:
            return container
    raise FailedPrecondition(
        f"The engine class's pod template has no container named {CONTAINER!r}: add it to the template."
    )


def _add_env(container: Manifest, variables: Mapping[str, str]) -> None:
    """Ours replace those of the same name; the others keep their order (one may refer to those before it)."""
    kept = [entry for entry in container.get("env") or [] if entry["name"] not in variables]
    container["env"] = kept + [{"name": name, "value": value} for name, value in variables.items()]


def _add_ports(container: Manifest, ports: Mapping[str, int]) -> None:
    kept = [port for port in container.get("ports") or [] if port.get("name") not in ports]
    container["ports"] = kept + [{"name": name, "containerPort": port} for name, port in ports.items()]


def _add_probes(container: Manifest, port: int, health: str) -> None:
    """Ray's own: the engine answers the template's only after its submission, which waits for its pods to be ready."""
    container.pop("startupProbe", None)
    container["readinessProbe"] = {
        "httpGet": {"path": health, "port": port},
        "periodSeconds": 1,
        "timeoutSeconds": 5,
        "failureThreshold": 10,
    }
    container["livenessProbe"] = {
        "tcpSocket": {"port": port},
        "initialDelaySeconds": 120,
        "periodSeconds": 20,
        "timeoutSeconds": 10,
        "failureThreshold": 6,
    }


def _devices(container: Mapping[str, Any]) -> int:
    return sum(device_resources(container).values())


def _entrypoint(container: Mapping[str, Any]) -> str:
    """The engine, in the place of the shell that Ray starts; what it says goes to the pod's log as well as to Ray's.

    tee outlives the signal that ends the engine, so that the engine's last words are heard.
    """
    # Ray sets it to 1 for what asks for no CPU of Ray's.
    given = any(entry["name"] == "OMP_NUM_THREADS" for entry in container["env"])
    own_threads = "" if given else "unset OMP_NUM_THREADS; "
    output = "> >(trap '' TERM INT; exec tee /proc/1/fd/1) 2>&1"
    command = f"{own_threads}exec python -m {ENGINE_MODULE} {output}"
    return f"exec bash -c {shlex.quote(command)}"
