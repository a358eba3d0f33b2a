"""A fresh release: what runs, who may do what, and who reaches whom."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.conftest import START_S, Work
from tests.cluster.harness.commands import CommandFailed, until
from tests.cluster.harness.kubectl import Kubectl
from tests.cluster.harness.reach import Target, reached, stranger, targets
from tests.cluster.harness.release import SERVERS, SERVICES, Release

pytestmark = pytest.mark.fast

EVERYBODY: frozenset[tuple[str, int]] = frozenset({("gateway", 7460), ("gateway", 8080)})
# "Who may call whom" of docs/architecture.md, as ports.
EDGES = {
    "gateway": {
        *(("accounts", 7460), ("datasets", 7460), ("models", 7460), ("jobs", 7460), ("engine", 7460)),
        *(("postgres", 5432), ("seaweedfs", 8333)),
    },
    "accounts": {("postgres", 5432)},
    "datasets": {("models", 7460), ("postgres", 5432), ("seaweedfs", 8333)},
    "models": {("postgres", 5432), ("seaweedfs", 8333)},
    "jobs": {("accounts", 7460), ("datasets", 7460), ("models", 7460), ("postgres", 5432)},
    "engine": {("jobs", 7460), ("seaweedfs", 8333)},
}
# What jobs may do in its namespace; the others may do nothing at all.
JOBS_MAY = {
    *(("create", "rayjobs.ray.io"), ("list", "rayjobs.ray.io"), ("delete", "rayjobs.ray.io")),
    *(("create", "deployments.apps"), ("get", "deployments.apps"), ("list", "deployments.apps")),
    *(("delete", "deployments.apps"), ("list", "pods"), ("get", "pods/log"), ("list", "events")),
}
VERBS = ("get", "list", "create", "update", "patch", "delete")
RESOURCES = (
    *("rayjobs.ray.io", "rayclusters.ray.io", "deployments.apps", "pods", "pods/log", "pods/exec", "events"),
    *(
        "secrets",
        "configmaps",
        "services",
        "roles.rbac.authorization.k8s.io",
        "networkpolicies.networking.k8s.io",
    ),
)


def test_every_pod_is_ready_and_never_restarted(release: Release) -> None:
    for component in (*SERVICES, *SERVERS):
        [pod] = release.ready_pods(component)
        for status in pod["status"]["containerStatuses"]:
            assert status["restartCount"] == 0, (component, status)


def test_the_try_out_is_where_no_test_kills(release: Release) -> None:
    for server in SERVERS:
        assert release.node_of(server) == release.kind.control_plane()


@pytest.fixture(scope="module")
def foreigner(release: Release) -> Iterator[tuple[Kubectl, dict[str, object]]]:
    """A pod of another namespace."""
    kubectl = release.kubectl.within("stranger")
    image = release.pod("gateway")["spec"]["containers"][0]["image"]
    release.kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "stranger"}})
    kubectl.apply(stranger("stranger", image))
    kubectl.run("wait", "--for=condition=Ready", "pod/stranger", "--timeout=180s", timeout=200)
    yield kubectl, kubectl.get("pod", "stranger")
    release.kubectl.run("delete", "namespace", "stranger", "--wait=false")


@pytest.fixture(scope="module")
def doors(release: Release, work: Work) -> list[Target]:
    """Every port, an engine's among them: it has just run a job."""
    release.wait_for_engine()
    found = targets(release)
    assert {one.component for one in found} == {*SERVICES, *SERVERS, "engine"}
    return found


@pytest.mark.parametrize("component", sorted(EDGES))
def test_every_edge_works_and_nothing_else(release: Release, doors: list[Target], component: str) -> None:
    others = [one for one in doors if one.component != component]
    container = "engine" if component == "engine" else ""
    opened = reached(release.kubectl, release.pod(component), others, container)
    may = EDGES[component] | (EVERYBODY if component == "nobody" else set())
    assert opened - EVERYBODY == may, f"{component}: {sorted(opened)}"


def test_a_stranger_reaches_the_public_ports_only(
    foreigner: tuple[Kubectl, dict[str, object]], doors: list[Target]
) -> None:
    kubectl, pod = foreigner
    assert reached(kubectl, pod, doors) == EVERYBODY


def allowed(kubectl: Kubectl, account: str) -> set[tuple[str, str]]:
    """What `kubectl auth can-i` says yes to."""
    found = set()
    user = f"--as=system:serviceaccount:{kubectl.namespace}:{account}"
    for resource in RESOURCES:
        for verb in VERBS:
            name, _, part = resource.partition("/")
            try:
                kubectl.run("auth", "can-i", verb, name, *([f"--subresource={part}"] if part else []), user)
            except CommandFailed as error:
                assert error.output.strip().startswith("no"), error
                continue
            found.add((verb, resource))
    return found


@pytest.mark.parametrize("component", [*SERVICES, "engine"])
def test_accounts_have_the_least_rights(release: Release, work: Work, component: str) -> None:
    [pod, *_] = until(lambda: release.ready_pods(component), START_S, f"a pod of {component}")
    account = pod["spec"]["serviceAccountName"]
    assert account != "default"
    assert allowed(release.kubectl, account) == (JOBS_MAY if component == "jobs" else set())
