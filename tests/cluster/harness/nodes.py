"""What happens to a node while something is tried, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tests.cluster.harness.kubectl import wait_for_node
from tests.cluster.harness.release import SERVICES, Release


def stopped(release: Release, node: str) -> AbstractContextManager[None]:
    """Its power is off meanwhile."""
    return _failing(release, node, release.kind.stop, release.kind.start)


def cut_off(release: Release, node: str) -> AbstractContextManager[None]:
    """Its network is cut meanwhile."""
    return _failing(release, node, release.kind.cut, release.kind.heal)


@contextmanager
def _failing(
    release: Release, node: str, fail: Callable[[str], None], mend: Callable[[str], None]
) -> Iterator[None]:
    fail(node)
    try:
        yield
    finally:
        mend(node)
        wait_for_node(release.kubectl, node, True)


@contextmanager
def cordoned(release: Release, node: str) -> Iterator[None]:
    release.kubectl.run("cordon", node)
    try:
        yield
    finally:
        release.kubectl.run("uncordon", node)


def leave_alone_with_the_engine(release: Release, node: str) -> None:
    """Move the services to other nodes, so that only the engine is lost with this one."""
    with cordoned(release, node):
        for service in SERVICES:
            for pod in release.pods(service):
                if pod["spec"].get("nodeName") == node:
                    release.kubectl.run("delete", "pod", pod["metadata"]["name"], "--wait=false")
        release.wait_ready()
