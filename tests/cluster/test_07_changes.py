"""A release changes while a job runs and streams are open: other values and back, more replicas, new certificates."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lathe.v1 import jobs_pb2
from tests.cluster.conftest import START_S, Work
from tests.cluster.harness import certificates
from tests.cluster.harness.commands import until
from tests.cluster.harness.helm import merged
from tests.cluster.harness.kind import timed
from tests.cluster.harness.kubectl import Object
from tests.cluster.harness.release import SERVERS, SERVICES, Release
from tests.cluster.harness.streams import Streams, open_streams

# What the chart's README says of drain.streamGraceSeconds: a stream that was open has this long to end.
GRACE_S = 60.0
# A stream whose gateway was killed, and one that stands still while everything starts anew on a small machine.
BROKEN_S = 5.0
STILL_S = 20.0
GONE_S = 120.0
# By component the names of its pods, and how often their containers were started again.
Pods = dict[str, dict[str, int]]
SCALED_S = 180.0
WIDE: dict[str, Any] = {
    "datasets": {"settings": {"LATHE_DATASETS_VALIDATION_WORKERS": "1"}},
    "gateway": {"replicas": 3},
    "jobs": {"replicas": 3},
}
# The level is a setting of every service. Jobs is one again, and the gateway has who scales it.
LOUD: dict[str, Any] = {
    "log": {"level": "DEBUG"},
    "gateway": {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 3}},
}


@pytest.fixture(scope="module", autouse=True)
def as_it_was(release: Release, values: dict[str, Any]) -> Iterator[None]:
    """Whatever a test leaves, the next module finds the release with its own values."""
    yield
    upgrade(release, values, "back")
    settled(release)


@pytest.fixture
def wide(release: Release, values: dict[str, Any]) -> None:
    """Three replicas of jobs and the gateway."""
    if any(len(release.ready_pods(service)) < 3 for service in ("jobs", "gateway")):
        upgrade(release, merged(values, WIDE), "to three replicas")
        settled(release)


def upgrade(release: Release, values: dict[str, Any], what: str) -> None:
    started = time.monotonic()
    release.upgrade(values)
    timed(f"helm upgrade {what}", started)


def settled(release: Release) -> None:
    """Every pod is ready, and those before it are gone."""
    release.wait_ready()
    until(
        lambda: (
            not any("deletionTimestamp" in pod["metadata"] for one in SERVICES for pod in release.pods(one))
        ),
        GONE_S,
        "the pods before to be gone",
    )


def pods_of(release: Release) -> Pods:
    """For each component its pods that stay, and how often their containers were started again."""
    return {
        component: {
            pod["metadata"]["name"]: sum(one["restartCount"] for one in pod["status"]["containerStatuses"])
            for pod in release.ready_pods(component)
        }
        for component in (*SERVICES, *SERVERS, "engine")
    }


def secrets_of(release: Release) -> dict[str, Object]:
    """Of the chart, byte for byte, and which object it is."""
    chart = f"app.kubernetes.io/instance={release.name},helm.sh/chart"
    found = release.kubectl.items("secrets", chart)
    return {one["metadata"]["name"]: {"uid": one["metadata"]["uid"], **one["data"]} for one in found}


def check_undisturbed(streams: Streams, since: float) -> None:
    """No stream was broken that had not used up the grace, and none stood still."""
    early = [one for one in streams.broken_after(since) if one.ended - one.opened < GRACE_S]
    assert not early, early
    streams.check_none_hung(STILL_S)


def check_untouched(before: Pods, after: Pods, *components: str) -> None:
    """Each pod is still there and was never started again. Of engines one is enough: another base's may have idled."""
    for component in components:
        was, now = before[component].items(), after[component].items()
        assert (was & now) if component == "engine" else was <= now, f"{component}: {was}, {now}"


def check_never_moved(job: jobs_pb2.Job) -> None:
    assert (job.attempt_count, job.lost_lease_count) == (1, 0), job


def test_a_changed_setting_replaces_the_pods_that_read_it(
    release: Release, work: Work, values: dict[str, Any]
) -> None:
    secrets = secrets_of(release)
    assert {f"{release.full_name}-{name}" for name in ("bootstrap", "ca", "store", "jobs-db")} <= set(secrets)
    job = work.begin()
    before = pods_of(release)
    with open_streams(work.platform, work.base_model) as streams:
        changed = time.monotonic()
        upgrade(release, merged(values, WIDE), "to three replicas and another setting of datasets")
        job = work.check(job)
    settled(release)
    check_undisturbed(streams, changed)
    assert streams.served_after(changed)
    check_never_moved(job)
    after = pods_of(release)
    assert not set(after["datasets"]) & set(before["datasets"]), "its setting has changed"
    check_untouched(before, after, "accounts", "models", "gateway", "jobs", *SERVERS, "engine")
    assert {name: len(after[name]) for name in SERVICES} == {
        **{"accounts": 1, "datasets": 1, "models": 1},
        **{"jobs": 3, "gateway": 3},
    }
    [hook] = [
        one for one in release.helm.status(release.name, release.namespace)["hooks"] if one["kind"] == "Job"
    ]
    assert (hook["events"], hook["last_run"]["phase"]) == (["pre-upgrade"], "Succeeded")
    assert secrets_of(release) == secrets


