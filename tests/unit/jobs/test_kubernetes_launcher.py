"""What the launcher makes of Kubernetes' answers, with its controllers played by the tests."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiClient, Configuration
from kubernetes.config.config_exception import ConfigException

from lathe.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LatheError,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from lathe.jobs.launchers.kube_api import HttpKubeApi, Kind, refusal
from lathe.jobs.launchers.kuberay import KubernetesLauncher
from lathe.jobs.launchers.manifests import Frame
from lathe.jobs.ports import EngineLaunch, LaunchedEngine
from tests.fakes.clock import FakeClock
from tests.fakes.kubernetes import FakeKubeApi

RUNNING = {"phase": "Running"}
GPU = {"resources": {"limits": {"nvidia.com/gpu": 1}}}


def launch(engine_class: str = "cpu") -> EngineLaunch:
    return EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, engine_class)


def state(ready: bool = False, restarts: int = 0, **states: Any) -> dict[str, Any]:
    container = {"name": "engine", "image": "lathe/engine:1", "restartCount": restarts, **states}
    return {"phase": "Running" if ready else "Pending", "containerStatuses": [container]}


def waiting(reason: str, message: str) -> dict[str, Any]:
    return state(state={"waiting": {"reason": reason, "message": message}})


def unplaced(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def node(**devices: int) -> dict[str, Any]:
    return {
        "status": {
            "allocatable": {name.replace("__", "/").replace("_", "."): n for name, n in devices.items()}
        }
    }


class Cluster:
    """A launcher on a cluster in memory, with one engine."""

    def __init__(self, folder: Path, *, kuberay: bool) -> None:
        for name, container in (("cpu", {}), ("gpu", GPU)):
            pod = {"spec": {"containers": [{"name": "engine", "image": "lathe/engine:1", **container}]}}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(pod))
        self.clock = FakeClock()
        self.api = FakeKubeApi(self.clock, kuberay=kuberay)
        self.kind = Kind.RAYJOB if kuberay else Kind.DEPLOYMENT
        frame = Frame("lathe", "lathe", "jobs:7460", "2.60.0")
        self.launcher = KubernetesLauncher(self.api, frame, folder, self.clock)

    async def start(self, engine_class: str = "cpu") -> None:
        await self.launcher.start(launch(engine_class))

    def says(self, **status: Any) -> None:
        """The controller writes this into the status of the engine's object."""
        self.api.put(self.kind, {**self.api.made(self.kind, "eng-1"), "status": status})

    async def engine(self) -> LaunchedEngine:
        self.clock.tick(2)
        [found] = await self.launcher.list()
        return found

    def warn(self, name: str, reason: str, message: str) -> None:
        event = {
            "metadata": {"name": f"{name}.{reason}"},
            "type": "Warning",
            "reason": reason,
            "message": message,
        }
        self.api.put(Kind.EVENT, {**event, "involvedObject": {"name": name}, "lastTimestamp": reason})


@pytest.fixture
def ray(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, kuberay=True)


@pytest.fixture
def plain(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, kuberay=False)


# --- starting ---


async def test_kuberay_is_used_where_it_is(ray: Cluster, plain: Cluster) -> None:
    await ray.start()
    await plain.start()
    assert ray.api.list(Kind.RAYJOB) and not ray.api.list(Kind.DEPLOYMENT)
    assert plain.api.list(Kind.DEPLOYMENT)


async def test_what_is_made_belongs_to_the_deployment_of_jobs(plain: Cluster) -> None:
    plain.launcher.owner_deployment = "lathe-jobs"
    with pytest.raises(FailedPrecondition, match="OWNER_DEPLOYMENT"):
        await plain.start()
    plain.api.put(Kind.DEPLOYMENT, {"metadata": {"name": "lathe-jobs", "uid": "uid-of-jobs"}})
    await plain.start()
    made = plain.api.made(Kind.DEPLOYMENT, "eng-1")
    assert made["metadata"]["ownerReferences"][0]["uid"] == "uid-of-jobs"
    assert [engine.engine_id for engine in await plain.launcher.list()] == ["eng-1"]


