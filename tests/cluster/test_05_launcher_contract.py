"""The Kubernetes launcher against the real API: what the fake promises, and what engines that cannot start say.

In a namespace of its own; the release is not touched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import yaml

from lathe.common.clock import SystemClock
from lathe.jobs.launchers.kube_api import HttpKubeApi, connect
from lathe.jobs.launchers.kuberay import KubernetesLauncher
from lathe.jobs.launchers.manifests import Frame
from lathe.jobs.ports import EngineLaunch
from tests.cluster.harness.commands import POLL_S, until
from tests.cluster.harness.kubectl import Kubectl
from tests.contract import kube_api as contract

pytestmark = pytest.mark.fast

NAMESPACE = "lathe-launcher"
IMAGE = "lathe/no-such-image:1"
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def namespace(kubectl: Kubectl) -> Iterator[Kubectl]:
    kubectl.run("create", "namespace", NAMESPACE)
    yield kubectl.within(NAMESPACE)
    kubectl.run("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture
def api(namespace: Kubectl) -> Iterator[HttpKubeApi]:
    made = connect(namespace.namespace, namespace.kubeconfig)
    yield made
    made.close()


def soon(true: Callable[[], bool]) -> None:
    until(true, LIMIT_S, "what was deleted to be gone")


def test_the_real_api_keeps_the_contract(api: HttpKubeApi) -> None:
    contract.objects_are_made_found_and_deleted(api, soon)
    contract.what_is_not_there_is_said_so(api)
    contract.groups_are_known(api)
    contract.a_body_that_is_wrong_is_refused(api)


@pytest.mark.parametrize("engines", ["rayjob", "deployment"])
async def test_an_engine_without_an_image_is_made_once_and_says_what_it_waits_for(
    api: HttpKubeApi, namespace: Kubectl, tmp_path: Path, engines: Literal["rayjob", "deployment"]
) -> None:
    container = {"name": "engine", "image": IMAGE, "imagePullPolicy": "Never"}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump({"spec": {"containers": [container]}}))
    frame = Frame("lathe", "lathe", "nowhere:7460", "2.60.0")
    launcher = KubernetesLauncher(api, frame, tmp_path, SystemClock(), engines=engines, fresh_s=0)
    launch = EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, "cpu")
    await launcher.start(launch)
    await launcher.start(launch)
    deadline = time.monotonic() + LIMIT_S
    while not (found := (await launcher.list())[0]).waiting_for:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(POLL_S)
    assert found.running and IMAGE in found.waiting_for
    await launcher.stop("eng-1")
    await launcher.stop("eng-1")
    assert not await launcher.list()
    soon(lambda: not namespace.names("pod"))
