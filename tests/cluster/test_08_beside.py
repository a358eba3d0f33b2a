"""A second release in another namespace: both work at once, and neither sees the other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lathe.client import Client
from lathe.common.errors import Unauthenticated
from tests.cluster.conftest import END_S, START_S, Work
from tests.cluster.harness.commands import CommandFailed, until
from tests.cluster.harness.inventory import inventory, versions
from tests.cluster.harness.reach import reached, targets
from tests.cluster.harness.release import Release
from tests.e2e.survival import (
    check_history,
    final_adapter,
    start_long,
    upload_long,
    wait_for_step,
    wait_for_success,
)
from tests.fixtures.tiny_chat import write_tiny_chat

NAMESPACE = "lathe-beside"
GONE_S = 120.0
# Everybody's, if the caller's own policies let it out at all.
PUBLIC = {("gateway", 7460), ("gateway", 8080)}
# One of each kind: it calls many, it has a right to the API server, it holds other people's data.
CALLERS = ("gateway", "jobs", "engine")
# They move by themselves while a release does nothing but live.
LIVELY = ("pod", "podmetrics", "rayjob", "raycluster", "lease")


@pytest.fixture(scope="module")
def other(release: Release, values: dict[str, Any]) -> Iterator[Release]:
    """Installed as the first one, under another name."""
    found = Release(release.kind, release.helm, release.kubectl.within(NAMESPACE), "other")
    found.make_namespace()
    try:
        print(f"\n   a second release, everything ready: {found.install(values):.0f} s", flush=True)
        yield found
    finally:
        release.kubectl.run("delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found")


def cluster_roles(release: Release) -> set[str]:
    """What a release has beyond its namespace."""
    begin = f"{release.namespace}-{release.full_name}-"
    kinds = ("clusterroles", "clusterrolebindings")
    return {name for kind in kinds for name in release.kubectl.names(kind) if name.startswith(begin)}


@pytest.fixture(scope="module")
def there(other: Release, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The other one's client. It knows the same base model by the same name, from its own store."""
    with other.client() as client:
        folder = write_tiny_chat(tmp_path_factory.mktemp("tiny"))
        client.models.import_folder(folder, "tiny", license="Apache-2.0", source="made by a test")
        yield client


def test_both_work_at_once_each_with_its_own(
    release: Release, other: Release, work: Work, there: Client
) -> None:
    assert not list(there.jobs.list()), "it has none yet, whatever the first one has"
    theirs = start_long(there, work.base_model, upload_long(there))
    theirs = wait_for_step(there, theirs, 10, START_S)
    ours = work.begin(step=10)
    for one in (release, other):
        assert one.ready_pods("engine")
        made = one.kubectl.items("rayjobs", f"app.kubernetes.io/instance={one.name}")
        assert made and len(made) == len(one.kubectl.names("rayjobs")), "a RayJob that is not its own"
        assert all(each["metadata"]["name"].startswith(f"{one.full_name}-engine-") for each in made)
    theirs = wait_for_success(there, theirs, END_S)
    check_history(there, theirs)
    assert final_adapter(other.platform(), there, theirs) == work.expected
    work.check(ours)
    assert [job.name for job in there.jobs.list()] == [theirs.name]
    assert theirs.name not in {job.name for job in work.client.jobs.list()}


def test_a_key_opens_its_own_release_only(release: Release, other: Release) -> None:
    doors, keys = other.platform(), release.platform()
    with Client(doors.grpc, keys.api_key, timeout=10) as burglar, pytest.raises(Unauthenticated):
        list(burglar.jobs.list())


@pytest.mark.parametrize("what", ["rayjobs.ray.io", "deployments.apps", "pods", "secrets"])
def test_no_right_reaches_across(release: Release, other: Release, what: str) -> None:
    for one, beyond in ((release, other), (other, release)):
        user = f"--as=system:serviceaccount:{one.namespace}:{one.full_name}-jobs"
        for verb in ("list", "create", "delete"):
            with pytest.raises(CommandFailed) as refused:
                beyond.kubectl.run("auth", "can-i", verb, what, user)
            assert refused.value.output.split()[0] == "no"


def test_only_public_ports_are_reached_from_the_other(
    release: Release, other: Release, there: Client
) -> None:
    doors = {one: targets(one) for one in (release, other)}
    assert {(each.component) for each in doors[other]} >= {"engine", "postgres", "seaweedfs", *CALLERS}
    pairs = [
        (one, beyond, caller) for one, beyond in ((release, other), (other, release)) for caller in CALLERS
    ]

    def tried(pair: tuple[Release, Release, str]) -> set[tuple[str, int]]:
        one, beyond, caller = pair
        container = "engine" if caller == "engine" else ""
        return reached(one.kubectl, one.pod(caller), doors[beyond], container)

    with ThreadPoolExecutor(len(pairs)) as threads:
        for (one, _, caller), opened in zip(pairs, threads.map(tried, pairs), strict=True):
            assert opened <= PUBLIC, f"{caller} of {one.name}: {sorted(opened)}"


def test_the_same_name_again_is_refused_and_changes_nothing(
    release: Release, work: Work, values: dict[str, Any]
) -> None:
    before = versions(inventory(release.kubectl), *LIVELY)
    assert len(before) > 30
    with pytest.raises(CommandFailed, match=r"re-?use a name that is still in use"):
        release.install(values)
    assert versions(inventory(release.kubectl), *LIVELY) == before


def test_one_goes_and_the_other_stays(release: Release, other: Release, work: Work) -> None:
    """With what it has for the whole cluster: the first one's is left alone."""
    assert cluster_roles(other) and cluster_roles(release)
    job = work.begin()
    release.helm.uninstall(other.name, other.namespace)
    assert not cluster_roles(other)
    assert cluster_roles(release)
    until(lambda: not other.kubectl.names("pods"), GONE_S, "the other one's pods to be gone")
    work.check(job)
    release.wait_ready()
