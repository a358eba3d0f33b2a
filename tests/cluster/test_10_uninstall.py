"""The last module: the release goes, leaves what it said, and comes back to its own data."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from lathe.client import Client
from lathe.v1 import datasets_pb2
from tests.cluster.conftest import START_S, Work
from tests.cluster.harness.commands import CommandFailed, until
from tests.cluster.harness.inventory import inventory
from tests.cluster.harness.kind import timed
from tests.cluster.harness.release import Release
from tests.e2e.data import LESSONS, ask

# An engine has its grace; KubeRay and the garbage collector come after it.
GONE_S = 120.0
KEPT_LINE = re.compile(r"^  ((?:secret|persistentvolumeclaim)/\S+)$", re.MULTILINE)
HELM_LINE = re.compile(r"^\[Secret\] (\S+)$", re.MULTILINE)


def told(release: Release) -> set[str]:
    """What the chart's notes say that an uninstall leaves."""
    return set(KEPT_LINE.findall(release.helm.notes(release.name, release.namespace)))


def uninstalled(release: Release) -> set[str]:
    """What helm says that it left; everything else is gone, engines too."""
    wanted, started = told(release), time.monotonic()
    output = release.helm.uninstall(release.name, release.namespace)
    left = set(inventory(release.kubectl))

    def gone() -> bool:
        nonlocal left
        left = set(inventory(release.kubectl))
        return left <= wanted

    try:
        until(gone, GONE_S, "the rest to be gone")
    except AssertionError:
        pytest.fail(f"nobody was told that this stays: {sorted(left - wanted)}")
    timed("helm uninstall, and everything gone", started)
    assert left == wanted, "what was to be kept is gone"
    return {f"secret/{name}" for name in HELM_LINE.findall(output)}


def test_what_is_left_is_what_was_told(release: Release, work: Work, values: dict[str, Any]) -> None:
    """While an engine is there. Installed again, it takes over what was kept: key, data, and the tuned model."""
    job = work.check(work.begin(step=1))
    release.wait_for_engine(START_S)
    kept, key = told(release), work.platform.api_key
    assert {name for name in kept if name.startswith("secret/")} == uninstalled(release)
    assert not [name for name in release.kubectl.names("clusterroles") if name.startswith(release.namespace)]

    print(f"   installed again, everything ready: {release.install(values):.0f} s", flush=True)
    assert release.secret("bootstrap", "api-key") == key
    with Client(release.platform().grpc, key, timeout=START_S) as client:
        dataset = client.datasets.get(work.dataset.name)
        assert dataset.state == datasets_pb2.DATASET_STATE_READY
        assert b"".join(client.datasets.download(dataset.name))
        assert client.jobs.get(job.name) == job
        question, answer = LESSONS[0]
        said = client.chat(job.fine_tuned_model, ask(question), temperature=0, max_tokens=20)
        assert said.choices[0].message.content == answer


def test_nothing_is_left_after_the_documented_end(release: Release) -> None:
    """As docs/operations.md has it."""
    uninstalled(release)
    selector = f"--selector=app.kubernetes.io/instance={release.name}"
    release.kubectl.run("delete", "secret,persistentvolumeclaim", selector)
    assert not inventory(release.kubectl)
    release.kubectl.run("delete", "namespace", release.namespace)
    with pytest.raises(CommandFailed, match="not found"):
        release.helm.status(release.name, release.namespace)
