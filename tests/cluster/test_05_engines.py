"""Engines on the cluster: pools grow and shrink, Ray is closed, GPUs are waited for, and nothing is left over.

In a release of its own: what is counted here must be made by these jobs alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lathe.client import Client
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.cluster.conftest import END_S, START_S
from tests.cluster.harness.commands import until
from tests.cluster.harness.engines import (
    GPU,
    ask_ray,
    dedicated_to,
    first_owner,
    gpu_on,
    made_for_engines,
    names,
    orphan,
    placed,
    pods_of,
    rayjobs,
    ready_workers,
)
from tests.cluster.harness.helm import Helm, merged
from tests.cluster.harness.kind import Kind
from tests.cluster.harness.kubectl import Kubectl, Object
from tests.cluster.harness.reach import Target, reached
from tests.cluster.harness.release import Release, installed
from tests.e2e.survival import check_history, start_long, upload_long, wait_for_step, wait_for_success
from tests.fixtures.tiny_chat import write_tiny_chat

NAMESPACE = "lathe-engines"
IDLE_S = 8.0
# Idle, then the engine's drain, Ray's end and the pod's.
GONE_S = 120.0
NOBODYS = "eng-nobodys"


def engine_values(values: dict[str, Any], least: int) -> dict[str, Any]:
    """Small pools that shrink soon; a class that asks for a GPU, and for nothing behind it.

    A slice holds two rows at most, so that each worker of a job has a share of every batch.
    """
    resources = values["engines"]["classes"]["cpu"]["resources"]
    engines = {
        "min": least,
        "maxPerBase": 2,
        "idleTimeoutSeconds": int(IDLE_S),
        "settings": {"LATHE_ENGINE_TRAIN_TOKENS_PER_SLICE": "64"},
        "classes": {"gpu": {"device": "cpu", "gpus": 1, "resources": resources}},
    }
    jobs = {"settings": {"LATHE_JOBS_ENGINE_STOP_TIMEOUT_S": "30"}}
    return merged(values, {"engines": engines, "jobs": jobs})


@dataclass(frozen=True, slots=True)
class Pools:
    """A release whose engines are watched, and a job for them."""

    release: Release
    client: Client
    base_model: str
    dataset: datasets_pb2.Dataset

    @property
    def kubectl(self) -> Kubectl:
        return self.release.kubectl

    def job(self, n_epochs: int = 4, **how: Any) -> jobs_pb2.Job:
        return self.client.jobs.create(
            self.base_model, self.dataset.name, seed=11, n_epochs=n_epochs, batch_size=4, **how
        )

    def wait_for_pool(self, size: int, timeout: float, engine_class: str = "cpu") -> list[Object]:
        """Until so many engines are there that nobody has told to end."""
        until(
            lambda: len(rayjobs(self.kubectl, engine_class)) == size,
            timeout,
            f"{size} engines of class {engine_class}",
        )
        return rayjobs(self.kubectl, engine_class)


@pytest.fixture(scope="module")
def own(kind: Kind, kubectl: Kubectl, values: dict[str, Any]) -> Iterator[Release]:
    there = Release(kind, Helm(kind.kubeconfig), kubectl.within(NAMESPACE), "lathe")
    with installed(there, engine_values(values, least=1)) as release:
        release.kubectl.apply(orphan(release, NOBODYS))
        yield release


@pytest.fixture(scope="module")
def pools(own: Release, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    with own.client(timeout=120) as client:
        folder = write_tiny_chat(tmp_path_factory.mktemp("tiny"))
        model = client.models.import_folder(folder, "tiny", license="Apache-2.0", source="made by a test")
        yield Pools(own, client, model.name.removeprefix("baseModels/"), upload_long(client))


def test_a_pool_grows_with_the_queue_and_shrinks_to_its_minimum(pools: Pools) -> None:
    assert rayjobs(pools.kubectl) == []
    started = time.monotonic()
    jobs = [pools.job() for _ in range(3)]
    pools.wait_for_pool(2, START_S)
    print(f"\n   the second engine after {time.monotonic() - started:.0f} s", flush=True)
    for job in jobs:
        wait_for_success(pools.client, job, START_S + END_S)
    pools.wait_for_pool(1, GONE_S)


def test_everything_made_has_an_owner_and_an_expiry(pools: Pools) -> None:
    [rayjob] = pools.wait_for_pool(1, GONE_S)
    deployment = pools.kubectl.get("deployment", f"{pools.release.full_name}-jobs")
    [owner] = rayjob["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("Deployment", deployment["metadata"]["uid"])
    assert rayjob["spec"]["shutdownAfterJobFinishes"] is True
    assert 0 < rayjob["spec"]["ttlSecondsAfterFinished"] <= 3600
    nobodys = orphan(pools.release, NOBODYS)["metadata"]["name"]
    name = f"Deployment/{deployment['metadata']['name']}"

    def made() -> list[Object]:
        return [one for one in made_for_engines(pools.kubectl) if one["metadata"]["name"] != nobodys]

    def without_owner() -> list[str]:
        found = made()
        return names([one for one in found if first_owner(one, found) != name])

    # The engine that was too many goes from above: what is below it loses its owner a moment before it goes.
    until(lambda: not without_owner(), GONE_S, f"{name} to own all of this: {without_owner()}")
    assert {"RayJob", "RayCluster", "Pod", "Service", "Secret"} <= {one["kind"] for one in made()}


def test_ray_refuses_a_caller_without_its_token(pools: Pools) -> None:
    pod = pools.release.wait_for_engine()["metadata"]["name"]
    for question, (nobody, guesser, insider) in ask_ray(pools.kubectl, pod).items():
        refused = {401, 403} if question.startswith("8265") else {"UNAUTHENTICATED"}
        assert {nobody, guesser} <= refused, f"{question}: {nobody}, {guesser}"
        assert insider not in refused, f"{question}: {insider}"


def test_the_dashboard_is_not_exposed(pools: Pools) -> None:
    """Only within the cluster, where the network policy lets nobody but the operator in."""
    with_ray = [
        service
        for service in pools.kubectl.items("services")
        if {port["port"] for port in service["spec"]["ports"]} & {8265, 6379, 10001}
    ]
    assert with_ray
    assert {service["spec"]["type"] for service in with_ray} == {"ClusterIP"}
    assert not any(service["spec"].get("externalIPs") for service in with_ray)
    assert pools.kubectl.items("ingresses") == []
    container = pools.release.pod("engine")["spec"]["containers"][0]
    assert not any("hostPort" in port for port in container["ports"])


def test_a_dedicated_engine_serves_its_job_and_goes_with_it(pools: Pools) -> None:
    [shared] = pools.wait_for_pool(1, GONE_S)
    job = pools.job(dedicated=True)
    until(lambda: dedicated_to(pools.kubectl, job.name), START_S, "an engine of the job's own")
    # The pool has an engine that idles: it must not take the job, nor the job's engine another one's.
    other = pools.job(n_epochs=1)
    wait_for_success(pools.client, other, START_S)
    assert pools.client.jobs.get(job.name).state == jobs_pb2.JOB_STATE_QUEUED
    wait_for_success(pools.client, job, START_S)
    until(
        lambda: not dedicated_to(pools.kubectl, job.name),
        GONE_S,
        "the job's own engine to be gone",
    )
    [still] = rayjobs(pools.kubectl)
    assert still["metadata"]["uid"] == shared["metadata"]["uid"]


def test_a_job_of_two_workers_loses_one_and_ends_as_on_one(pools: Pools) -> None:
    """The worker that is not the engine is killed in the middle of the job."""
    alone = wait_for_success(pools.client, pools.job(), START_S)
    job = pools.job(workers=2)
    [worker] = until(lambda: ready_workers(pools.kubectl, job.name), START_S, "the worker's pod")
    check_network(pools, job, worker)
    wait_for_step(pools.client, job, 60, START_S)
    started = time.monotonic()
    pools.kubectl.kill(worker["metadata"]["name"])
    until(lambda: pools.client.jobs.get(job.name).attempt_count == 2, START_S, "a second attempt")
    print(f"\n   the second attempt after {time.monotonic() - started:.0f} s", flush=True)
    job = wait_for_success(pools.client, job, START_S + END_S)
    assert (job.attempt_count, job.lost_lease_count) == (2, 1)
    check_history(pools.client, job)
    # The engine noticed and said so: nobody had to wait for its lease to run out.
    assert any("A worker of this job was lost" in one.message for one in pools.client.jobs.events(job.name))
    assert losses(pools.client, job) == pytest.approx(losses(pools.client, alone), abs=1e-5)
    until(lambda: not dedicated_to(pools.kubectl, job.name), GONE_S, "the job's own engine to be gone")


def check_network(pools: Pools, job: jobs_pb2.Job, worker: Object) -> None:
    """The engine reaches its worker on any port; the engine of a pool and a service reach it on none."""
    ports = [Target("worker", port, worker["status"]["podIP"]) for port in (52365, 40000)]
    name = worker["metadata"]["name"]
    [engine] = [pod for pod in pods_of(pools.kubectl, job.name) if pod["metadata"]["name"] != name]
    assert reached(pools.kubectl, engine, ports, "engine") == {("worker", 52365), ("worker", 40000)}
    [other] = placed(pools.kubectl)
    assert reached(pools.kubectl, other, ports, "engine") == set()
    assert reached(pools.kubectl, pools.release.pod("gateway"), ports) == set()


def losses(client: Client, job: jobs_pb2.Job) -> list[float]:
    """Of each step, the last one first."""
    events = client.jobs.events(job.name)
    return [one.metrics.train_loss for one in events if one.type == jobs_pb2.EVENT_TYPE_METRICS]


def test_an_empty_pool_goes_to_zero(pools: Pools, values: dict[str, Any]) -> None:
    """The minimum is changed by an upgrade, which the engine survives."""
    [engine] = rayjobs(pools.kubectl)
    pools.release.upgrade(engine_values(values, least=0))
    name = engine["metadata"]["name"]
    until(lambda: not pools.kubectl.exists("rayjob", name), GONE_S, "the last engine to be gone")


def test_a_gpu_is_waited_for_by_name(pools: Pools) -> None:
    job = pools.job(n_epochs=1, engine_class="gpu")
    nodes = len(pools.kubectl.items("nodes"))
    until(
        lambda: f"none of the {nodes} nodes offers {GPU}" in pools.client.jobs.get(job.name).state_reason,
        START_S,
        "the job to say what it waits for",
    )
    node = pools.release.kind.workers()[-1]
    with gpu_on(pools.kubectl, node):
        [pod] = until(lambda: placed(pools.kubectl, "gpu"), START_S, "the engine to find the GPU")
        assert pod["spec"]["nodeName"] == node
        assert wait_for_success(pools.client, job, START_S).compute.engine_class == "gpu"
        # It idles and goes: what stayed on a GPU would cost most.
        pools.wait_for_pool(0, GONE_S, "gpu")


def test_nothing_is_left_over(pools: Pools) -> None:
    """After jobs that ended, one whose engine was killed, one that was cancelled at work and one while it waited."""
    waiting = pools.job(engine_class="gpu")
    job = start_long(pools.client, pools.base_model, pools.dataset)
    wait_for_step(pools.client, job, 20, START_S)
    [busy] = placed(pools.kubectl)
    assert pools.release.signal_engine(busy, "KILL")
    until(lambda: pools.client.jobs.get(job.name).attempt_count == 2, START_S, "a second attempt")
    assert GPU in pools.client.jobs.get(waiting.name).state_reason
    for one in (waiting, job):
        pools.client.jobs.cancel(one.name)
    started = time.monotonic()
    until(
        lambda: not made_for_engines(pools.kubectl),
        2 * GONE_S,
        f"all of this to go: {names(made_for_engines(pools.kubectl))}",
    )
    print(f"\n   nothing is left after {time.monotonic() - started:.0f} s", flush=True)
    time.sleep(IDLE_S)
    assert names(made_for_engines(pools.kubectl)) == []
