"""What the launcher makes on Kubernetes for an engine."""

import json
from typing import Any

import pytest

from lathe.common.errors import FailedPrecondition
from lathe.jobs.launchers.manifests import Frame, Owner, deployment, object_name, rayjob
from lathe.jobs.ports import EngineLaunch

LAUNCH = EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, "cpu")
FRAME = Frame("lathe", "lathe", "lathe-jobs:7460", "2.60.0", Owner("lathe-jobs", "uid-1"))


def template(**container: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "labels": {"app.kubernetes.io/name": "lathe"},
            "annotations": {"prometheus.io/port": "9090"},
        },
        "spec": {
            "terminationGracePeriodSeconds": 60,
            "containers": [
                {"name": "beside", "image": "other"},
                {
                    "name": "engine",
                    "image": "lathe/engine:1",
                    "env": [
                        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                        {"name": "LATHE_ENGINE_ADVERTISE_ADDRESS", "value": "$(POD_IP):7460"},
                        {"name": "LATHE_ENGINE_ENGINE_ID", "value": "mine"},
                    ],
                    "ports": [{"name": "grpc", "containerPort": 7460}],
                    "startupProbe": {"grpc": {"port": 7461}},
                    "readinessProbe": {"grpc": {"port": 7461}},
                    "livenessProbe": {"grpc": {"port": 7461}},
                    **container,
                },
            ],
        },
    }


def head(made: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    return pod


def environment(container: dict[str, Any]) -> dict[str, Any]:
    names = [entry["name"] for entry in container["env"]]
    assert len(names) == len(set(names))
    return {entry["name"]: entry.get("value") for entry in container["env"]}


def test_a_rayjob_is_one_head_and_one_try() -> None:
    made = rayjob(LAUNCH, template(), FRAME)
    spec = made["spec"]
    assert (spec["submissionMode"], spec["backoffLimit"], spec["jobId"]) == ("HTTPMode", 0, "eng-1")
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] == 300
    assert "workerGroupSpecs" not in spec["rayClusterSpec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert head(made)["spec"]["restartPolicy"] == "Never"
    # KubeRay copies it to the cluster: a second head would be given the engine again.
    assert made["metadata"]["annotations"]["ray.io/disable-provisioned-head-restart"] == "true"
    assert "lathe.engine.main" in spec["entrypoint"]


def test_rays_guess_of_threads_is_dropped_but_not_the_operators() -> None:
    assert "unset OMP_NUM_THREADS" in rayjob(LAUNCH, template(), FRAME)["spec"]["entrypoint"]
    chosen = template(env=[{"name": "OMP_NUM_THREADS", "value": "4"}])
    assert "OMP_NUM_THREADS" not in rayjob(LAUNCH, chosen, FRAME)["spec"]["entrypoint"]


@pytest.mark.parametrize("make", [rayjob, deployment])
def test_what_is_made_is_owned_and_found_again(make: Any) -> None:
    made = make(LAUNCH, template(), FRAME)
    [owner] = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Deployment", "lathe-jobs", "uid-1")
    assert not owner["blockOwnerDeletion"]
    pod = head(made) if make is rayjob else made["spec"]["template"]
    for metadata in (made["metadata"], pod["metadata"]):
        assert metadata["labels"] == {
            "app.kubernetes.io/name": "lathe",
            "app.kubernetes.io/instance": "lathe",
            "lathe.internal/engine": "eng-1",
            "lathe.internal/base-digest": "d" * 63,
        }
    assert pod["metadata"]["annotations"] == {"prometheus.io/port": "9090"}
    assert made["metadata"]["annotations"]["lathe.internal/base-model"] == "baseModels/tiny"


def test_the_engine_is_rays_container_and_keeps_its_settings() -> None:
    container = head(rayjob(LAUNCH, template(command=["mine"], args=["too"]), FRAME))["spec"]["containers"][0]
    assert container["name"] == "engine" and "command" not in container and "args" not in container
    assert container["ports"] == [
        {"name": "grpc", "containerPort": 7460},
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
    ]
    variables = environment(container)
    assert variables["LATHE_ENGINE_ENGINE_ID"] == "eng-1"
    assert variables["LATHE_ENGINE_JOBS_ADDRESS"] == "lathe-jobs:7460"
    # The kubelet puts in only what stands before.
    names = [entry["name"] for entry in container["env"]]
    assert names.index("POD_IP") < names.index("LATHE_ENGINE_ADVERTISE_ADDRESS")


def test_a_head_is_ready_before_its_engine_runs() -> None:
    container = head(rayjob(LAUNCH, template(), FRAME))["spec"]["containers"][0]
    assert "startupProbe" not in container
    assert container["readinessProbe"]["httpGet"]["port"] == 8265
    assert "grpc" not in container["livenessProbe"]


def test_a_deployment_is_the_engine_itself() -> None:
    made = deployment(LAUNCH, template(), FRAME)
    assert (made["spec"]["replicas"], made["spec"]["strategy"]) == (1, {"type": "Recreate"})
    pod = made["spec"]["template"]
    selected = made["spec"]["selector"]["matchLabels"]
    assert selected.items() <= pod["metadata"]["labels"].items()
    container = next(one for one in pod["spec"]["containers"] if one["name"] == "engine")
    assert container["command"] == ["python", "-m", "lathe.engine.main"]
    assert container["readinessProbe"] == {"grpc": {"port": 7461}}
    assert environment(container)["LATHE_ENGINE_BASE_DIGEST"] == "d" * 64


def test_the_devices_of_a_class_are_given_to_the_engine() -> None:
    made = rayjob(LAUNCH, template(resources={"limits": {"nvidia.com/gpu": "2", "memory": "1Gi"}}), FRAME)
    assert made["spec"]["entrypointNumGpus"] == 2
    assert made["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] == "2"
    assert "entrypointNumGpus" not in rayjob(LAUNCH, template(), FRAME)["spec"]


def test_a_template_serves_for_many_engines() -> None:
    given = template()
    rayjob(LAUNCH, given, FRAME)
    deployment(LAUNCH, given, FRAME)
    assert given == template()


def test_a_job_of_its_own_is_written_down() -> None:
    own = EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, "cpu", job_id="job-9")
    assert deployment(own, template(), FRAME)["metadata"]["annotations"]["lathe.internal/job"] == "job-9"


@pytest.mark.parametrize(
    "prefix", ["lathe", "a-very-long-release-name-that-helm-allows-to-be-53-long", "x." * 20]
)
def test_names_fit_kuberay(prefix: str) -> None:
    name = object_name(prefix, "eng-1")
    assert len(name) <= 47 and "--" not in name and ".-" not in name
    assert name == object_name(prefix, "eng-1") != object_name(prefix, "eng-2")


def test_a_template_without_an_engine() -> None:
    with pytest.raises(FailedPrecondition, match="'engine'"):
        rayjob(LAUNCH, {"spec": {"containers": [{"name": "other"}]}}, FRAME)


# --- several workers ---

GANG = EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, "cpu", "job-9", workers=3)
GPUS = {"limits": {"nvidia.com/gpu": "1"}}