async def test_an_unknown_class_names_those_there_are(ray: Cluster) -> None:
    with pytest.raises(FailedPrecondition, match="'tpu'; there are cpu, gpu"):
        await ray.start("tpu")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (PermissionDenied("may not create rayjobs"), FailedPrecondition),
        (PermissionDenied("forbidden: exceeded quota: small"), Unavailable),
        (InvalidArgument("no such field"), FailedPrecondition),
        (NotFound("no such resource"), Unavailable),
        (Unavailable("down"), Unavailable),
    ],
)
async def test_a_refusal_is_for_ever_only_if_waiting_cannot_help(
    ray: Cluster, answer: LatheError, expected: type[LatheError]
) -> None:
    ray.api.refuses["create", ray.kind] = answer
    with pytest.raises(expected):
        await ray.start()


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        (404, "NotFound", NotFound),
        (403, "Forbidden", PermissionDenied),
        (422, "Invalid", InvalidArgument),
        (500, "InternalError", Unavailable),
        (429, "TooManyRequests", Unavailable),
        (410, "Expired", Unavailable),
        (409, "AlreadyExists", AlreadyExists),
        # Of two that count against one quota, one is told to come again: nothing was made.
        (409, "Conflict", Unavailable),
        # So says an API server that has just started of every token.
        (401, "Unauthorized", Unavailable),
    ],
)
def test_an_http_status_is_an_error_of_ours(status: int, reason: str, expected: type[LatheError]) -> None:
    assert type(refusal(status, "GET /x", "because", reason)) is expected


def test_a_token_that_is_half_replaced_is_an_api_that_is_away() -> None:
    """As anything else it would end the reconciler's pass before it looks at the leases."""
    settings = Configuration(host="http://nowhere.invalid", api_key={"authorization": "bearer old"})

    def empty_for_a_moment(_: Configuration) -> None:
        raise ConfigException("Token file exists but empty.")

    settings.refresh_api_key_hook = empty_for_a_moment
    api = HttpKubeApi(ApiClient(settings), "lathe")
    with pytest.raises(Unavailable, match="Token file exists but empty"):
        api.list(Kind.POD)


# --- what runs ---


async def test_one_answer_is_good_for_a_second(ray: Cluster) -> None:
    await ray.start()
    await ray.engine()
    asked = len(ray.api.calls)
    await ray.launcher.list()
    assert len(ray.api.calls) == asked
    # What was just stopped or started is seen at once.
    await ray.launcher.stop("eng-1")
    assert not await ray.launcher.list()


async def test_an_api_that_is_away_is_no_dead_engine(ray: Cluster) -> None:
    await ray.start()
    ray.api.down = Unavailable("no answer")
    ray.clock.tick(2)
    with pytest.raises(Unavailable):
        await ray.launcher.list()


@pytest.mark.parametrize("engines", ["auto", "rayjob"])
async def test_kuberay_that_is_not_served_for_a_moment_is_no_dead_engine(ray: Cluster, engines: Any) -> None:
    """An API server that has just started may not know every kind yet."""
    ray.launcher.engines = engines
    await ray.start()
    for seconds in (2, 40):
        assert (await ray.engine()).running
        ray.api.kuberay = False
        ray.clock.tick(seconds)
        for _ in range(2):
            with pytest.raises(Unavailable, match="RayJob"):
                await ray.launcher.list()
        ray.api.kuberay = True


async def test_kuberay_that_was_removed_is_believed_to_be_after_a_while(ray: Cluster) -> None:
    await ray.start()
    assert (await ray.engine()).running
    ray.api.kuberay = False
    for _ in range(30):
        ray.clock.tick(2)
        with suppress(Unavailable):
            await ray.launcher.list()
    await ray.start()
    assert ray.api.list(Kind.DEPLOYMENT)


async def test_an_engine_of_another_release_is_not_ours(plain: Cluster) -> None:
    await plain.start()
    other = plain.api.made(Kind.DEPLOYMENT, "eng-1")
    labels = {**other["metadata"]["labels"], "app.kubernetes.io/instance": "second"}
    plain.api.put(Kind.DEPLOYMENT, {**other, "metadata": {"name": "other", "labels": labels}})
    assert len(await plain.launcher.list()) == 1


# --- what ended ---


@pytest.mark.parametrize(
    ("status", "words", "killed", "said"),
    [
        ({"jobStatus": "SUCCEEDED"}, "exit code 0", False, ""),
        (
            {
                "jobStatus": "FAILED",
                "message": "Job entrypoint command failed with exit code 1, last available logs "
                "(truncated to 20,000 chars):\nloading\nno weights here\n",
            },
            "exit code 1",
            False,
            "no weights here",
        ),
        (
            {"jobStatus": "FAILED", "message": "failed with exit code -9, last"},
            "killed by signal 9",
            True,
            "",
        ),
        (
            {"jobStatus": "STOPPED", "message": "Job was stopped."},
            "Ray says STOPPED: Job was stopped.",
            True,
            "",
        ),
        ({"message": "Failed to start supervisor"}, "Ray says Failed: Failed to start supervisor", False, ""),
    ],
)
async def test_ray_says_how_an_engine_ended(
    ray: Cluster, status: dict[str, str], words: str, killed: bool, said: str
) -> None:
    await ray.start()
    ray.api.add_pod("eng-1", RUNNING)
    ray.says(jobDeploymentStatus="Failed", **status)
    assert await ray.engine() == LaunchedEngine("eng-1", False, words, killed, said)


