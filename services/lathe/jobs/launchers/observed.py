"""What Kubernetes' objects say about engines: which run, what those wait for that do not yet, why the others ended."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from lathe.common.log import last_line
from lathe.jobs.launchers.manifests import (
    CLASS_ANNOTATION,
    CONTAINER,
    ENGINE_LABEL,
    NODE_TYPE_LABEL,
    device_resources,
)
from lathe.jobs.ports import LaunchedEngine

# A controller normally takes an object within a second or two.
_UNNOTICED_S = 15.0
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_PULL = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "RegistryUnavailable")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
# What the kubelet says of a pod that it evicts for what the pod itself wrote; else it is the node that has no room.
_OWN_ROOM = re.compile(r"exceed(s|ed) (its|the) .*limit")
_EXIT_CODE = re.compile(r"exit code (-?\d+)")


@dataclass(frozen=True, slots=True)
class Observed:
    """An engine, and what else to ask the API for before this is the whole story.

    log_of: the pod whose log has its last words; of_previous: those before its restart. events_of: the names of the
    objects whose warnings may say why it does not start. lacking: the device that no node had free.
    """

    engine: LaunchedEngine
    log_of: str = ""
    of_previous: bool = False
    events_of: tuple[str, ...] = ()
    lacking: str = ""
    engine_class: str = ""


def observe_rayjob(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], now: datetime) -> Observed:
    """A RayJob that nobody has deleted, and the engine's pods.

    Of several workers the head is the engine: it says itself that it has lost another.
    """
    status: Mapping[str, Any] = job.get("status") or {}
    state, verdict = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    if state in ("Complete", "Failed"):
        return _ended_by_ray(_engine_id(job), verdict, state, str(status.get("message") or ""))
    # One that is told to end drains first: its engine lives until its time is up. On a lost node it hangs for longer.
    workers = [pod for pod in pods if _is_worker(pod)]
    heads = [pod for pod in pods if not _is_worker(pod)]
    live = [pod for pod in heads if _lives(pod) or _drains(pod, now)]
    if live:
        found = [_waiting(_engine_id(job), pod, job) for pod in (live[-1], *filter(_lives, workers))]
        return next((one for one in found if one.engine.waiting_for or one.events_of), found[0])
    # Nothing makes a head anew once the cluster was ready, and a pod that ends before has failed as well.
    if heads or status.get("dashboardURL"):
        return _pod_gone(_engine_id(job), heads)
    running = LaunchedEngine(_engine_id(job), running=True)
    if _age_s(job, now) < _UNNOTICED_S:
        return Observed(running)
    if is_unnoticed(job, now):
        why = f"KubeRay's operator has not taken the RayJob {_name(job)}: check that it runs and watches this namespace"
        return Observed(replace(running, waiting_for=why), events_of=(_name(job),))
    why = "KubeRay has not made its pod yet: see the events of the RayCluster"
    cluster = str(status.get("rayClusterName") or _name(job))
    return Observed(replace(running, waiting_for=why), events_of=(cluster, _name(job)))


def observe_deployment(made: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], now: datetime) -> Observed:
    """A Deployment that nobody has deleted, and the engine's pods.

    A pod that is replaced or a container that was started again has lost its engine: what comes after it would be a
    retry, and only jobs retries. A pod that drains is replaced at once, by one with the same engine id, so that both
    must go.
    """
    dying = [pod for pod in pods if not _lives(pod)]
    restarted = [pod for pod in pods if _lives(pod) and _last_end(pod) is not None]
    if dying or restarted:
        return _pod_gone(_engine_id(made), restarted or dying)
    if pods:
        return _waiting(_engine_id(made), pods[-1], made)
    running = LaunchedEngine(_engine_id(made), running=True)
    refused = _condition(made, "ReplicaFailure", "True")
    if refused is not None:
        said = str(refused.get("message") or refused.get("reason"))
        return Observed(replace(running, waiting_for=f"Kubernetes refuses its pod: {said}"))
    if _age_s(made, now) < _UNNOTICED_S:
        return Observed(running)
    why = f"Kubernetes has not made the pod of Deployment {_name(made)} yet"
    return Observed(replace(running, waiting_for=why), events_of=(_name(made),))


def with_log(found: Observed, log: str) -> Observed:
    """With the last line of the container's log."""
    return replace(found, engine=replace(found.engine, last_log_line=last_line(log)))


