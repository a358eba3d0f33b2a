"""What the objects of a namespace say is wrong, in sentences: pure functions from Kubernetes' JSON to findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lathe.common.diagnosis import Finding
from lathe.common.log import last_line

Object = Mapping[str, Any]

_INSTANCE = "app.kubernetes.io/instance"
_OUR_RELEASE = "lathe.internal/release"
_PULL = frozenset({"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"})
_CRASH = frozenset({"CrashLoopBackOff", "RunContainerError", "StartError", "CreateContainerError"})
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_LONG = 400


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What was read. storage_classes: None if we may not read them. logs: last lines by (pod, container)."""

    pods: Sequence[Object]
    owners: Sequence[Object] = ()
    claims: Sequence[Object] = ()
    events: Sequence[Object] = ()
    storage_classes: Sequence[Object] | None = None
    logs: Mapping[tuple[str, str], str] = field(default_factory=dict)


def of_release(one: Object, release: str) -> bool:
    """Whether an object belongs to a release of the chart; every object does if `release` is empty."""
    labels = one["metadata"].get("labels") or {}
    return not release or release in (labels.get(_INSTANCE), labels.get(_OUR_RELEASE))


def logs_wanted(pods: Sequence[Object]) -> dict[tuple[str, str], bool]:
    """(pod, container) whose last log lines would say more -> whether those of its previous run."""
    wanted = {}
    for pod in pods:
        for status, init in _statuses(pod):
            state = status.get("state") or {}
            if (state.get("waiting") or {}).get("reason") in _CRASH:
                wanted[_name(pod), status["name"]] = True
            elif _exit_code(state.get("terminated")) or (init and "running" in state):
                wanted[_name(pod), status["name"]] = False
    return wanted


def findings(state: ClusterState, namespace: str, release: str) -> list[Finding]:
    """Everything that keeps an installation from working; one finding says so if nothing does."""
    what = f"the release {release!r}" if release else "Lathe"
    if not state.pods and not state.owners:
        advice = "Check the names (helm list -A), or install it: helm install NAME charts/lathe."
        return [Finding("release", False, f"The namespace {namespace!r} holds nothing of {what}.", advice)]
    pods = [pod for pod in state.pods if not _is_over(pod, state)]
    found = [
        *(one for owner in state.owners for one in _owner(owner)),
        *(one for claim in state.claims for one in _claim(claim, state)),
        *(one for pod in pods for one in _pod(pod, state)),
    ]
    ready = sum(_ready(pod) for pod in pods)
    message = f"{ready} of {len(pods)} pods of {what} are ready."
    waiting = ready < len(pods) and not found
    return [
        *found,
        Finding("pods", True, message, "Look again in a moment: they are starting." if waiting else ""),
    ]


# --- deployments and jobs ---


def _owner(owner: Object) -> Iterator[Finding]:
    """Those whose pods cannot even be made."""
    for condition in _conditions(owner):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            message = f"{_name(owner)} cannot make its pods: {_short(condition.get('message', ''))}"
            yield Finding(_name(owner), False, message, _forbidden_advice(message))
        elif condition["type"] == "Failed" and condition["status"] == "True" and owner["kind"] == "Job":
            message = f"The job {_name(owner)} failed: {_short(condition.get('message', ''))}"
            yield Finding(_name(owner), False, message, f"See its log: kubectl logs job/{_name(owner)}.")


def _forbidden_advice(message: str) -> str:
    if "PodSecurity" in message:
        return "The chart fits the restricted standard: see which of your values does not."
    if "quota" in message:
        return "Raise the namespace's quota, or lower the chart's resources."
    return "See what refuses them: kubectl get events."


# --- volumes ---