async def test_a_head_that_is_gone_took_its_engine_along(ray: Cluster) -> None:
    await ray.start()
    ray.says(jobDeploymentStatus="Running", dashboardURL="head:8265")
    assert await ray.engine() == LaunchedEngine("eng-1", False, "its pod is gone", killed=True)


async def test_a_pod_on_a_lost_node_hangs_in_its_end(ray: Cluster, plain: Cluster) -> None:
    for cluster in (ray, plain):
        await cluster.start()
        cluster.api.add_pod("eng-1", RUNNING, deletionTimestamp="2026-01-01T00:00:00Z")
        found = await cluster.engine()
        assert not found.running and found.killed


async def test_a_pod_that_drains_has_its_engine_until_its_time_is_up(ray: Cluster) -> None:
    await ray.start()
    ray.says(jobDeploymentStatus="Running", jobStatus="RUNNING", dashboardURL="head:8265")
    ray.api.add_pod(
        "eng-1", state(ready=True, state={"running": {}}), deletionTimestamp="2026-01-01T00:01:00Z"
    )
    assert (await ray.engine()).running
    ray.clock.tick(60)
    assert not (await ray.engine()).running


async def test_a_pod_that_never_began_has_nothing_to_drain(ray: Cluster) -> None:
    """One that was placed on a lost node: the eviction is its end, and the next engine need not wait."""
    await ray.start()
    ray.says(jobDeploymentStatus="Initializing")
    ray.api.add_pod("eng-1", {"phase": "Pending"}, deletionTimestamp="2026-01-01T00:01:00Z")
    assert not (await ray.engine()).running


async def test_the_next_engine_keeps_away_from_a_lost_ones_node(ray: Cluster, plain: Cluster) -> None:
    for cluster in (ray, plain):
        await cluster.start()
        cluster.api.add_pod("eng-1", RUNNING, node="worker-1", deletionTimestamp="2026-01-01T00:00:00Z")
        await cluster.launcher.start(replace(launch(), engine_id="eng-2", avoid=("eng-1", "eng-0")))
        cluster.api.add_pod("eng-2", RUNNING)
        [pod] = cluster.api.pods("eng-2")
        affinity = pod["spec"]["affinity"]["nodeAffinity"]
        [wish] = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        [field] = wish["preference"]["matchFields"]
        assert field == {"key": "metadata.name", "operator": "NotIn", "values": ["worker-1"]}
        await cluster.launcher.start(replace(launch(), engine_id="eng-3", avoid=("eng-2",)))
        cluster.api.add_pod("eng-3", RUNNING)
        [pod] = cluster.api.pods("eng-3")
        assert "affinity" not in pod["spec"]


async def test_an_object_that_is_being_deleted_is_forgotten(ray: Cluster) -> None:
    await ray.start()
    made = ray.api.made(Kind.RAYJOB, "eng-1")
    made["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    ray.clock.tick(2)
    assert not await ray.launcher.list()


async def test_the_last_words_of_an_engine_that_logs_json_are_its_message(plain: Cluster) -> None:
    """They are shown to whoever waits for the engine."""
    await plain.start()
    plain.api.add_pod("eng-1", state(state={"terminated": {"exitCode": 1, "reason": "Error"}}), "pod-1")
    plain.api.logs["pod-1"] = 'loading\n{"level": "critical", "message": "The cache is full."}\n'
    assert (await plain.engine()).last_log_line == "The cache is full."


async def test_ray_tells_the_message_too(ray: Cluster) -> None:
    await ray.start()
    said = 'Job entrypoint command failed with exit code 1, last logs:\n{"message": "The cache is full."}\n'
    ray.says(jobDeploymentStatus="Failed", jobStatus="FAILED", message=said)
    assert (await ray.engine()).last_log_line == "The cache is full."


async def test_a_container_that_was_started_again_lost_its_engine(plain: Cluster) -> None:
    await plain.start()
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    plain.api.add_pod("eng-1", state(ready=True, restarts=1, lastState=ended, state={"running": {}}), "pod-1")
    plain.api.logs["pod-1 previous"] = "loading\nno weights here\n\n"
    assert await plain.engine() == LaunchedEngine("eng-1", False, "exit code 1", False, "no weights here")


async def test_a_pod_that_a_controller_replaced_lost_its_engine(plain: Cluster) -> None:
    await plain.start()
    plain.api.add_pod("eng-1", RUNNING, "old", deletionTimestamp="2026-01-01T00:00:00Z")
    plain.api.add_pod("eng-1", RUNNING, "new")
    assert await plain.engine() == LaunchedEngine("eng-1", False, "its pod is gone", killed=True)


async def test_too_little_memory_is_no_kill_from_outside(plain: Cluster) -> None:
    await plain.start()
    plain.api.add_pod("eng-1", state(state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}))
    found = await plain.engine()
    assert "OOMKilled" in found.exit_status and not found.killed


