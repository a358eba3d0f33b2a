"""What happens to a node while something is tried, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.harness.kubectl import wait_for_node
from tests.cluster.harness.release import SERVICES, Release


@contextmanager
def stopped(release: Release, node: str) -> Iterator[None]:
    release.kind.stop(node)
    try:
        yield
    finally:
        release.kind.start(node)
        wait_for_node(release.kubectl, node, True)


@contextmanager
def cut_off(release: Release, node: str) -> Iterator[None]:
    release.kind.cut(node)
    try:
        yield
    finally:
        release.kind.heal(node)
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