def _claim(claim: Object, state: ClusterState) -> Iterator[Finding]:
    if claim["status"].get("phase") == "Bound":
        return
    name = _name(claim)
    wanted = claim["spec"].get("storageClassName")
    classes = state.storage_classes
    if classes is not None and not wanted and not any(_is_default(one) for one in classes):
        message = f"The volume {name} waits: it names no storage class, and the cluster has no default one."
        known = ", ".join(sorted(_name(one) for one in classes)) or "none"
        yield Finding(
            name,
            False,
            message,
            f"Set the value tryout.storageClass (there are: {known}), or mark one as default.",
        )
        return
    if classes is not None and wanted and wanted not in {_name(one) for one in classes}:
        known = ", ".join(sorted(_name(one) for one in classes)) or "none"
        message = f"The volume {name} waits for the storage class {wanted!r}, which does not exist."
        yield Finding(name, False, message, f"Set the value tryout.storageClass to one that does: {known}.")
        return
    said = _event(state, name, ("ProvisioningFailed", "FailedBinding"))
    why = said or "nothing has made it yet"
    waits = not said
    yield Finding(
        name, waits, f"The volume {name} waits: {why}", "See the storage class's provisioner." if said else ""
    )


def _is_default(storage_class: Object) -> bool:
    return (storage_class["metadata"].get("annotations") or {}).get(_DEFAULT_CLASS) == "true"


# --- pods ---


def _is_over(pod: Object, state: ClusterState) -> bool:
    """Whether it has done its work, or a later pod of its job has."""
    if pod["status"].get("phase") == "Succeeded":
        return True
    owners = {one["name"] for one in pod["metadata"].get("ownerReferences") or () if one.get("kind") == "Job"}
    return any(_name(job) in owners and _is_complete(job) for job in state.owners if job["kind"] == "Job")


def _is_complete(job: Object) -> bool:
    return any(one["type"] == "Complete" and one["status"] == "True" for one in _conditions(job))


def _pod(pod: Object, state: ClusterState) -> list[Finding]:
    if pod["metadata"].get("deletionTimestamp"):
        return [Finding(_name(pod), True, f"{_name(pod)} is being deleted.")]
    found = [one for status, init in _statuses(pod) for one in _container(pod, status, init, state)]
    if not found and not _ready(pod):
        found = list(_unstarted(pod, state))
    return found


