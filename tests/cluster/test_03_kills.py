"""Every pod is killed in turn while a job runs and a stream is open: nothing is lost, nothing hangs."""

from __future__ import annotations

import time

import pytest

from tests.cluster.conftest import START_S, Work
from tests.cluster.harness.commands import until
from tests.cluster.harness.release import SERVERS, SERVICES, Release
from tests.cluster.harness.streams import Streams, open_streams

# A stream whose end of the wire died: the client asks for a sign of life and gives up within 20 s; before that comes
# what killing a pod takes. One whose engine died: the gateway notices and says so.
BROKEN_S = 30.0
SAID_S = 30.0


@pytest.mark.fast
@pytest.mark.parametrize("component", ["engine", *SERVICES])
def test_a_pod_is_killed(release: Release, work: Work, component: str) -> None:
    job = work.begin()
    with open_streams(work.platform, work.base_model) as streams:
        killed = kill(release, component)
        until(lambda: streams.served_after(killed), START_S, "a stream after the kill")
    work.check(job)
    release.wait_ready()
    check_streams(streams, component, killed)


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_of_the_try_out_is_killed(release: Release, work: Work, server: str) -> None:
    job = work.begin()
    kill(release, server)
    release.wait_ready()
    work.check(job)


def kill(release: Release, component: str) -> float:
    """Kill the component's pod; when. Of engines all, as the streams may be on any: a job that had one to itself may
    have left it. An engine's process dies first: deleting its pod alone would let it drain."""
    found = release.ready_pods(component) if component == "engine" else [release.pod(component)]
    moment = time.monotonic()
    if component == "engine":
        signalled = [release.signal_engine(pod, "KILL") for pod in found]
        assert any(signalled), "no engine runs"
    for pod in found:
        release.kubectl.kill(pod["metadata"]["name"])
    # A StatefulSet's next pod has the name of the last one.
    gone = {pod["metadata"]["uid"] for pod in found}
    until(
        lambda: not gone & {one["metadata"]["uid"] for one in release.pods(component)},
        60,
        f"{component}'s pods to be gone",
    )
    return moment


def check_streams(streams: Streams, component: str, killed: float) -> None:
    streams.check_none_hung(SAID_S)
    broken = streams.broken_after(killed)
    if component in ("engine", "gateway"):
        assert broken, f"no stream noticed: {streams.ended[-5:]}"
    else:
        assert not broken, f"{component} is not on a stream's way: {broken}"
    if component == "gateway":
        assert all(one.ended - killed < BROKEN_S for one in broken), broken
    if component == "engine":
        assert all("engine" in one.error.lower() for one in broken), broken