async def test_an_eviction_says_why(ray: Cluster) -> None:
    await ray.start()
    ray.api.add_pod(
        "eng-1", {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."}
    )
    assert (await ray.engine()).exit_status == "its pod ended: Evicted The node was low on memory."


@pytest.mark.parametrize(
    "said",
    [
        'Usage of EmptyDir volume "cache" exceeds the limit "1Mi". ',
        'Container engine exceeded its local ephemeral storage limit "1Gi". ',
        "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ",
    ],
)
async def test_a_pod_that_used_too_much_room_is_no_kill_from_outside(ray: Cluster, said: str) -> None:
    """Another one would fare the same: it counts, and says what to raise. The signal that ended it says nothing."""
    await ray.start()
    ended = {"name": "engine", "state": {"terminated": {"exitCode": 137, "reason": "Error"}}}
    evicted = {"phase": "Failed", "reason": "Evicted", "message": said, "containerStatuses": [ended]}
    ray.api.add_pod("eng-1", evicted)
    found = await ray.engine()
    assert said.strip() in found.exit_status and "engines.cache.sizeLimit" in found.exit_status
    assert not found.killed and not found.last_log_line


# --- what it waits for ---


async def test_nothing_is_said_of_an_engine_that_runs(ray: Cluster) -> None:
    await ray.start()
    assert await ray.engine() == LaunchedEngine("eng-1", running=True)
    ray.api.add_pod("eng-1", state(ready=True, state={"running": {}}))
    ray.says(jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert await ray.engine() == LaunchedEngine("eng-1", running=True)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (unplaced("0/3 nodes are available: 3 Insufficient cpu. preemption: none."), "3 Insufficient cpu."),
        (
            waiting("ImagePullBackOff", 'Back-off pulling image "lathe/engine:1"'),
            "image lathe/engine:1 cannot be pulled",
        ),
        (waiting("CreateContainerConfigError", 'secret "keys" not found'), 'secret "keys" not found'),
    ],
)
async def test_a_pod_says_what_it_waits_for(ray: Cluster, status: dict[str, Any], words: str) -> None:
    await ray.start()
    ray.api.add_pod("eng-1", status)
    found = await ray.engine()
    assert found.running and words in found.waiting_for and "preemption" not in found.waiting_for


async def test_a_volume_that_does_not_come_is_named(plain: Cluster) -> None:
    await plain.start()
    plain.api.add_pod("eng-1", waiting("ContainerCreating", ""), "pod-1")
    assert (await plain.engine()).waiting_for == ""
    plain.warn("pod-1", "FailedMount", 'MountVolume.SetUp failed: secret "lathe-engine-tls" not found')
    assert "lathe-engine-tls" in (await plain.engine()).waiting_for


async def test_a_gpu_that_nobody_has_differs_from_one_in_use(ray: Cluster) -> None:
    await ray.start("gpu")
    ray.api.add_pod("eng-1", unplaced("0/2 nodes are available: 2 Insufficient nvidia.com/gpu."))
    ray.api.put(Kind.NODE, {"metadata": {"name": "a"}, **node(cpu=4)})
    ray.api.put(Kind.NODE, {"metadata": {"name": "b"}, **node(cpu=4)})
    assert (
        "none of the 2 nodes offers nvidia.com/gpu, which engines of class 'gpu' need"
        in (await ray.engine()).waiting_for
    )
    ray.api.put(Kind.NODE, {"metadata": {"name": "b"}, **node(nvidia_com__gpu=1)})
    ray.clock.tick(60)
    assert "0 of 2 nodes have nvidia.com/gpu free" in (await ray.engine()).waiting_for


async def test_without_the_right_to_see_nodes_the_scheduler_is_quoted(ray: Cluster) -> None:
    await ray.start("gpu")
    ray.api.refuses["list", Kind.NODE] = PermissionDenied("nodes is forbidden")
    ray.api.add_pod("eng-1", unplaced("0/2 nodes are available: 2 Insufficient nvidia.com/gpu."))
    assert "2 Insufficient nvidia.com/gpu" in (await ray.engine()).waiting_for


