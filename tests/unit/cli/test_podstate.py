"""What `lathe doctor --kubernetes` makes of the objects that kubectl shows (as a 1.34 cluster gave them)."""

from typing import Any

from lathe.cli.podstate import ClusterState, findings, logs_wanted, of_release
from lathe.common.diagnosis import Finding

Object = dict[str, Any]


def pod(name: str = "lathe-jobs-1", *, ready: bool = False, **status: Any) -> Object:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    labels = {"app.kubernetes.io/instance": "lathe"}
    return {
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "status": {"phase": "Running" if ready else "Pending", "conditions": conditions, **status},
    }


def container(state: Object, name: str = "jobs", **more: Any) -> Object:
    return {"name": name, "image": "lathe/control:0.1.0", "restartCount": 0, "state": state, **more}


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


def claim(**spec: Any) -> Object:
    return {
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data-lathe-postgres-0"},
        "spec": spec,
        "status": {"phase": "Pending"},
    }


def storage_class(name: str, *, default: bool = False) -> Object:
    marks = {"storageclass.kubernetes.io/is-default-class": "true"} if default else {}
    return {"kind": "StorageClass", "metadata": {"name": name, "annotations": marks}}


def failed(state: ClusterState) -> Finding:
    [finding] = [one for one in findings(state, "ns", "lathe") if not one.ok]
    return finding


def test_nothing_is_said_of_pods_that_are_ready_or_done() -> None:
    done = pod("lathe-migrate-x", phase="Succeeded")
    running = pod(ready=True, containerStatuses=[container({"running": {}}, ready=True)])
    [finding] = findings(ClusterState([running, done]), "ns", "lathe")
    assert finding == Finding("pods", True, "1 of 1 pods of the release 'lathe' are ready.")


def test_an_image_that_cannot_be_pulled_is_named() -> None:
    state = waiting("ImagePullBackOff", 'Back-off pulling image "lathe/control:0.1.0"')
    finding = failed(ClusterState([pod(containerStatuses=[container(state)])]))
    assert "lathe/control:0.1.0" in finding.message
    assert "values images, global.imageRegistry and global.imagePullSecrets" in finding.advice


def test_a_missing_secret_is_named_whether_it_is_read_or_mounted() -> None:
    state = waiting("CreateContainerConfigError", 'secret "lathe-jobs-db" not found')
    finding = failed(ClusterState([pod(containerStatuses=[container(state)])]))
    assert 'secret "lathe-jobs-db" not found' in finding.message
    assert "existingSecret" in finding.advice
    event = {
        "kind": "Event",
        "reason": "FailedMount",
        "involvedObject": {"name": "lathe-jobs-1"},
        "message": 'MountVolume.SetUp failed for volume "tls" : secret "lathe-jobs-tls" not found',
    }
    creating = pod(containerStatuses=[container(waiting("ContainerCreating"))])
    assert "lathe-jobs-tls" in failed(ClusterState([creating], events=[event])).message


def test_a_container_that_crashes_is_quoted_with_its_last_line() -> None:
    log = 'starting\n{"level": "critical", "message": "The database of lathe.jobs refuses the password."}\n'
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    crashing = pod(
        containerStatuses=[container(waiting("CrashLoopBackOff"), lastState=ended, restartCount=4)]
    )
    assert logs_wanted([crashing]) == {("lathe-jobs-1", "jobs"): True}
    finding = failed(ClusterState([crashing], logs={("lathe-jobs-1", "jobs"): log}))
    assert "refuses the password" in finding.message
    assert "4 restarts" in finding.message
    # Without a log, what the kubelet kept of it (terminationMessagePolicy) does.
    ended["terminated"]["message"] = "first\nThe metrics port is taken."
    assert "The metrics port is taken." in failed(ClusterState([crashing])).message


def test_a_container_out_of_memory_is_told_apart() -> None:
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    crashing = pod(containerStatuses=[container(waiting("CrashLoopBackOff"), lastState=ended)])
    assert "resources.limits.memory" in failed(ClusterState([crashing])).advice


def test_a_pod_without_a_node_says_what_it_lacks() -> None:
    def unscheduled(message: str) -> str:
        one = pod()
        one["status"]["conditions"].append({"type": "PodScheduled", "status": "False", "message": message})
        return failed(ClusterState([one])).advice

    assert "GPU" in unscheduled("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    assert "resources" in unscheduled("0/3 nodes are available: 3 Insufficient cpu.")
    assert "nodeSelector" in unscheduled(
        "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    )
    assert "storage class" in unscheduled("pod has unbound immediate PersistentVolumeClaims.")


def test_a_volume_without_a_storage_class_is_explained() -> None:
    classes = [storage_class("standard")]
    finding = failed(ClusterState([pod()], claims=[claim()], storage_classes=classes))
    assert "no default one" in finding.message
    assert "standard" in finding.advice
    finding = failed(ClusterState([pod()], claims=[claim(storageClassName="fast")], storage_classes=classes))
    assert "'fast', which does not exist" in finding.message
    waits = ClusterState([pod()], claims=[claim()], storage_classes=[storage_class("standard", default=True)])
    assert all(one.ok for one in findings(waits, "ns", "lathe"))


def test_what_keeps_pods_from_being_made_is_told() -> None:
    message = 'pods "lathe-jobs-1" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot'
    condition = {"type": "ReplicaFailure", "status": "True", "message": message}
    owner = {"kind": "Deployment", "metadata": {"name": "lathe-jobs"}, "status": {"conditions": [condition]}}
    assert "PodSecurity" in failed(ClusterState([], owners=[owner])).message


def test_a_try_that_failed_does_not_count_once_the_job_is_done() -> None:
    job = {
        "kind": "Job",
        "metadata": {"name": "lathe-migrate"},
        "status": {"conditions": [{"type": "Complete", "status": "True"}]},
    }
    first = pod(
        "lathe-migrate-a", phase="Failed", containerStatuses=[container({"terminated": {"exitCode": 1}})]
    )
    first["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "lathe-migrate"}]
    assert all(one.ok for one in findings(ClusterState([first], owners=[job]), "ns", "lathe"))


def test_an_init_container_that_waits_is_quoted() -> None:
    status = container({"running": {}}, name="schema")
    one = pod(initContainerStatuses=[status])
    log = "jobs waits: The database of lathe.jobs cannot be reached: nothing listens on db:5432. …\n"
    found = findings(ClusterState([one], logs={("lathe-jobs-1", "schema"): log}), "ns", "lathe")
    assert "nothing listens on db:5432" in found[0].message


def test_an_empty_namespace_and_another_release_are_told_apart_from_ours() -> None:
    assert of_release(pod(), "lathe")
    assert of_release(pod(), "")
    assert not of_release(pod(), "other")
    [finding] = findings(ClusterState([]), "ns", "other")
    assert not finding.ok
    assert "'ns' holds nothing of the release 'other'" in finding.message