def worker_group(made: dict[str, Any]) -> dict[str, Any]:
    [group] = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    found: dict[str, Any] = group
    return found


def test_each_further_worker_is_a_pod_that_is_there_from_the_start() -> None:
    group = worker_group(rayjob(GANG, template(), FRAME))
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    assert group["rayStartParams"]["num-cpus"] == "1"


def test_the_head_keeps_the_engine_and_the_others_are_elsewhere() -> None:
    made = rayjob(GANG, template(resources=GPUS), FRAME)
    spec = made["spec"]
    # A rank takes one CPU of Ray's, of which the head has none; the engine stays where only the head is.
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert json.loads(spec["entrypointResources"]) == {"node:__internal_head__": 0.001}
    assert spec["entrypointNumGpus"] == 1
    assert worker_group(made)["rayStartParams"]["num-gpus"] == "1"
    variables = environment(head(made)["spec"]["containers"][0])
    assert variables["LATHE_ENGINE_WORKERS"] == "3"
    assert (variables["LATHE_ENGINE_WORKER_CPUS"], variables["LATHE_ENGINE_WORKER_GPUS"]) == ("1", "1")


def test_a_worker_is_as_the_head_but_answers_nobody() -> None:
    given = template(
        resources=GPUS,
        securityContext={"readOnlyRootFilesystem": True},
        lifecycle={"preStop": {"exec": {"command": ["lathe", "engine", "drain"]}}},
        volumeMounts=[{"name": "cache", "mountPath": "/cache"}],
    )
    given["spec"] |= {"tolerations": [{"key": "spot"}], "volumes": [{"name": "cache"}]}
    given["metadata"]["annotations"] |= {"prometheus.io/scrape": "true", "mine": "too"}
    made = rayjob(GANG, given, FRAME, suspects=["node-a"])
    first, other = head(made), worker_group(made)["template"]
    assert {name: other["spec"][name] for name in other["spec"] if name != "containers"} == {
        name: first["spec"][name] for name in first["spec"] if name != "containers"
    }
    one, another = first["spec"]["containers"][0], other["spec"]["containers"][0]
    for name in ("name", "image", "resources", "securityContext", "volumeMounts"):
        assert another[name] == one[name]
    assert not {"ports", "lifecycle", "startupProbe", "command"} & set(another)
    assert another["readinessProbe"]["httpGet"]["path"] == "/api/local_raylet_healthz"
    assert other["metadata"]["annotations"] == {"mine": "too"}
    assert "LATHE_ENGINE_WORKERS" not in environment(another)


def test_the_pods_of_a_gang_may_be_told_from_others() -> None:
    made = rayjob(GANG, template(), FRAME)
    for pod in (head(made), worker_group(made)["template"]):
        assert pod["metadata"]["labels"]["lathe.internal/gang"] == "true"
        assert pod["metadata"]["labels"]["lathe.internal/engine"] == "eng-1"
    alone = rayjob(LAUNCH, template(), FRAME)
    assert "lathe.internal/gang" not in head(alone)["metadata"]["labels"]
    assert "entrypointResources" not in alone["spec"]
    assert "LATHE_ENGINE_WORKERS" not in environment(head(alone)["spec"]["containers"][0])