async def test_an_operator_that_takes_nothing_is_named(ray: Cluster) -> None:
    await ray.start()
    assert (await ray.engine()).waiting_for == ""
    ray.clock.tick(20)
    assert "KubeRay's operator has not taken" in (await ray.engine()).waiting_for


async def test_a_pod_that_may_not_be_made(ray: Cluster, plain: Cluster) -> None:
    await ray.start()
    ray.says(jobDeploymentStatus="Initializing", rayClusterName="cluster-1")
    ray.clock.tick(20)
    ray.warn("cluster-1", "FailedToCreateHeadPod", 'violates PodSecurity "restricted:latest"')
    assert "PodSecurity" in (await ray.engine()).waiting_for
    await plain.start()
    condition = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: small"}
    plain.says(conditions=[condition])
    assert "exceeded quota: small" in (await plain.engine()).waiting_for


# --- the doctor ---


async def test_the_doctor_says_what_engines_run_as(ray: Cluster, plain: Cluster) -> None:
    found = {finding.name: finding for finding in await ray.launcher.check()}
    assert all(finding.ok for finding in found.values())
    assert "RayJob" in found["kuberay"].message and not found["kuberay"].advice
    found = {finding.name: finding for finding in await plain.launcher.check()}
    assert found["kuberay"].ok and "Deployment" in found["kuberay"].message and found["kuberay"].advice


async def test_the_doctor_counts_gpus(ray: Cluster) -> None:
    ray.api.put(Kind.NODE, {"metadata": {"name": "a"}, **node(nvidia_com__gpu=4)})
    [gpus] = [finding for finding in await ray.launcher.check() if finding.name == "gpus"]
    assert gpus.message == "1 of 1 nodes offer nvidia.com/gpu, 4 in all."


async def test_the_doctor_finds_an_operator_that_is_not_there(ray: Cluster) -> None:
    await ray.start()
    ray.clock.tick(60)
    [operator] = [finding for finding in await ray.launcher.check() if finding.name == "kuberay operator"]
    assert not operator.ok and "app.kubernetes.io/name=kuberay-operator" in operator.advice


async def test_the_doctor_is_told_when_nothing_answers(ray: Cluster) -> None:
    ray.api.down = Unavailable("no route to host")
    found = await ray.launcher.check()
    assert not found[0].ok and "no route to host" in found[0].message
    ray.api.down = None
    ray.api.refuses["list", Kind.POD] = PermissionDenied("pods is forbidden")
    [rights] = [finding for finding in await ray.launcher.check() if finding.name == "engine rights"]
    assert not rights.ok and "pods is forbidden" in rights.message


# --- several workers ---

WORKER = {"ray.io/node-type": "worker"}


async def a_gang(ray: Cluster) -> None:
    await ray.launcher.start(replace(launch(), job_id="job-1", workers=2))
    ray.api.add_pod("eng-1", state(ready=True, state={"running": {}}), name="head")


def add_worker(ray: Cluster, status: dict[str, Any], name: str = "worker", **metadata: Any) -> None:
    labels = ray.api.pods("eng-1")[0]["metadata"]["labels"] | WORKER
    ray.api.add_pod("eng-1", status, name=name, labels=labels, **metadata)


async def test_a_gang_says_what_one_of_its_workers_waits_for(ray: Cluster) -> None:
    await a_gang(ray)
    assert not (await ray.engine()).waiting_for
    add_worker(ray, unplaced("0/3 nodes are available: 3 Insufficient cpu."))
    found = await ray.engine()
    assert found.running and "Insufficient cpu" in found.waiting_for


async def test_the_engine_of_a_gang_lives_as_long_as_its_head(ray: Cluster) -> None:
    await a_gang(ray)
    add_worker(ray, {"phase": "Failed"})
    assert (await ray.engine()).running
    ray.api.delete(Kind.POD, "head")
    add_worker(ray, RUNNING, "another")
    ray.says(dashboardURL="head:8265")
    found = await ray.engine()
    assert not found.running and found.killed


async def test_a_gang_needs_kuberay(ray: Cluster, plain: Cluster) -> None:
    assert await ray.launcher.why_one_worker() == ""
    assert "KubeRay" in await plain.launcher.why_one_worker()
    with pytest.raises(FailedPrecondition, match="KubeRay"):
        await plain.launcher.start(replace(launch(), workers=2))
    assert not plain.api.list(Kind.DEPLOYMENT)