def _unstarted(pod: Object, state: ClusterState) -> Iterator[Finding]:
    """No container has anything to say: the pod has no node, or its volumes cannot be mounted."""
    for condition in _conditions(pod):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            message = f"{_name(pod)} has no node: {_short(condition.get('message', ''))}"
            yield Finding(_name(pod), False, message, _scheduling_advice(message))
            return
    if pod["status"].get("phase") == "Failed":
        message = f"{_name(pod)} failed: {_short(pod['status'].get('message', '')) or pod['status'].get('reason', '')}"
        yield Finding(_name(pod), False, message, "Another takes its place; see why the node gave it up.")
        return
    said = _event(state, _name(pod), ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"))
    if said:
        yield Finding(_name(pod), False, f"{_name(pod)} cannot start: {said}", _missing_advice(said))


def _container(pod: Object, status: Object, init: bool, state: ClusterState) -> Iterator[Finding]:
    name, where = _name(pod), f"The container {status['name']}"
    waiting = (status.get("state") or {}).get("waiting") or {}
    reason, said = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _PULL:
        image = status.get("image") or "its image"
        advice = (
            "Push it or load it into the nodes, or correct the chart's values images, global.imageRegistry "
            "and global.imagePullSecrets."
        )
        yield Finding(
            name, False, f"{where}: its image {image} cannot be pulled: {_short(said) or reason}.", advice
        )
    elif reason == "CreateContainerConfigError":
        yield Finding(name, False, f"{where} cannot start: {_short(said)}.", _missing_advice(said))
    elif reason in _CRASH or _exit_code((status.get("state") or {}).get("terminated")):
        yield _crash(where, name, status, state, said)
    elif init and "running" in (status.get("state") or {}):
        line = _last_line(state.logs.get((name, status["name"]), ""))
        message = f"{where} is still at work before the pod starts" + (f": {line}" if line else ".")
        yield Finding(name, True, message, "It ends by itself once what it waits for is there.")
    elif status.get("restartCount") and not init:
        yield _restarts(where, name, status)


def _crash(where: str, name: str, status: Object, state: ClusterState, said: str) -> Finding:
    ended = _ended(status)
    if ended.get("reason") == "OOMKilled":
        return _out_of_memory(where, name, ok=False)
    line = _last_line(state.logs.get((name, status["name"]), "") or ended.get("message", "")) or _short(said)
    code = ended.get("exitCode")
    how = f"ends with {code}" if code is not None else "cannot start"
    message = f"{where} {how}, {status.get('restartCount', 0)} restarts: {line or 'it left no word'}"
    return Finding(
        name, False, message, f"Do what the line says; the log: kubectl logs {name} -c {status['name']} -p."
    )


def _restarts(where: str, name: str, status: Object) -> Finding:
    ended = _ended(status)
    if ended.get("reason") == "OOMKilled":
        return _out_of_memory(where, name, ok=True)
    line = _last_line(ended.get("message", ""))
    message = f"{where} was restarted {status['restartCount']} times" + (
        f"; its last words: {line}" if line else "."
    )
    advice = "" if status.get("ready") else f"See its log: kubectl logs {name} -c {status['name']}."
    return Finding(name, True, message, advice)


def _out_of_memory(where: str, name: str, *, ok: bool) -> Finding:
    return Finding(
        name, ok, f"{where} used more memory than its limit.", "Raise its resources.limits.memory."
    )


def _ended(status: Object) -> Object:
    for state in (status.get("state"), status.get("lastState")):
        ended = (state or {}).get("terminated")
        if ended:
            found: Object = ended
            return found
    return {}


def _scheduling_advice(message: str) -> str:
    if "persistentvolumeclaim" in message.lower():
        return "See the volume's own finding, or name a storage class that exists."
    if "nvidia.com/gpu" in message or "/gpu" in message:
        return "No node has that GPU free: add one, or choose another engine class."
    if "Insufficient" in message:
        return "Add a node, or lower the chart's resources."
    if "node affinity/selector" in message or "taint" in message:
        return "Correct the nodeSelector and tolerations among the chart's values."
    return "See the nodes: kubectl get nodes, kubectl describe pod."


def _missing_advice(message: str) -> str:
    if "secret" in message.lower():
        return "Create that Secret with the keys that the chart's README names, or correct the existingSecret value."
    if "configmap" in message.lower():
        return "helm upgrade makes the chart's ConfigMaps again."
    return "See kubectl describe pod."


# --- reading ---


def _name(one: Object) -> str:
    return str(one["metadata"]["name"])


def _conditions(one: Object) -> Sequence[Object]:
    return (one.get("status") or {}).get("conditions") or ()


def _statuses(pod: Object) -> Iterator[tuple[Object, bool]]:
    """(status, whether of an init container)"""
    for status in pod["status"].get("initContainerStatuses") or ():
        yield status, True
    for status in pod["status"].get("containerStatuses") or ():
        yield status, False


def _ready(pod: Object) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in _conditions(pod))


def _exit_code(terminated: Object | None) -> int:
    return int((terminated or {}).get("exitCode") or 0)


def _event(state: ClusterState, name: str, reasons: Sequence[str]) -> str:
    """The newest event of these kinds about an object."""
    about = [
        one
        for one in state.events
        if (one.get("involvedObject") or {}).get("name") == name and one.get("reason") in reasons
    ]
    about.sort(key=lambda one: str(one.get("lastTimestamp") or one.get("eventTime") or ""))
    return _short(about[-1].get("message", "")) if about else ""


def _last_line(text: str) -> str:
    return _short(last_line(text))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONG else line[: _LONG - 1] + "…"
