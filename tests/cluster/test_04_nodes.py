"""Nodes fail, engines stand still: no job is lost, none runs twice, what wakes up later is refused."""

from __future__ import annotations

import time

import pytest

from lathe.client import Client
from tests.cluster.conftest import Work
from tests.cluster.harness.commands import until
from tests.cluster.harness.nodes import cut_off, leave_alone_with_the_engine, stopped
from tests.cluster.harness.release import SERVICES, Release
from tests.cluster.harness.streams import open_streams

# Kubernetes takes 50 s to notice that a node is lost, and gives its pods 10 s more.
NODE_LOST_S = 60.0
RECOVERED_S = 300.0
STREAM_SAID_S = 30.0


@pytest.mark.fast
def test_the_engines_node_is_lost(release: Release, work: Work) -> None:
    """The lease decides, not the node: the job goes on long before Kubernetes has noticed."""
    first = work.begin()
    node = release.node_of("engine")
    leave_alone_with_the_engine(release, node)
    # The next one would share its passes, and then not end with the same last bits.
    work.finish(first)
    job = work.begin()
    assert release.node_of("engine") == node
    with open_streams(work.platform, work.base_model) as streams:
        started = time.monotonic()
        with stopped(release, node):
            lost_at = work.client.jobs.get(job.name).step
            until(
                lambda: work.client.jobs.get(job.name).step > lost_at, RECOVERED_S, "a step on another node"
            )
            print(f"\n   the next step elsewhere after {time.monotonic() - started:.0f} s", flush=True)
            job = work.check(job)
    assert job.lost_lease_count == 1
    streams.check_none_hung(STREAM_SAID_S)
    recovered(release, work)


def test_a_node_with_everything_on_it_is_lost(release: Release, work: Work) -> None:
    """Services and all: they come back elsewhere when Kubernetes has noticed."""
    job = work.begin()
    node = release.node_of("jobs")
    with stopped(release, node):
        until(lambda: all_elsewhere(release, node), NODE_LOST_S + RECOVERED_S, f"everything off {node}")
        work.check(job)
    recovered(release, work)


def all_elsewhere(release: Release, node: str) -> bool:
    return all(
        any(pod["spec"]["nodeName"] != node for pod in release.ready_pods(service)) for service in SERVICES
    )


def test_a_workers_network_is_cut_for_90_seconds(release: Release, work: Work) -> None:
    """The engine there goes on and cannot tell anybody: what it reports later is refused."""
    job = work.begin()
    node = release.node_of("engine")
    with cut_off(release, node):
        time.sleep(90)
    work.check(job)
    recovered(release, work)


def test_an_engine_stands_still_for_a_minute(release: Release, work: Work) -> None:
    job = work.begin()
    zombie = release.pod("engine")
    assert release.signal_engine(zombie, "STOP"), "no process of the engine was found"
    stopped_at = time.monotonic()
    try:
        until(
            lambda: work.client.jobs.get(job.name).attempt_count == 2,
            RECOVERED_S,
            "an attempt on another engine",
        )
        time.sleep(max(0.0, stopped_at + 60 - time.monotonic()))
    finally:
        # It may be gone by now: the launcher deletes what was given up.
        release.signal_engine(zombie, "CONT")
    job = work.check(job)
    assert (job.attempt_count, job.lost_lease_count) == (2, 1)
    name = zombie["metadata"]["name"]
    until(
        lambda: name not in {pod["metadata"]["name"] for pod in release.pods("engine")},
        RECOVERED_S,
        "the engine that stood still to be gone",
    )


def test_a_node_is_drained(release: Release, work: Work) -> None:
    """The engine checkpoints, gives its lease back and goes: nothing is lost and no lease runs out."""
    job = work.begin()
    node = release.node_of("engine")
    drain(release, node)
    try:
        job = work.check(job)
    finally:
        release.kubectl.run("uncordon", node)
    assert job.lost_lease_count == 0
    recovered(release, work)


def test_workers_one_at_a_time(release: Release, work: Work) -> None:
    job = work.begin(n_epochs=12)
    for node in release.kind.workers():
        with stopped(release, node):
            until(
                lambda node=node: all_elsewhere(release, node), NODE_LOST_S + RECOVERED_S, f"all off {node}"
            )
        recovered(release, work)
    work.finish(job)


def drain(release: Release, node: str) -> None:
    flags = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s")
    release.kubectl.run("drain", node, *flags, timeout=200)


def recovered(release: Release, work: Work) -> None:
    """Everything is ready again, and the platform takes work."""
    release.wait_ready()
    with release.client() as client:
        assert_serves(client, work.base_model)


def assert_serves(client: Client, model: str) -> None:
    assert client.chat(model, [{"role": "user", "content": "Hello!"}], max_tokens=4, timeout=180).choices