@pytest.mark.usefixtures("wide")
def test_one_of_three_is_killed(release: Release, work: Work) -> None:
    """Jobs beside each other, each once, and each told once, whichever replica was asked."""
    until(lambda: budgets(release) == {"gateway": (3, 1), "jobs": (3, 1)}, GONE_S, "budgets for three pods")
    job, other = work.begin(), work.begin(step=1)
    with open_streams(work.platform, work.base_model) as streams:
        for service in ("jobs", "gateway"):
            killed = time.monotonic()
            release.kubectl.kill(release.pod(service)["metadata"]["name"])
            until(lambda killed=killed: streams.served_after(killed), START_S, "a stream after the kill")
            if service == "jobs":
                assert not streams.broken_after(killed), "jobs is not on a stream's way"
        for one in (work.finish(job), work.finish(other)):
            check_never_moved(one)
    release.wait_ready()
    streams.check_none_hung(STILL_S)
    assert all(one.ended - killed < BROKEN_S for one in streams.broken_after(killed))


def budgets(release: Release) -> dict[str, tuple[int, int]]:
    """Of each service that has one: the pods that it counts, and how many may be away now."""
    return {
        one["metadata"]["labels"]["app.kubernetes.io/component"]: (
            one["status"]["expectedPods"],
            one["status"]["disruptionsAllowed"],
        )
        for one in release.kubectl.items("poddisruptionbudgets")
    }


@pytest.mark.usefixtures("wide")
def test_every_pod_is_replaced_and_the_gateway_scales_itself(
    release: Release, work: Work, values: dict[str, Any]
) -> None:
    secrets = secrets_of(release)
    job = work.begin(n_epochs=24)
    before = pods_of(release)
    with open_streams(work.platform, work.base_model) as streams:
        changed = time.monotonic()
        upgrade(release, merged(values, LOUD), "to another log level")
        scaler = until(lambda: scaled(release), SCALED_S, "the gateway to be scaled by its CPU")
        print(f"   scaled after {time.monotonic() - changed:.0f} s: {scaler}", flush=True)
        after = pods_of(release)
        for service in SERVICES:
            assert not set(after[service]) & set(before[service]), f"{service} logs as before"
        check_untouched(before, after, *SERVERS, "engine")
        upgrade(release, values, "back")
        settled(release)
        job = work.finish(job)
    check_undisturbed(streams, changed)
    check_never_moved(job)
    assert not release.kubectl.items("horizontalpodautoscalers")
    assert secrets_of(release) == secrets


@contextmanager
def gateways_wanted(release: Release) -> Iterator[list[int]]:
    """How many replicas the gateway was told to have while inside, one after the other; known when left."""
    seen: list[int] = []
    name, shown = f"{release.full_name}-gateway", "jsonpath={.spec.replicas} "
    watch = release.kubectl.command("get", "deployment", name, "--watch", "-o", shown)
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield seen
        finally:
            process.terminate()
            seen += map(int, process.communicate(timeout=10)[0].split())


def scaled(release: Release) -> dict[str, int] | None:
    """The autoscaler's figures, once it has the CPU's and as many replicas as it wants."""
    status = release.kubectl.get("horizontalpodautoscaler", f"{release.full_name}-gateway").get("status", {})
    cpu = [one["resource"]["current"].get("averageUtilization") for one in status.get("currentMetrics") or ()]
    replicas = len(release.ready_pods("gateway"))
    if cpu in ([], [None]) or not 2 <= replicas == status["desiredReplicas"]:
        return None
    return {"cpu_percent": cpu[0], "replicas": replicas}


def test_new_certificates_are_followed_without_a_restart(release: Release, work: Work) -> None:
    """By another authority, and back to the first one, while everybody calls everybody."""
    old = certificates.current(release)
    new = certificates.issued_anew(release, f"Another authority, {time.time():.0f}")
    asked = ("accounts", "datasets", "models", "jobs", "engine")
    job = work.begin(n_epochs=16)
    before = pods_of(release)
    try:
        with open_streams(work.platform, work.base_model) as streams:
            started = time.monotonic()
            certificates.replaced(release, old, new)
            timed("new certificates in every pod", started)
            believed, doubted = new["gateway"], old["gateway"]
            answers = certificates.refusals(release, believed, believed.ca, asked)
            assert set(answers.values()) == {"accepted"}, answers
            answers = certificates.refusals(release, doubted, believed.ca, asked)
            assert "accepted" not in answers.values(), answers
            # Another conversation of each with each, by what they hold now.
            work.client.datasets.wait(work.client.datasets.upload(b'{"messages": []}\n').name, timeout=60)
            work.client.chat(work.base_model, [{"role": "user", "content": "Hello!"}], max_tokens=4)
            assert streams.served_after(time.monotonic() - 30)
    finally:
        certificates.replaced(release, new, old)
    job = work.finish(job)
    check_never_moved(job)
    check_undisturbed(streams, started)
    check_untouched(before, pods_of(release), *SERVICES, *SERVERS, "engine")
