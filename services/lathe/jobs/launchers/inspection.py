"""For `lathe doctor`: whether the cluster has what engines need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from lathe.common.diagnosis import Finding
from lathe.common.errors import LatheError, PermissionDenied
from lathe.jobs.launchers.kube_api import Kind, KubeApi
from lathe.jobs.launchers.manifests import device_resources
from lathe.jobs.launchers.observed import is_unnoticed

_RAY = "ray.io/v1"


def look(
    api: KubeApi,
    templates: Path,
    engines: Literal["auto", "rayjob", "deployment"],
    selector: str,
    now: datetime,
) -> Sequence[Finding]:
    """Every finding, the bad ones too; never raises."""
    try:
        has_ray = api.serves(_RAY)
    except LatheError as error:
        return [
            Finding(
                "kubernetes",
                False,
                f"Kubernetes' API does not answer jobs: {error.message}",
                "Check the network policy of jobs towards the API server, and its service account's token.",
            ),
            _classes(templates),
        ]
    used = Kind.RAYJOB if engines == "rayjob" or (engines == "auto" and has_ray) else Kind.DEPLOYMENT
    found = [Finding("kubernetes", True, "Kubernetes' API answers jobs."), _runs_as(used, has_ray, engines)]
    found.append(_rights(api, used, selector))
    if used is Kind.RAYJOB and has_ray:
        found.append(_operator(api, selector, now))
    found.append(_classes(templates))
    found.extend(_devices(api, templates))
    return found


def class_names(folder: Path) -> list[str]:
    """The engine classes that have a template."""
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder.is_dir() else []


def _runs_as(used: Kind, has_ray: bool, engines: str) -> Finding:
    if used is Kind.RAYJOB and has_ray:
        return Finding("kuberay", True, "KubeRay's API is there; each engine runs as a RayJob.")
    if used is Kind.RAYJOB:
        return Finding(
            "kuberay",
            False,
            "Engines are to run as RayJobs, but the cluster has no API ray.io/v1.",
            "Install the KubeRay operator, or set engines.kind to auto or deployment.",
        )
    if engines == "deployment":
        return Finding(
            "kuberay", True, "Each engine runs as a Deployment of one worker, as the settings say."
        )
    return Finding(
        "kuberay",
        True,
        "There is no KubeRay on the cluster: each engine runs as a Deployment of one pod.",
        "Nothing is needed for jobs of one worker; install the KubeRay operator for jobs of several.",
    )


def _rights(api: KubeApi, used: Kind, selector: str) -> Finding:
    try:
        for kind in (used, Kind.POD):
            api.list(kind, labels=selector)
    except LatheError as error:
        return Finding(
            "engine rights",
            False,
            f"jobs cannot see its engines: {error.message}",
            "Give the service account of jobs the rights that the chart's Role of the same name has.",
        )
    return Finding("engine rights", True, "jobs sees its engines' objects and pods.")


def _operator(api: KubeApi, selector: str, now: datetime) -> Finding:
    """The operator itself is in another namespace, which jobs has no right to see: its traces have to do."""
    try:
        made = api.list(Kind.RAYJOB, labels=selector)
    except LatheError as error:
        return Finding("kuberay operator", False, f"RayJobs cannot be listed: {error.message}")
    waiting = [job for job in made if is_unnoticed(job, now)]
    if waiting:
        return Finding(
            "kuberay operator",
            False,
            f"{len(waiting)} of {len(made)} RayJobs were not taken by KubeRay's operator.",
            "Check that the operator runs and watches this namespace: kubectl get pods -A -l "
            "app.kubernetes.io/name=kuberay-operator.",
        )
    if not made:
        return Finding("kuberay operator", True, "No engine has needed KubeRay's operator yet.")
    return Finding("kuberay operator", True, f"KubeRay's operator looks after {len(made)} engines.")


def _classes(templates: Path) -> Finding:
    names = class_names(templates)
    broken = [name for name in names if _template(templates, name) is None]
    if not names:
        return Finding(
            "engine classes",
            False,
            f"There is no engine class in {templates}.",
            "Define one under engines.classes of the chart's values.",
        )
    if broken:
        return Finding(
            "engine classes",
            False,
            f"The templates of the engine classes {', '.join(broken)} cannot be read.",
            "Correct them under engines.classes of the chart's values.",
        )
    return Finding("engine classes", True, f"Engine classes: {', '.join(names)}.")


def _devices(api: KubeApi, templates: Path) -> list[Finding]:
    """For every device that a class asks for: which nodes have it."""
    wanted: dict[str, str] = {}
    for name in class_names(templates):
        template = _template(templates, name) or {}
        for container in (template.get("spec") or {}).get("containers") or []:
            wanted.update(dict.fromkeys(device_resources(container), name))
    if not wanted:
        return [Finding("gpus", True, "No engine class asks for a GPU.")]
    try:
        nodes = api.list(Kind.NODE)
    except PermissionDenied:
        return [
            Finding(
                "gpus", True, f"Engine classes ask for {', '.join(wanted)}; jobs may not look at the nodes."
            )
        ]
    except LatheError as error:
        return [Finding("gpus", False, f"The nodes cannot be listed: {error.message}")]
    return [_device(resource, name, nodes) for resource, name in sorted(wanted.items())]


def _device(resource: str, engine_class: str, nodes: Sequence[Mapping[str, Any]]) -> Finding:
    counts = [int(((node.get("status") or {}).get("allocatable") or {}).get(resource, 0)) for node in nodes]
    having = sum(count > 0 for count in counts)
    if having:
        return Finding(
            "gpus", True, f"{having} of {len(nodes)} nodes offer {resource}, {sum(counts)} in all."
        )
    return Finding(
        "gpus",
        True,
        f"None of the {len(nodes)} nodes offers {resource}, which engine class {engine_class!r} asks for.",
        "Install the vendor's device plugin on the nodes that have it, or jobs of that class will wait.",
    )


def _template(folder: Path, name: str) -> Mapping[str, Any] | None:
    try:
        read = yaml.safe_load((folder / f"{name}.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return None
    return read if isinstance(read, dict) else None