def with_events(found: Observed, events: Sequence[Mapping[str, Any]]) -> Observed:
    """With the newest warning, which says more than that something has not happened yet."""
    warnings = [event for event in events if event.get("type") == "Warning" and event.get("message")]
    if not warnings:
        return found
    newest = max(warnings, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    said = f"{newest.get('reason')}: {str(newest['message']).strip()}"
    return replace(found, engine=replace(found.engine, waiting_for=said[:400]))


def with_nodes(found: Observed, nodes: Sequence[Mapping[str, Any]]) -> Observed:
    """With the difference between a device that no node has and one that others are using."""
    have = [node for node in nodes if _offers(node, found.lacking)]
    needs = f"which engines of class {found.engine_class!r} need" if found.engine_class else "which it needs"
    if not have:
        why = (
            f"none of the {len(nodes)} nodes offers {found.lacking}, {needs}: add a node that has it, "
            "or choose another engine class"
        )
    else:
        why = (
            f"0 of {len(nodes)} nodes have {found.lacking} free, {needs} ({len(have)} offer it): "
            f"it starts when one is free. {found.engine.waiting_for}"
        )
    return replace(found, engine=replace(found.engine, waiting_for=why))


def is_unnoticed(job: Mapping[str, Any], now: datetime) -> bool:
    """Whether KubeRay's operator has had its time to take a RayJob, and has not."""
    return not (job.get("status") or {}).get("jobDeploymentStatus") and _age_s(job, now) >= _UNNOTICED_S


def is_deleted(thing: Mapping[str, Any]) -> bool:
    """Somebody asked for its end; it may hang in Terminating for as long as its node is away."""
    return bool((thing.get("metadata") or {}).get("deletionTimestamp"))


# --- ended ---


def _ended_by_ray(engine_id: str, verdict: str, state: str, message: str) -> Observed:
    code = _EXIT_CODE.search(message.partition("\n")[0])
    killed, said = verdict == "STOPPED", last_line(message.partition("\n")[2])
    if verdict == "SUCCEEDED":
        status = "exit code 0"
    elif code is not None:
        status, killed = _exit_words(int(code[1]))
    else:
        status = f"Ray says {verdict or state}" + (f": {last_line(message)}" if message else "")
    return Observed(LaunchedEngine(engine_id, False, status, killed, said))


def _pod_gone(engine_id: str, pods: Sequence[Mapping[str, Any]]) -> Observed:
    for pod in pods:
        said = str((pod.get("status") or {}).get("message") or "").strip()
        if (pod.get("status") or {}).get("reason") == "Evicted" and _OWN_ROOM.search(said):
            status = f"it wrote more than its room: {said} Raise engines.cache.sizeLimit of the chart."
            return Observed(LaunchedEngine(engine_id, False, status))
    for pod in pods:
        end = _last_end(pod)
        if end is None:
            continue
        status, killed = _end_words(end)
        return Observed(
            LaunchedEngine(engine_id, False, status, killed),
            log_of=_name(pod),
            of_previous=_container(pod).get("restartCount", 0) > 0 and "terminated" not in _state(pod),
        )
    for pod in pods:
        reason = str((pod.get("status") or {}).get("reason") or "")
        if reason:
            # Evicted, Preempting, NodeLost, …: the kubelet or the scheduler says why.
            said = str((pod.get("status") or {}).get("message") or "")
            return Observed(LaunchedEngine(engine_id, False, f"its pod ended: {reason} {said}".strip(), True))
    # Deleted by somebody, or on a node that is not heard of.
    return Observed(LaunchedEngine(engine_id, False, "its pod is gone", killed=True))


def _end_words(end: Mapping[str, Any]) -> tuple[str, bool]:
    if end.get("reason") == "OOMKilled":
        return "it needed more memory than its limit (OOMKilled): raise the limit of its engine class", False
    return _exit_words(int(end.get("exitCode", 0)))


def _exit_words(code: int) -> tuple[str, bool]:
    """In words, and whether somebody outside ended it. A shell says 128 + n for signal n, Python -n."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number:
        return f"killed by signal {number}", number in _OUTSIDE
    return f"exit code {code}", False


# --- not started yet ---


def _waiting(engine_id: str, pod: Mapping[str, Any], made: Mapping[str, Any]) -> Observed:
    """A pod that lives: whether something keeps it from starting."""
    engine_class = str(((made.get("metadata") or {}).get("annotations") or {}).get(CLASS_ANNOTATION) or "")
    found = Observed(LaunchedEngine(engine_id, running=True), engine_class=engine_class)
    placed = _condition(pod, "PodScheduled", "False")
    if placed is not None:
        said = str(placed.get("message") or placed.get("reason") or "").partition(" preemption:")[0]
        lacking = next((name for name in _pod_devices(pod) if f"Insufficient {name}" in said), "")
        why = f"no node has room for it: {said}" if said else "it has no node yet"
        return replace(found, engine=replace(found.engine, waiting_for=why), lacking=lacking)
    why = _kept_back(pod)
    if why:
        return replace(found, engine=replace(found.engine, waiting_for=why))
    if (pod.get("status") or {}).get("phase") == "Pending" and _creating(pod):
        return replace(found, events_of=(_name(pod),))
    return found


def _kept_back(pod: Mapping[str, Any]) -> str:
    status: Mapping[str, Any] = pod.get("status") or {}
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, said = str(waiting.get("reason") or ""), str(waiting.get("message") or "").strip()
        if reason in _PULL:
            return (
                f"its image {container.get('image')} cannot be pulled ({reason}): check the name, "
                f"the registry and the pull secret, or load the image into the nodes. {said}".strip()
            )
        if reason in _CONFIG:
            return f"its container cannot be made ({reason}): {said}"
    return ""


def _creating(pod: Mapping[str, Any]) -> bool:
    """Whether it waits for its volumes, or for its image."""
    status: Mapping[str, Any] = pod.get("status") or {}
    return any(
        ((container.get("state") or {}).get("waiting") or {}).get("reason") == "ContainerCreating"
        for container in status.get("containerStatuses") or []
    )


def _pod_devices(pod: Mapping[str, Any]) -> list[str]:
    containers = (pod.get("spec") or {}).get("containers") or []
    return [name for container in containers for name in device_resources(container)]


def _offers(node: Mapping[str, Any], resource: str) -> bool:
    return int(((node.get("status") or {}).get("allocatable") or {}).get(resource, 0)) > 0


# --- the parts of an object ---


def _is_worker(pod: Mapping[str, Any]) -> bool:
    return ((pod.get("metadata") or {}).get("labels") or {}).get(NODE_TYPE_LABEL) == "worker"


def _lives(pod: Mapping[str, Any]) -> bool:
    return not is_deleted(pod) and (pod.get("status") or {}).get("phase") not in ("Failed", "Succeeded")


def _drains(pod: Mapping[str, Any], now: datetime) -> bool:
    """Within its grace period: that is when the deletion's time stamp is. What never began has nothing to drain."""
    stamp = (pod.get("metadata") or {}).get("deletionTimestamp")
    ended = (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")
    return bool(stamp) and not ended and "running" in _state(pod) and now < _instant(stamp)


def _container(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    statuses: Sequence[Mapping[str, Any]] = (pod.get("status") or {}).get("containerStatuses") or []
    return next((status for status in statuses if status.get("name") == CONTAINER), {})


def _state(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    return _container(pod).get("state") or {}


def _last_end(pod: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the engine's container ended: now, or before it was started again."""
    container = _container(pod)
    for state in (container.get("state") or {}, container.get("lastState") or {}):
        if state.get("terminated"):
            ended: Mapping[str, Any] = state["terminated"]
            return ended
    return None


def _condition(thing: Mapping[str, Any], kind: str, wanted: str) -> Mapping[str, Any] | None:
    conditions: Sequence[Mapping[str, Any]] = (thing.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one.get("type") == kind and one.get("status") == wanted), None)


def _age_s(thing: Mapping[str, Any], now: datetime) -> float:
    stamp = (thing.get("metadata") or {}).get("creationTimestamp")
    if not stamp:
        return 0.0
    return (now - _instant(stamp)).total_seconds()


def _instant(stamp: object) -> datetime:
    return datetime.fromisoformat(str(stamp).replace("Z", "+00:00"))


def _name(thing: Mapping[str, Any]) -> str:
    return str((thing.get("metadata") or {}).get("name") or "")


def _engine_id(thing: Mapping[str, Any]) -> str:
    return str(((thing.get("metadata") or {}).get("labels") or {}).get(ENGINE_LABEL) or "")
