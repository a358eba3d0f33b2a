"""What the launcher relies on in Kubernetes' API. Run on the fake here, and on a cluster by tests/cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lathe.common.errors import AlreadyExists, InvalidArgument, NotFound
from lathe.jobs.launchers.kube_api import Kind, KubeApi

LABEL = "lathe.internal/contract"


def sleeper(name: str, mark: str) -> dict[str, Any]:
    """A Deployment that never has a pod."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": {LABEL: mark}},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": {LABEL: mark}},
            "template": {
                "metadata": {"labels": {LABEL: mark}},
                "spec": {"containers": [{"name": "engine", "image": "nothing:1"}]},
            },
        },
    }


def objects_are_made_found_and_deleted(api: KubeApi, until: Callable[[Callable[[], bool]], None]) -> None:
    api.create(Kind.DEPLOYMENT, sleeper("contract-a", "a"))
    api.create(Kind.DEPLOYMENT, sleeper("contract-b", "b"))
    with pytest.raises(AlreadyExists):
        api.create(Kind.DEPLOYMENT, sleeper("contract-a", "a"))
    assert [one["metadata"]["name"] for one in api.list(Kind.DEPLOYMENT, labels=f"{LABEL}=a")] == [
        "contract-a"
    ]
    assert len(api.list(Kind.DEPLOYMENT, labels=LABEL)) == 2
    assert not api.list(Kind.DEPLOYMENT, labels=f"{LABEL}=a,other")
    found = api.get(Kind.DEPLOYMENT, "contract-a")
    assert (
        found is not None
        and found["metadata"]["uid"]
        and found["metadata"]["creationTimestamp"].endswith("Z")
    )
    for name in ("contract-a", "contract-a", "contract-b"):
        api.delete(Kind.DEPLOYMENT, name)
    until(lambda: not api.list(Kind.DEPLOYMENT, labels=LABEL))
    assert api.get(Kind.DEPLOYMENT, "contract-a") is None


def what_is_not_there_is_said_so(api: KubeApi) -> None:
    assert api.log_tail("no-such-pod", "engine") == ""
    assert api.log_tail("no-such-pod", "engine", previous=True) == ""
    assert not api.list(Kind.EVENT, fields="involvedObject.name=no-such-object")
    assert not api.list(Kind.POD, labels="lathe.internal/engine=no-such-engine")


def groups_are_known(api: KubeApi) -> None:
    assert api.serves("apps/v1")
    assert not api.serves("nothing.example/v1")
    if api.serves("ray.io/v1"):
        api.list(Kind.RAYJOB, labels=LABEL)
    else:
        with pytest.raises(NotFound):
            api.list(Kind.RAYJOB, labels=LABEL)


def a_body_that_is_wrong_is_refused(api: KubeApi) -> None:
    body = sleeper("contract-c", "c")
    del body["spec"]["selector"]
    with pytest.raises(InvalidArgument, match="selector"):
        api.create(Kind.DEPLOYMENT, body)
