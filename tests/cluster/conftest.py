"""The release that these tests share, on the cluster that `run.py` made.

Modules run in the order of their numbers: the first ones look, then things are killed, the last one uninstalls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lathe.client import Client
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.cluster.harness.commands import ROOT
from tests.cluster.harness.helm import Helm
from tests.cluster.harness.kind import Kind
from tests.cluster.harness.kubectl import Kubectl, collect
from tests.cluster.harness.release import Release
from tests.cluster.harness.values import machine_address, values_for_tests
from tests.e2e.data import LESSONS, ask
from tests.e2e.survival import (
    check_history,
    final_adapter,
    start_long,
    upload_long,
    wait_for_step,
    wait_for_success,
)
from tests.fixtures.platforms import Platform
from tests.fixtures.tiny_chat import write_tiny_chat

HERE = Path(__file__).parent
LOGS = ROOT / "build" / "cluster-logs"
NAMESPACE = "lathe-test"
# An engine starts within Ray's own start; a lost node takes Kubernetes a minute.
START_S = 180.0
END_S = 300.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """What a failed test leaves is collected at once: a later one may change it."""
    report = yield
    if report.failed and HERE in item.path.parents:
        for given in getattr(item, "funcargs", {}).values():
            if isinstance(given, Release):
                collect(given.kubectl, [given.namespace], LOGS / item.name)
    return report


@pytest.fixture(scope="session")
def kind() -> Kind:
    given = os.environ.get("LATHE_CLUSTER_KUBECONFIG")
    if not given:
        pytest.exit("These tests need their cluster: run `make test-cluster`.", returncode=4)
    return Kind(os.environ.get("LATHE_CLUSTER_NAME", "lathe"), Path(given))


@pytest.fixture(scope="session")
def kubectl(kind: Kind) -> Kubectl:
    return Kubectl(kind.kubeconfig, NAMESPACE)


@pytest.fixture(scope="session")
def values(kind: Kind, kubectl: Kubectl) -> dict[str, Any]:
    """With which the release is installed."""
    return values_for_tests(machine_address(kubectl, kind.control_plane()))


@pytest.fixture(scope="session")
def release(kind: Kind, kubectl: Kubectl, values: dict[str, Any]) -> Release:
    """Installed once, with KubeRay beside it; what a kept cluster has is taken as it is."""
    if not kubectl.exists("crd", "rayjobs.ray.io"):
        kind.add_ons("kuberay")
    found = Release(kind, Helm(kind.kubeconfig), kubectl, "lathe")
    if not kubectl.exists("namespace", NAMESPACE):
        found.make_namespace()
    # By its labels: helm forgets the first of more than ten revisions.
    if not kubectl.names("secrets", "owner=helm,name=lathe"):
        seconds = found.install(values)
        print(f"\n   helm install, everything ready: {seconds:.0f} s", flush=True)
    return found


@pytest.fixture(scope="session")
def platform(release: Release) -> Platform:
    return release.platform()


@pytest.fixture(scope="session")
def client(platform: Platform) -> Iterator[Client]:
    """A call may wait until pods have come back."""
    with Client(platform.grpc, platform.api_key, timeout=120) as connected:
        yield connected


@dataclass(frozen=True, slots=True)
class Work:
    """A job that is long enough to be hit, and what it must make."""

    platform: Platform
    client: Client
    base_model: str
    dataset: datasets_pb2.Dataset
    expected: dict[str, bytes]

    def begin(self, step: int = 60, n_epochs: int = 8) -> jobs_pb2.Job:
        """A job that has got as far as `step`."""
        job = start_long(self.client, self.base_model, self.dataset, n_epochs)
        return wait_for_step(self.client, job, step, START_S)

    def finish(self, job: jobs_pb2.Job, timeout: float = END_S) -> jobs_pb2.Job:
        """It succeeds and tells everything once."""
        job = wait_for_success(self.client, job, timeout)
        check_history(self.client, job)
        return job

    def check(self, job: jobs_pb2.Job, timeout: float = END_S) -> jobs_pb2.Job:
        """It succeeds, tells everything once, makes the very bytes of an undisturbed one, and its model answers."""
        job = self.finish(job, timeout)
        assert final_adapter(self.platform, self.client, job) == self.expected
        self.check_answers(job.fine_tuned_model)
        return job

    def check_answers(self, model: str) -> None:
        question, answer = LESSONS[0]
        completion = self.client.chat(model, ask(question), temperature=0, max_tokens=20)
        assert completion.choices[0].message.content == answer


@pytest.fixture(scope="session")
def work(platform: Platform, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Work:
    model = client.models.import_folder(
        write_tiny_chat(tmp_path_factory.mktemp("tiny")),
        "tiny",
        license="Apache-2.0",
        source="made by a test",
    )
    base_model = model.name.removeprefix("baseModels/")
    dataset = upload_long(client)
    job = wait_for_success(client, start_long(client, base_model, dataset), START_S + END_S)
    check_history(client, job)
    return Work(platform, client, base_model, dataset, final_adapter(platform, client, job))
